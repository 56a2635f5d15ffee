"""WebDataset: ``data/SPLIT-NNNNN-of-NNNNN.tar`` with ``KEY.png``, ``KEY.json`` (the record) and ``KEY.txt`` (the text).

``data/metadata.parquet`` is a table of all cases that names the tar file of each, for programs that read no tar files.

No member is a pickle, and the tar files have no time, user or mode of the machine in them. A case without a text has no
``txt`` member, so that an empty text and none at all are told apart.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from diffalign.errors import InputError
from diffalign.synthesis.cases import Case
from diffalign.synthesis.exports import table
from diffalign.synthesis.exports.layout import Layout, Record, as_text, shards
from diffalign.synthesis.exports.pixels import Pixels, of_png
from diffalign.synthesis.store import Generated


def write(source: Generated, layout: Layout, folder: Path) -> None:
    """Writes the files of a dataset into a folder."""
    with table.writer(folder, layout) as add:
        for name, cases in shards(source, layout):
            _shard(source, layout, folder / f"{name}.tar", cases, add)


def _shard(
    source: Generated, layout: Layout, path: Path, cases: Iterator[Case], add: Callable[[Case, str], None]
) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for case in cases:
            add(case, path.name)
            for suffix, data in _members(source, layout, case):
                member = tarfile.TarInfo(f"{_key(case.index)}.{suffix}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def located(folder: Path, layout: Layout) -> Iterator[tuple[str, Record, Pixels | None]]:
    """Every record and its pixels, with the file below ``data/`` that they are in.

    Raises InputError where that is not the place of the case.
    """
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            key, members = "", dict[str, bytes]()
            for member in tar:
                name, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                if suffix not in ("png", "json", "txt") or file is None or "/" in name:
                    raise InputError(f"{path.name} holds {member.name[:80]!r}, which is not png, json or txt")
                if members and name != key:
                    yield path.name, *_case(path.name, key, members, layout)
                    members = {}
                key, members[suffix] = name, file.read()
            if members:
                yield path.name, *_case(path.name, key, members, layout)


def _members(source: Generated, layout: Layout, case: Case) -> Iterator[tuple[str, bytes]]:
    record = layout.record(case)
    text = record.pop("text", None)
    if case.image is not None:
        yield "png", source.image(case.image)
    yield "json", as_text(record).encode("ascii")
    if isinstance(text, str):
        yield "txt", text.encode("utf-8")


def _key(index: int) -> str:
    return f"{index:08d}"


def _case(shard: str, key: str, members: dict[str, bytes], layout: Layout) -> tuple[Record, Pixels | None]:
    record = json.loads(members["json"])
    if key != _key(record["index"]) or not shard.startswith(f"{record['split']}-"):
        raise InputError(f"case {record['index']} is {key[:80]!r} in {shard}, which is not where an export has it")
    if layout.texts:
        record["text"] = members["txt"].decode("utf-8") if "txt" in members else None
    return record, of_png(members["png"]) if "png" in members else None
