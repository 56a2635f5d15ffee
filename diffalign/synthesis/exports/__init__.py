"""What is handed out of a dataset: a folder that explains itself and holds everything needed to check it.

::

    EXPORT/data/             the cases, in one of five formats
    EXPORT/README.md         the dataset card
    EXPORT/croissant.json    the same for machines (Croissant)
    EXPORT/provenance.jsonl  how each case came to be
    EXPORT/manifest.json     the dataset's manifest, the layout, and what the privacy report said
    EXPORT/SHA256SUMS        the hash of every file

The same dataset gives the same bytes. No file is named by a text of the dataset, the names of its splits aside.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.runs import new_folder, require_empty
from diffalign.synthesis import release, sums, traces
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.exports.layout import Layout, Record, survey
from diffalign.synthesis.exports.pixels import Pixels
from diffalign.synthesis.store import Generated

FORMATS = {
    "parquet": "diffalign.synthesis.exports.parquet",
    "imagefolder": "diffalign.synthesis.exports.image_folder",
    "webdataset": "diffalign.synthesis.exports.webdataset",
    "dicom": "diffalign.synthesis.exports.dicom",
    "png": "diffalign.synthesis.exports.png",
}
"""The module of each format: ``write(source, layout, folder)`` and ``located(folder, layout)``."""
DATA, MANIFEST, CARD, CROISSANT = "data", "manifest.json", "README.md", "croissant.json"


@dataclass(frozen=True)
class Exported:
    """What ``manifest.json`` of an export says."""

    form: str
    dataset: Manifest
    layout: Layout
    release: release.Release

    def as_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "format": self.form,
            "dataset": asdict(self.dataset),
            "layout": self.layout.as_json(),
            "privacy": self.release.as_json(),
        }

    @classmethod
    def read(cls, folder: Path) -> Exported:
        """The manifest of the export in a folder; InputError where it is none."""
        try:
            facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if facts["format"] not in FORMATS:
                raise InputError(f"there is no format {facts['format']!r}")
            dataset = Manifest(**{**facts["dataset"], "gates": tuple(facts["dataset"]["gates"])})
            return cls(facts["format"], dataset, Layout.from_json(facts["layout"]), release.Release(**facts["privacy"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{MANIFEST} is not the manifest of an export: {error}") from None


def export(source: Generated, form: str, out: Path, *, allow_unsafe: bool = False, grey: bool = False) -> Path:
    """Writes a dataset in a format to a new or empty folder, whole or not at all, and returns the folder.

    ``grey`` makes images of three channels grey, for DICOM: models that make grey pictures in colour leave a few levels
    of noise between the channels.

    Raises RefusedError for a dataset that is not finished or did not pass its privacy report (``allow_unsafe`` lets it
    out, and the card says so), and for what the format cannot hold; InputError for cases that no format can.
    """
    if form not in FORMATS:
        raise ConfigError(f"there is no format {form!r}; there are {', '.join(FORMATS)}")
    if grey and form != "dicom":
        raise ConfigError(f"--grey is for dicom; {form} holds the images as they were made")
    from diffalign.synthesis import card, croissant, provenance
    from diffalign.synthesis.exports.table import BESIDE

    require_empty(out, "choose another --out")
    released = release.gate(source.folder, allow_unsafe=allow_unsafe)
    layout = replace(survey(source), grey=grey, table=form in BESIDE)
    about = Exported(form, source.manifest, layout, released)
    with new_folder(out) as folder:
        (folder / DATA).mkdir()
        _write(form)(source, layout, folder / DATA)
        provenance.write(source, layout, folder / provenance.NAME)
        (folder / MANIFEST).write_text(json.dumps(about.as_json(), indent=2) + "\n", encoding="ascii")
        (folder / CARD).write_text(card.text(about, source.acceptance()), encoding="utf-8")
        croissant.write(about, folder)
        machine = traces.of_this_machine()
        for name in sums.files(folder):
            if trace := machine.of_file(folder / name):
                raise RefusedError(f"{name} of the export would name a place of a machine or a user ({trace!r})")
        sums.write(folder)
    return out


def read(folder: Path, about: Exported) -> Iterator[tuple[Record, Pixels | None]]:
    """Every record of an export and its pixels, in the order of its files."""
    return ((record, pixels) for _, record, pixels in located(folder, about))


def located(folder: Path, about: Exported) -> Iterator[tuple[str, Record, Pixels | None]]:
    """As ``read``, with the name of the file below ``data/`` that each was found in."""
    module = importlib.import_module(FORMATS[about.form])
    found: Iterator[tuple[str, Record, Pixels | None]] = module.located(folder / DATA, about.layout)
    return found


def _write(form: str) -> Callable[[Generated, Layout, Path], None]:
    function: Callable[[Generated, Layout, Path], None] = importlib.import_module(FORMATS[form]).write
    return function
