r"""Traces of the machine that a dataset was made on: absolute paths, names of the user and of the host.

Paths are looked for everywhere. So is the name of the user or of the host where it is distinctive; a short or an
everyday one, such as ``will``, stands in ordinary sentences and, by chance, in pixels: it counts only in texts, and
there only where programs write it: in a path, or beside an ``@``.
"""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20
OVERLAP = 512
DISTINCTIVE = 6
"""Characters from which on a name is looked for everywhere."""
EVERYDAY = {"debian", "docker", "nobody", "runner", "server", "ubuntu", "localhost", "localhost.localdomain"}
"""Long names that tell nothing of a machine."""
BINARY = {".dcm", ".parquet", ".png", ".sqlite", ".tar"}
AROUND = 128
"""Bytes before and after the fixed part of a trace that its expression looks at."""
_FOLDERS = (
    b"home", b"Users", b"root", b"tmp", b"private", b"var", b"mnt", b"opt", b"srv", b"media", b"Volumes", b"work",
    b"workspace", b"workspaces", b"scratch", b"data", b"nfs", b"lustre", b"gpfs",
)  # fmt: skip

Wanted = tuple[bytes, re.Pattern[bytes]]
"""A fixed part of a trace, and the whole of it: to look for the former first is faster by far."""


@dataclass(frozen=True)
class Traces:
    """What tells of a machine."""

    everywhere: tuple[Wanted, ...]
    in_texts: tuple[Wanted, ...]

    def of_text(self, text: str) -> str | None:
        """The first trace in a text, or None."""
        return _found(text.encode("utf-8", errors="replace"), (*self.everywhere, *self.in_texts))

    def of_file(self, path: Path) -> str | None:
        """The first trace in the bytes of a file, or None; a piece of the file is in memory at a time."""
        wanted = self.everywhere if path.suffix in BINARY else (*self.everywhere, *self.in_texts)
        with path.open("rb") as file:
            before = b""
            while piece := file.read(CHUNK):
                data = before + piece
                if found := _found(data, wanted):
                    return found
                before = data[-OVERLAP:]
        return None


def of_this_machine() -> Traces:
    """What tells of the machine and the user that run this."""
    names = sorted(_names())
    return Traces(
        (*_places(), *(_word(name) for name in names if _distinctive(name))),
        (*_shares(), *(form for name in names if not _distinctive(name) for form in _written(name))),
    )


def _found(data: bytes, wanted: tuple[Wanted, ...]) -> str | None:
    for fixed, whole in wanted:
        at = data.find(fixed)
        while at >= 0:
            if match := whole.search(data, max(0, at - AROUND), at + len(fixed) + AROUND):
                return match[0].decode("utf-8", errors="replace")
            at = data.find(fixed, at + 1)
    return None


def _places() -> Iterator[Wanted]:
    for folder in _FOLDERS:
        yield b"/" + folder + b"/", re.compile(rb"(?<![\w.~/-])/" + folder + rb"/[\w.-]")
    yield b"file:/", re.compile(rb"(?<![A-Za-z])file:/{1,3}[\w.-]")
    home = str(Path.home()).encode()
    if len(home) > 1:
        yield home, re.compile(rb"(?<![\w.~/-])" + re.escape(home) + rb"[\\/][\w.-]")
    yield b"Users", re.compile(rb"(?<![A-Za-z0-9])[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2}[\w.-]")
    # A backslash before a small letter may be an escape of JSON, as in "A:\nleft"; a doubled one is none.
    yield b":\\", re.compile(rb"(?<![A-Za-z0-9])[A-Z]:(?:\\\\\w|\\[A-Z0-9_~$])[\w .\\-]{5,}")


def _shares() -> Iterator[Wanted]:
    """Folders of a Windows server, as they are and as JSON writes them; pixels may look so by chance."""
    yield b"\\\\", re.compile(rb"(?<![\w\\])\\\\[A-Za-z0-9][\w.-]+\\[\w$]")
    yield b"\\" * 4, re.compile(rb"(?<![\w\\])\\{4}[A-Za-z0-9][\w.-]+\\\\[\w$]")


def _distinctive(name: str) -> bool:
    return len(name) >= DISTINCTIVE and name not in EVERYDAY


def _word(name: str) -> Wanted:
    fixed = name.encode()
    return fixed, re.compile(rb"(?<![A-Za-z0-9_])" + re.escape(fixed) + rb"(?![A-Za-z0-9_])")


def _written(name: str) -> Iterator[Wanted]:
    fixed = name.encode()
    escaped = re.escape(fixed)
    yield fixed, re.compile(rb"[\w.-][\\/]" + escaped + rb"[\\/][\w.-]")
    yield fixed + b"@", re.compile(rb"(?<![\w.-])" + escaped + rb"@[\w-]")
    yield b"@" + fixed, re.compile(rb"[\w-]@" + escaped + rb"(?![\w-])")


def _names() -> set[str]:
    """The user, and the host with and without its domain."""
    host = socket.gethostname()
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no entry among the users, as in some containers
        user = ""
    return {name for name in (user, host, host.partition(".")[0]) if len(name) > 1}
