"""A dataset on the disk: its images by the hash of their bytes, its manifest, and what its journal tells."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.errors import InputError, NotFoundError
from diffalign.runs import disk_errors, flush_folder, write_text
from diffalign.synthesis.cases import Case, Manifest
from diffalign.synthesis.journal import PARTS, Attempt, Journal, Part

if TYPE_CHECKING:
    from PIL.Image import Image

MANIFEST, JOURNAL, SPEC, FILES = "manifest.json", "journal.sqlite", "spec.yaml", "files"


def unfinished(folder: Path) -> str:
    """What a command says of a dataset that has not come to its end: how to continue it by its own specification."""
    return f"{folder} is not finished: continue it with '{command_to_continue(folder)}'"


def command_to_continue(folder: Path) -> str:
    """What goes on with a dataset by the specification in its folder."""
    return f"diffalign generate {folder} --resume --out {folder}"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How a stratum was filled."""

    wanted: int
    """Cases that the specification asks for."""
    accepted: int
    """Cases that are there."""
    attempts: int
    """Attempts at its rows, each an image, a text, or both."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Images and texts that were rejected, by gate."""


class Files:
    """The images of a dataset: ``files/ab/HASH.png``, each written whole or not at all, and never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, data: bytes, mark: str = "") -> str:
        """Keeps the bytes and returns their hash; they are on the disk by then.

        ``mark`` keeps apart two processes that write the same bytes. The name of the file while it is written follows
        from both, so that what a killed process left is taken up by whoever does its work again.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256)
        part = path.with_name(f".{sha256}{mark}.part")
        if path.exists() and not part.exists():
            return sha256
        with disk_errors(f"cannot write {path}", path):
            for folder in (self.folder, path.parent):
                if not folder.exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    flush_folder(folder.parent)
            try:
                with part.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
                flush_folder(path.parent)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return sha256

    def get(self, sha256: str) -> bytes:
        """The bytes of that hash, checked."""
        path = self.path(sha256)
        if path.is_symlink() or path.parent.is_symlink():
            raise InputError(f"the file {sha256} of the dataset is a link, and links are not followed")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise NotFoundError(f"the dataset lacks its file {sha256}: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(f"the file {sha256} of the dataset was changed, or is damaged")
        return data

    def path(self, sha256: str) -> Path:
        """Where the bytes of that hash lie; refuses whatever is no hash."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise InputError(f"{sha256!r} is no SHA-256")
        return self.folder / sha256[:2] / f"{sha256}.png"


def png(image: Image) -> bytes:
    """A PNG of the pixels alone: 16-bit greyscale stays so, anything else is as ``images.png_bytes`` has it."""
    if image.mode.split(";")[0] != "I":
        from diffalign.images import png_bytes

        return png_bytes(image)
    from PIL import Image as pillow

    buffer = io.BytesIO()
    pillow.frombytes("I;16", image.size, image.convert("I;16").tobytes()).save(buffer, format="PNG")
    return buffer.getvalue()


def sha256_of(data: bytes) -> str:
    """SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def fault_of(data: bytes, image: Image) -> str:
    """Why a PNG is not the image, pixel by pixel; empty where it is."""
    from PIL import Image as pillow

    try:
        with pillow.open(io.BytesIO(data), formats=("PNG",)) as found:
            found.load()
            same = found.size == image.size and found.tobytes() == image.convert(found.mode).tobytes()
    except (OSError, SyntaxError, ValueError) as error:
        return f"it does not decode: {error}"
    return "" if same else "it does not decode to its own pixels"


def write_manifest(folder: Path, manifest: Manifest, *, complete: bool) -> None:
    """Writes ``manifest.json``; ``complete`` says that every case is there."""
    facts = {**asdict(manifest), "complete": complete}
    write_text(folder / MANIFEST, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> tuple[Manifest, bool]:
    """The manifest of a dataset, and whether the dataset is complete."""
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(f"{folder} is no dataset of diffalign: it has no {MANIFEST}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        complete = facts.pop("complete")
        return Manifest(**{**facts, "gates": tuple(facts["gates"])}), bool(complete)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not the manifest of a dataset: {error}") from None


class Generated:
    """A dataset that was generated, or as much of it as there is."""

    def __init__(self, folder: Path, manifest: Manifest, complete: bool, journal: Journal) -> None:
        self.folder, self.manifest, self.complete = folder, manifest, complete
        self.journal, self.files = journal, Files(folder / FILES)

    @classmethod
    def open(cls, folder: Path) -> Generated:
        """The dataset in a folder; raises NotFoundError or InputError where there is none."""
        return cls(folder, *read_manifest(folder), Journal(folder / JOURNAL))

    def close(self) -> None:
        """Lets go of the journal."""
        self.journal.close()

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a case has: an image, a text, or both."""
        return tuple(part for part in PARTS if self.manifest.models.get(part))

    def cases(self) -> Iterator[Case]:
        """The cases that are whole, by index, one at a time."""
        joined = " ".join(
            f"LEFT JOIN attempt {part} ON {part}.row = row.number AND {part}.part = '{part}' AND {part}.gate IS NULL"
            f" AND {part}.attempt < :closed"
            for part in PARTS
        )
        columns = ", ".join(f"{part}.seed, {part}.attempt, {part}.scores" for part in PARTS)
        query = (
            "SELECT row.number, row.id, row.cells, row.stratum, row.split, row.prompt, row.text_prompt, image.image,"
            f" text.text, {columns} FROM row {joined} ORDER BY row.number"
        )
        query = query.replace(":closed", str(self.journal.rounds()))
        for number, name, cells, stratum, split, prompt, text_prompt, image, text, *made in self.journal.read(query):
            known = {"image": made[:3], "text": made[3:]}
            if any(known[part][0] is None for part in self.parts):
                continue
            scores: dict[str, float] = {}
            provenance: dict[str, Any] = {}
            for part in self.parts:
                seed, attempt, scored = known[part]
                scores |= json.loads(scored)
                mark = "" if part == self.parts[0] else f"{part}_"
                provenance |= {f"{mark}seed": seed, f"{mark}attempt": attempt}
            if text_prompt:
                provenance["text_prompt"] = text_prompt
            yield Case(number, name, json.loads(cells), stratum, split, prompt, image, text, scores, provenance)

    def image(self, sha256: str) -> bytes:
        """The PNG of that hash, checked."""
        return self.files.get(sha256)

    def attempts(self) -> Iterator[Attempt]:
        """Every attempt, accepted or not, by row."""
        return self.journal.attempts()

    def ranges(self, column: Literal["cells", "scores"]) -> dict[str, tuple[float, float]]:
        """The lowest and the highest of the numbers in each column of the rows, or of each score of all attempts."""
        table = "row" if column == "cells" else "attempt"
        query = (
            f"SELECT key, min(value), max(value) FROM {table}, json_each({table}.{column})"
            " WHERE type IN ('integer', 'real') GROUP BY key"
        )
        return {name: (float(low), float(high)) for name, low, high in self.journal.read(query)}

    def reasons(self, most: int) -> dict[str, list[tuple[str, int]]]:
        """What each gate rejected most often, in its words, and how often; by gate, ``most`` of each."""
        found: dict[str, list[tuple[str, int]]] = {}
        query = (
            "SELECT gate, reason, count(*) AS number FROM attempt WHERE gate IS NOT NULL GROUP BY gate, reason"
            " ORDER BY gate, number DESC, reason"
        )
        for gate, reason, number in self.journal.read(query):
            if len(known := found.setdefault(gate, [])) < most:
                known.append((reason, number))
        return found

    def different(self, part: Part) -> int:
        """How many of the accepted images, or texts, are different ones."""
        query = f"SELECT count(DISTINCT {part}) FROM attempt WHERE part = ? AND gate IS NULL"
        return int(next(self.journal.read(query, (part,)))[0])

    def acceptance(self) -> dict[str, Acceptance]:
        """How each stratum was filled, in the order of the specification."""
        return acceptance(self.journal, self.manifest.strata, self.parts)


def acceptance(journal: Journal, wanted: Mapping[str, int], parts: tuple[Part, ...]) -> dict[str, Acceptance]:
    """How each stratum was filled, as the closed rounds tell."""
    closed = journal.rounds()
    both = " AND ".join(
        f"EXISTS (SELECT 1 FROM attempt WHERE row = number AND part = '{part}' AND gate IS NULL AND attempt < {closed})"
        for part in parts
    )
    whole = dict(journal.read(f"SELECT stratum, count(*) FROM row WHERE {both} GROUP BY stratum"))
    tried = dict(
        journal.read(
            "SELECT stratum, count(DISTINCT row * 1000 + attempt) FROM attempt JOIN row ON row = number"
            f" WHERE attempt < {closed} GROUP BY stratum"
        )
    )
    rejected: dict[str, dict[str, int]] = {}
    for stratum, gate, count in journal.read(
        "SELECT stratum, gate, count(*) FROM attempt JOIN row ON row = number"
        f" WHERE gate IS NOT NULL AND attempt < {closed} GROUP BY stratum, gate ORDER BY stratum, gate"
    ):
        rejected.setdefault(stratum, {})[gate] = count
    return {
        stratum: Acceptance(count, whole.get(stratum, 0), tried.get(stratum, 0), rejected.get(stratum, {}))
        for stratum, count in wanted.items()
    }
