"""What the environment may not decide: switches by which Gradio and FastAPI share, serve files, or phone home."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SWITCHES = ("GRADIO_", "FASTAPI_", "OTEL_")
# A machine of Hugging Face makes Gradio behave otherwise: other addresses, logins by its site, links to it.
OTHERS = ("SPACE_ID", "SPACE_HOST", "SPACE_AUTHOR_NAME", "SYSTEM", "KAGGLE_KERNEL_RUN_TYPE")
OURS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_TEMP_DIR": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}
"""What they are set to instead; the folder is another one each time."""


@contextmanager
def quieted() -> Iterator[list[str]]:
    """As ``quiet``, until the block is left: then the environment is what it was."""
    before = dict(os.environ)
    try:
        yield quiet(temporary())
    finally:
        for name in [*OURS, *filter(_switch, [*before, *os.environ])]:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@cache
def temporary() -> Path:
    """A folder of this process that goes when it ends.

    Gradio makes folders in it for uploads and for edits of its own, of which nothing here uses any; and where it makes
    them is settled when it is imported, for the whole process.
    """
    folder = Path(tempfile.mkdtemp(prefix="diffalign-label-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def quiet(folder: Path, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Takes all such switches out of the environment, before who reads them is imported; returns which had been set.

    What Gradio would write, it writes into ``folder``.
    """
    found = sorted(filter(_switch, environment))
    ours = {**OURS, "GRADIO_TEMP_DIR": str(folder)}
    removed = [name for name in found if environment[name] != ours.get(name)]
    for name in found:
        del environment[name]
    environment.update(ours)
    return removed


def _switch(name: str) -> bool:
    return name.startswith(SWITCHES) or name in OTHERS
