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
from diffalign.synthesis import store
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.journal import Journal
from diffalign.synthesis.spec import Spec


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

    Raises NotFoundError for a folder that holds no dataset, and RefusedError where specification, models or rewards are
    not those that it was begun with. Only ``attempts`` may have been raised.
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
    path = folder / store.SPEC
    try:
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        begun = None
    if not isinstance(begun, dict):
        raise InputError(f"{path} is no specification: it was changed, or is damaged")
    before, now = dict(_flat(begun)), dict(_flat(spec.public()))
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    raised = different == ["attempts"] and spec.attempts > begun.get("attempts", 0)
    if different and not raised:
        name = different[0]
        raise RefusedError(
            f"{folder} was begun with another specification: {name} was {_shown(before, name)}, and is"
            f" {_shown(now, name)}; continue it with what it was, or choose another --out"
        )
    if not different and list(begun["axes"] or {}) != list(spec.axes):
        raise RefusedError(f"{folder} was begun with the axes in another order: {', '.join(begun['axes'])}")
    return raised


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


def _shown(fields: Mapping[str, object], name: str) -> str:
    return json.dumps(fields[name], ensure_ascii=False) if name in fields else "not there"


def _same_makers(begun: Manifest, now: Manifest) -> None:
    for what in ("models", "rewards", "gates"):
        before, after = (json.loads(json.dumps(asdict(manifest)[what])) for manifest in (begun, now))
        if before != after:
            one, two = dict(_flat(before)), dict(_flat(after))
            name = next(name for name in {**one, **two} if one.get(name) != two.get(name))
            raise RefusedError(
                f"the dataset was begun with other {what}: {name} was {_shown(one, name)}, and is {_shown(two, name)};"
                " bring back what it was, or begin another dataset"
            )


def versions_that_changed(folder: Path, now: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Packages that are not of the version that the dataset was begun with: another one may round floats otherwise."""
    if not (folder / store.MANIFEST).is_file():
        return {}
    begun, _ = store.read_manifest(folder)
    return {name: (begun.versions.get(name), v) for name, v in now.items() if begun.versions.get(name) != v}
