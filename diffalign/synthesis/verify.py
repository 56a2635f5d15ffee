"""Whether a dataset, or an export of one, is still as it was made: every file, every case, and nothing else.

Each check gives sentences, one for each fault; none is a check passed. The hashes find whatever was changed by
accident. They do not find who changes a file together with all that is said about it: that takes a signature by
somebody else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import DiffalignError, InputError, NotFoundError, RefusedError
from diffalign.synthesis import croissant, exports, provenance, store, sums, traces
from diffalign.synthesis.exports import Exported, pixels, table
from diffalign.synthesis.exports import layout as layouts
from diffalign.synthesis.spec import sha256_of
from diffalign.synthesis.store import Generated

Faults = Generator[str, None, str]
"""Yields faults, and returns what was looked at, in a few words."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    told: str
    """What was looked at; empty where it could not be."""
    faults: tuple[str, ...] = ()


def verify(folder: Path) -> Iterator[Check]:
    """The checks of a dataset with all of its exports, or of an export.

    Raises NotFoundError where there is neither, and RefusedError for a dataset that is not finished: nothing can be
    said yet about files that are still to be made.
    """
    if any((folder / name).exists() for name in (store.JOURNAL, store.SPEC, store.FILES)):
        if _unfinished(folder):
            raise RefusedError(store.unfinished(folder))
        yield from _dataset(folder)
    elif any((folder / name).exists() for name in (sums.NAME, exports.MANIFEST, provenance.NAME)):
        yield from _export(folder)
    else:
        raise NotFoundError(f"{folder} is neither a dataset of diffalign nor an export of one")


def _unfinished(folder: Path) -> bool:
    """Whether a dataset was begun and has not come to its end: the hashes of its files are listed last of all."""
    if any((folder / name).exists() for name in (sums.NAME, sums.APART, "report.html")):
        return False
    try:
        return not (folder / store.MANIFEST).is_file() or not store.read_manifest(folder)[1]
    except InputError:
        return False


def _dataset(folder: Path) -> Iterator[Check]:
    yield _check("files", _files(folder))
    yield _check("specification", _specification(folder))
    yield _check("cases", _cases(folder))
    yield _check("images", _images(folder))
    yield _check("traces", _traces(folder))
    for path in sorted((folder / sums.APART).glob("*")):
        name = f"{sums.APART}/{path.name}"
        if path.is_symlink() or not path.is_dir():
            yield Check(name, "", (f"{name} is no export",))
            continue
        for found in _export(path):
            yield Check(f"{name} {found.name}", found.told, tuple(f"{name}: {fault}" for fault in found.faults))
        yield _check(f"{name} origin", _origin(folder, path, name))


def _export(folder: Path) -> Iterator[Check]:
    yield _check("files", _files(folder))
    yield _check("manifest", _manifest(folder))
    yield _check("records", _records(folder))
    yield _check("croissant", _croissant(folder))
    yield _check("traces", _traces(folder))


def _check(name: str, faults: Faults) -> Check:
    found: list[str] = []
    try:
        while True:
            found.append(next(faults))
    except StopIteration as end:
        return Check(name, end.value, tuple(found))
    except ModuleNotFoundError:
        raise
    # A damaged file makes the libraries that read it fail in any way.
    except Exception as error:
        said = str(error) if isinstance(error, DiffalignError) else f"{type(error).__name__}: {error}"
        return Check(name, "", (*found, " ".join(said.split()) or type(error).__name__))


def _files(folder: Path) -> Faults:
    yield from sums.faults(folder)
    return f"{len(sums.read(folder))} files, each with the hash that is listed, and no other"


def _traces(folder: Path) -> Faults:
    machine, names = traces.of_this_machine(), list(sums.files(folder))
    for name in names:
        if trace := machine.of_file(folder / name):
            yield f"{name} names a place of a machine or a user: {trace!r}"
    return f"no path, user or host of this machine in {len(names)} files"


def _specification(folder: Path) -> Faults:
    manifest, _ = store.read_manifest(folder)
    spec = yaml.safe_load((folder / store.SPEC).read_text(encoding="utf-8"))
    if sha256_of(spec) != manifest.spec_sha256:
        yield f"{store.SPEC} is not the specification whose hash {store.MANIFEST} has"
    return f"{store.SPEC} has the hash {manifest.spec_sha256[:12]}"


def _cases(folder: Path) -> Faults:
    source = Generated.open(folder)
    if not source.complete:
        yield store.unfinished(folder)
    ids, columns = set[str](), set(source.manifest.columns)
    for case in source.cases():
        if case.id in ids:
            yield f"case {case.index}: its id {case.id!r} stands there twice"
        ids.add(case.id)
        if set(case.row) != columns:
            yield f"case {case.index} has not the columns that {store.MANIFEST} names"
        if case.split not in source.manifest.splits:
            yield f"case {case.index} is in the split {case.split!r}, which {store.MANIFEST} does not name"
        if case.stratum not in source.manifest.strata:
            yield f"case {case.index} is in the stratum {case.stratum!r}, which {store.MANIFEST} does not name"
    for stratum, found in source.acceptance().items():
        if found.accepted != found.wanted:
            yield f"stratum {stratum!r} has {found.accepted} cases instead of {found.wanted}"
    source.close()
    return f"{len(ids)} cases in {len(source.manifest.strata)} strata, as the specification asks"


def _images(folder: Path) -> Faults:
    source = Generated.open(folder)
    named = {attempt.image for attempt in source.attempts() if attempt.image}
    for path in sorted(path for path in source.files.folder.rglob("*") if not path.is_dir()):
        if path.stem not in named or path != source.files.path(path.stem):
            yield f"{path.relative_to(folder).as_posix()} is named by no attempt in the journal"
    count = 0
    for case in source.cases():
        if case.image is None:
            continue
        try:
            pixels.of_png(source.image(case.image))
        except (InputError, NotFoundError) as error:
            yield f"case {case.index}: {error}"
        count += 1
    source.close()
    return f"{count} images decode, and have the hash that is their name"


def _manifest(folder: Path) -> Faults:
    about = Exported.read(folder)
    if not re.fullmatch("[0-9a-f]{64}", about.dataset.spec_sha256):
        yield f"{exports.MANIFEST}: the hash of the specification is none"
    if about.release.verdict != "passed" and not about.release.allowed_unsafe:
        yield f"{exports.MANIFEST}: the privacy is {about.release.verdict}, and nobody allowed that"
    return f"format {about.form}, privacy {about.release.verdict}"


def _records(folder: Path) -> Faults:
    about, machine = Exported.read(folder), traces.of_this_machine()
    expected = dict[Any, tuple[str, str | None]]()
    splits = dict.fromkeys(about.layout.splits, 0)
    for number, facts in enumerate(_provenance(folder), 1):
        yield from _line(facts, number, about, splits)
        if facts["index"] in expected:
            yield f"{provenance.NAME}: case {facts['index']} stands there twice"
        image = facts["image"]
        expected[facts["index"]] = facts["record_sha256"], None if image is None else image["pixels_sha256"]
    if splits != about.layout.splits:
        yield f"{provenance.NAME} does not have as many cases in each split as {exports.MANIFEST} says"
    count = len(expected)
    told = yield from _beside(folder, about, {index: wanted for index, (wanted, _) in expected.items()})
    for name, record, found in exports.located(folder, about):
        index = record.get("index")
        wanted = expected.pop(index, None)
        if wanted is None:
            yield f"case {index} is not in {provenance.NAME}, or is there twice"
            continue
        if told.get(index, name) != name:
            yield f"{table.NAME}: case {index} is in {name}, not in {told[index][:80]!r}"
        if set(record) != set(about.layout.kinds):
            yield f"case {index} has not the columns that {exports.MANIFEST} names"
        if layouts.digest(record) != wanted[0]:
            yield f"case {index}: its row or text is not the one in {provenance.NAME}"
        if (None if found is None else pixels.digest(found)) != wanted[1]:
            yield f"case {index}: its pixels are not those in {provenance.NAME}"
        # Some formats compress texts, so that no search of their bytes finds them.
        if trace := machine.of_text(layouts.as_text(record)):
            yield f"case {index} names a place of a machine or a user: {trace!r}"
    yield from (f"case {index} of {provenance.NAME} is missing" for index in expected)
    return f"{count} cases, whose rows, texts and pixels are those of {provenance.NAME}"


def _beside(folder: Path, about: Exported, expected: dict[Any, str]) -> Generator[str, None, dict[Any, str]]:
    """Whether the table beside files that are none has the same records; returns the file that it names for each.

    Exports that were made before there was such a table promise none, and a few have one all the same.
    """
    told = dict[Any, str]()
    path = folder / exports.DATA / table.NAME
    if not path.is_file():
        if about.layout.table:
            yield f"{exports.MANIFEST} promises {exports.DATA}/{table.NAME}, which is missing"
        return told
    for name, record in table.read(path.parent):
        index = record.get("index")
        told[index] = name
        if expected.pop(index, "") != layouts.digest(record):
            yield f"{table.NAME}: the row of case {index} is not the one in {provenance.NAME}"
    yield from (f"{table.NAME} lacks case {index}" for index in expected)
    return told


def _line(facts: Mapping[str, Any], number: int, about: Exported, splits: dict[str, int]) -> Iterator[str]:
    if facts["split"] in splits:
        splits[facts["split"]] += 1
    for name in ("spec_sha256", "models", "versions"):
        if facts[name] != getattr(about.dataset, name):
            yield f"{provenance.NAME}, line {number}: {name} is not that of {exports.MANIFEST}"


def _provenance(folder: Path) -> Iterator[Mapping[str, Any]]:
    with (folder / provenance.NAME).open(encoding="ascii") as file:
        for line in file:
            yield json.loads(line)


def _croissant(folder: Path) -> Faults:
    yield from ()
    croissant.check(folder / croissant.NAME)
    return f"{croissant.NAME} is valid"


def _origin(folder: Path, path: Path, name: str) -> Faults:
    """Whether an export holds what the dataset around it has."""
    source, about = Generated.open(folder), Exported.read(path)
    if about.dataset != source.manifest:
        yield f"{name}: its manifest is not that of the dataset"
    with (path / provenance.NAME).open(encoding="ascii") as file:
        for case, line in zip(source.cases(), provenance.lines(source, about.layout), strict=True):
            if file.readline() != line:
                yield f"{name}: case {case.index} is not the dataset's"
        if file.read(1):
            yield f"{name} has cases that the dataset has not"
    source.close()
    return "its cases are those of the dataset"
