"""What generators are aligned to. `registry.load` turns the name of a reward into one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def _refuse_strangers() -> None:
    """``pipelines`` and ``apps`` are names that other projects use too; the wrong one fails far from its cause."""
    home = Path(__file__).resolve().parent.parent
    for name in ("diffalign", "pipelines", "apps"):
        spec = find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if places and home / name not in places and (home / name).is_dir():
            raise ImportError(
                f"the folder {places[0]} hides diffalign's own package {name!r} in {home}; run from another folder, "
                f"or take {places[0].parent} off PYTHONPATH"
            )


_refuse_strangers()
