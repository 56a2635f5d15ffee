"""``rewards``, ``pipelines`` and ``apps`` are names that others use too; the wrong one fails far from its cause."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

FLOORS = ("diffalign", "rewards", "pipelines", "apps")


def refuse_strangers() -> None:
    """Raises a readable ImportError when a stranger's folder stands before one of our packages."""
    home = Path(__file__).resolve().parent.parent
    for name in FLOORS:
        spec = find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if places and home / name not in places and (home / name).is_dir():
            raise ImportError(
                f"the folder {places[0]} hides diffalign's own package {name!r} in {home}; run from another folder, "
                f"or take {places[0].parent} off PYTHONPATH"
            )
