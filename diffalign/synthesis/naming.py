"""What models, files and rewards are called in what is handed out: by their names, never by where they lie."""

from __future__ import annotations

from pathlib import Path


def without_places(name: str | None) -> str | None:
    """A model, folder or reward as it may be handed out: no path, no address.

    ``embedded:NAME``, ``fetched:NAME`` and the names of rewards stay as they are, and so does a hub id that is no
    folder here. A reward that is asked over the network is called ``remote``.
    """
    if name is None:
        return None
    if name.startswith(("http://", "https://")):
        return "remote"
    if name.startswith(("embedded:", "fetched:", "hf-hub:")):
        return name
    head, mark, arguments = name.partition("?")
    kept = [f"{key}{equals}{_last(value)}" for key, equals, value in (a.partition("=") for a in arguments.split("&"))]
    return _last(head) + mark + "&".join(kept if mark else [])


def _last(name: str) -> str:
    """The last component of a path; a hub id, which is ``ORG/NAME`` and nothing here, is none."""
    here = name.startswith(("/", "~", ".")) or "\\" in name or name.count("/") != 1 or Path(name).exists()
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if here else name
