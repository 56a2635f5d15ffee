"""What the environment may not decide: switches by which Gradio and FastAPI share, serve files, or phone home."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

SWITCHES = ("GRADIO_", "FASTAPI_", "OTEL_")
# A machine of Hugging Face makes Gradio behave otherwise: other addresses, logins by its site, links to it.
OTHERS = ("SPACE_ID", "SPACE_HOST", "SPACE_AUTHOR_NAME", "SYSTEM", "KAGGLE_KERNEL_RUN_TYPE")


def quiet(temporary: Path, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Takes all such switches out of the environment, before who reads them is imported; returns which had been set.

    What Gradio would write, it writes into ``temporary``, never into the temporary folder of the machine.
    """
    found = sorted(name for name in environment if name.startswith(SWITCHES) or name in OTHERS)
    ours = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(temporary),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    removed = [name for name in found if environment[name] != ours.get(name)]
    for name in found:
        del environment[name]
    environment.update(ours)
    return removed
