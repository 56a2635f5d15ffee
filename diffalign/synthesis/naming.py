"""What models, files and rewards are called in what is handed out: by their names, never by where they lie."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

LOCAL = "local-dir:"
"""Before the folder of a model of open_clip."""
_REMOTE = "remote"


def without_places(name: str | None) -> str | None:
    """A model, folder or reward as it may be handed out: no path, no address.

    ``embedded:NAME``, ``fetched:NAME`` and the names of rewards stay as they are, and so does a hub id that is no
    folder here. What is asked over the network, a reward or a server in its arguments, is called ``remote``.
    """
    if name is None:
        return None
    if name.startswith(("http://", "https://")):
        return _REMOTE
    if name.startswith(("embedded:", "fetched:", "hf-hub:")):
        return name
    head, mark, arguments = name.partition("?")
    kept = [f"{key}{equals}{_value(value)}" for key, equals, value in (a.partition("=") for a in arguments.split("&"))]
    return _last(head) + mark + "&".join(kept if mark else [])


def _value(value: str) -> str:
    """An argument of a reward. Percent escapes, as rewards read them, must not hide a place."""
    return _last(unquote(value)).replace("%", "%25").replace("&", "%26")


def _last(name: str) -> str:
    """The last component of a path; a hub id, which is ``ORG/NAME`` and nothing here, is none."""
    if name.startswith(LOCAL):
        return LOCAL + _last(f"./{name.removeprefix(LOCAL)}")
    if "://" in name:
        return _REMOTE
    here = re.match(r"[/~.]|[A-Za-z]:/", name) or "\\" in name or ".py:" in name
    here = here or name.count("/") != 1 or Path(name).exists()
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if here else name
