"""``SHA256SUMS``: the hash of every file of a folder, in the form that ``sha256sum -c`` reads.

The list is sorted by name and has one form only, so a change in the list itself is found too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffalign.errors import InputError, NotFoundError
from diffalign.runs import write_text

NAME = "SHA256SUMS"
APART = "export"
"""Folder of a dataset that holds what is handed out; each export has a list of its own."""
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\\]+)")


def write(folder: Path) -> None:
    """Lists every file below the folder but the list itself and what is in ``export/``."""
    _write(folder, {name: of_file(folder / name) for name in files(folder)})


def add(folder: Path, *names: str) -> None:
    """Takes files that were added or replaced into the list; the hashes of all others stay as they are listed."""
    _write(folder, {**read(folder), **{name: of_file(folder / name) for name in names}})


def read(folder: Path) -> dict[str, str]:
    """The list: hash by name. Raises NotFoundError or InputError where there is none, or where it was changed."""
    path = folder / NAME
    if not path.is_file():
        raise NotFoundError(f"{NAME} is missing")
    data = path.read_bytes()
    text = data.decode("utf-8", errors="replace")
    listed = {match[2]: match[1] for line in text.splitlines() if (match := _LINE.fullmatch(line))}
    if _text(listed).encode() != data:
        raise InputError(f"{NAME} is not a list in the order and form in which it is written")
    return listed


def faults(folder: Path) -> Iterator[str]:
    """What is missing, extra or changed, a sentence for each file."""
    listed, present = read(folder), set(files(folder))
    for name in sorted(listed.keys() | present):
        if name not in present:
            yield f"{name} is listed in {NAME} but missing"
        elif name not in listed:
            yield f"{name} is not listed in {NAME}"
        elif (folder / name).is_symlink():
            yield f"{name} is a link, not a file"
        elif of_file(folder / name) != listed[name]:
            yield f"{name} was changed: its hash is not the one in {NAME}"


def files(folder: Path) -> Iterator[str]:
    """Every file and link below a folder but the list itself and ``export/``; links are not followed."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not (here == folder and name == APART) and name not in links)
        for name in sorted([*names, *links]):
            if not (here == folder and name == NAME):
                yield (here / name).relative_to(folder).as_posix()


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, listed: Mapping[str, str]) -> None:
    write_text(folder / NAME, _text(listed))


def _text(listed: Mapping[str, str]) -> str:
    return "".join(f"{listed[name]}  {name}\n" for name in sorted(listed))
