"""How the folder of a dataset is begun, and how one that was begun is taken up again. Nothing is ever deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import InputError, NotFoundError, RefusedError
from diffalign.runs import disk_errors, flush_folder, require_empty, write_text
from diffalign.synthesis import rows, store
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.journal import Journal, Row
from diffalign.synthesis.spec import Spec

MISSING = object()
"""In place of a field that is not there."""
ALIGNED = "aligned"


def begin(spec: Spec, folder: Path, manifest: Manifest) -> None:
    """Begins a dataset in a folder that is new or empty."""
    require_empty(folder)
    with disk_errors(f"cannot write {folder}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        flush_folder(folder.parent)
        write_text(folder / store.SPEC, spec.dump())
        Journal.create(folder / store.JOURNAL).close()
    store.write_manifest(folder, manifest, complete=False)


def resume(spec: Spec, folder: Path, manifest: Manifest) -> bool:
    """Takes a dataset up again, and says whether it is complete already.

    The specification is written before the manifest, which has its hash: where a process was killed between the two,
    the manifest is brought up to it.

    Raises NotFoundError for a folder that holds no dataset, and RefusedError where specification, rows, models or
    rewards are not those that it was begun with. Only ``attempts`` may have been raised.
    """
    if not (folder / store.SPEC).is_file():
        if folder.is_dir() and not any(path.name != f".{store.SPEC}.tmp" for path in folder.iterdir()):
            write_text(folder / store.SPEC, spec.dump())  # a process was killed before it had written anything
        else:
            raise NotFoundError(f"{folder} is no dataset to continue: it has no {store.SPEC}")
    more = _same_spec(spec, folder)
    if not (folder / store.JOURNAL).is_file():
        if (folder / store.MANIFEST).is_file():
            raise InputError(f"{folder} has lost its {store.JOURNAL}; without it nothing can be continued")
        with disk_errors(f"cannot write {folder}", folder):
            Journal.create(folder / store.JOURNAL).close()
    told = None
    if (folder / store.MANIFEST).is_file():
        begun, complete = store.read_manifest(folder)
        _same_makers(begun, manifest)
        if complete:
            return True
        _same_rows(spec, folder)
        told, manifest = begun.spec_sha256, replace(begun, spec_sha256=spec.sha256)
    with disk_errors(f"cannot write {folder}", folder):
        (folder / f".{store.SPEC}.tmp").unlink(missing_ok=True)  # left by a process that was killed while it wrote
    if more:
        write_text(folder / store.SPEC, spec.dump())
    if told != spec.sha256:
        store.write_manifest(folder, manifest, complete=False)
    return False


def _same_spec(spec: Spec, folder: Path) -> bool:
    """Whether ``attempts`` was raised; RefusedError where anything else is another than in the folder."""
    different = changes(spec, folder)
    raised = list(different) == ["attempts"] and spec.attempts > (different["attempts"][0] or 0)
    if different and not raised:
        name, (before, now) = next(iter(different.items()))
        raise RefusedError(
            f"{folder} was begun with another specification: {name} was {shown(before)}, and is {shown(now)};"
            " continue it with what it was, or choose another --out"
        )
    return raised


def changes(spec: Spec, folder: Path) -> dict[str, tuple[Any, Any]]:
    """The fields that are others than in the specification of a dataset: what they are there, and here.

    ``MISSING`` is a field that is not there. Raises InputError where the folder holds no specification.
    """
    path = folder / store.SPEC
    try:
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        begun = None
    if not isinstance(begun, dict):
        raise InputError(f"{path} is no specification: it was changed, or is damaged")
    before, now = dict(_flat(begun)), dict(_flat(spec.public()))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    found = {name: (before.get(name, MISSING), now.get(name, MISSING)) for name in names}
    axes = list(begun.get("axes") or {})
    return found if found or axes == list(spec.axes) else {"axes": (axes, list(spec.axes))}


def _flat(data: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every value of nested plain data by its dotted name."""
    children: Iterator[tuple[object, object]]
    if isinstance(data, Mapping) and data:
        children = iter(data.items())
    elif isinstance(data, list) and data:
        children = iter(enumerate(data))
    else:
        yield prefix, data
        return
    for name, value in children:
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def shown(value: object) -> str:
    """A value of a field, in a message."""
    return "not there" if value is MISSING else json.dumps(value, ensure_ascii=False)


def _same_makers(begun: Manifest, now: Manifest) -> None:
    if found := other_maker(begun, now):
        what, name, before, after = found
        raise RefusedError(
            f"the dataset was begun with other {what}: {name} was {before}, and is {after}; bring back what it was, or"
            " begin another dataset"
        )


def other_maker(begun: Manifest, now: Manifest) -> tuple[str, str, str, str] | None:
    """The first fact of models, rewards and gates that is another: of which of the three, its name, what it was and is.

    What a run says of its own outcome (``aligned``) is not compared: it may be evaluated later.
    """
    for what in ("models", "rewards", "gates"):
        one, two = (dict(_flat(json.loads(json.dumps(asdict(manifest)[what])))) for manifest in (begun, now))
        for name in {**one, **two}:
            if one.get(name, MISSING) != two.get(name, MISSING) and f".{ALIGNED}." not in name:
                return what, name, shown(one.get(name, MISSING)), shown(two.get(name, MISSING))
    return None


def _same_rows(spec: Spec, folder: Path) -> None:
    """RefusedError where rows that were written down are not those that the specification stands for now."""
    journal = Journal(folder / store.JOURNAL, writable=True)  # a reader would leave files of its own beside it
    try:
        asked = rows.rows(spec)
        other: tuple[Row, Row] | None = None
        for number, name, cells, stratum, split in journal.read(
            "SELECT number, id, cells, stratum, split FROM row ORDER BY number"
        ):
            row = Row(number, name, json.loads(cells), stratum, split)
            drawn = next(drawn for drawn in asked if drawn.index == number)
            other = other or (None if row == drawn else (row, drawn))
    finally:
        journal.close()
    if other is not None:
        before, now = (json.dumps([dict(row.cells), row.split], ensure_ascii=False) for row in other)
        raise RefusedError(
            f"{folder} was begun by another version of diffalign, which drew other rows: row {other[0].index} was"
            f" {before}, and is {now}; end it with that version, or begin another dataset"
        )


def versions_that_changed(folder: Path, now: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Packages that are not of the version that the dataset was begun with: another one may round floats otherwise."""
    if not (folder / store.MANIFEST).is_file():
        return {}
    begun, _ = store.read_manifest(folder)
    return {name: (begun.versions.get(name), v) for name, v in now.items() if begun.versions.get(name) != v}
