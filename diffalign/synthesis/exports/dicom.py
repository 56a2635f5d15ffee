"""DICOM Secondary Capture, marked synthetic: ``data/SPLIT/NNNNN/NNNNNNNN.dcm``, one patient and study for each case.

``data/metadata.parquet`` is a table of all cases that names their files, for programs that read no DICOM.

Where the standard has a place, that is used: the text is the image comments, the row is the acquisition context, and
``sex`` and ``age`` (in years) of a row stand for the patient too. DICOM texts are limited in length and characters, and
its decimals in digits; so the whole record stands, exact, as JSON in a private element (0071,xx01) as well. The side of
a lesion is not the laterality of a body part, and no column is taken for that.

No element comes from a scanner or a clock, and identifiers follow from the specification's hash and the case's id. Of
rows that were drawn from axes there is nothing to de-identify; those of a table that was given are not de-identified
here, and the file says so.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffalign.errors import InputError
from diffalign.synthesis.cases import Case, Manifest, Value
from diffalign.synthesis.exports import table
from diffalign.synthesis.exports.layout import Layout, Record, as_text, need_images, place, stated
from diffalign.synthesis.exports.pixels import Pixels, grey, of_png, without_needless_colour
from diffalign.synthesis.store import Generated

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CREATOR, GROUP, RECORD = "DIFFALIGN", 0x0071, 0x01
SCHEME = "99DIFFALIGN"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "diffalign")
_SEXES = {"m": "M", "male": "M", "f": "F", "female": "F", "o": "O", "other": "O"}
_LONGEST_COMMENT, _LONGEST_WORDS = 10240, 64
_UNFIT = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
"""Control characters that no DICOM text may have."""


def write(source: Generated, layout: Layout, folder: Path) -> None:
    """Writes a file for each case."""
    need_images(layout, "dicom")
    with table.writer(folder, layout) as add:
        for case in source.cases():
            assert case.image is not None
            name = f"{case.split}/{place(case.index, '.dcm')}"
            pixels = of_png(source.image(case.image))
            pixels = grey(pixels, f"case {case.index}") if layout.grey else without_needless_colour(pixels)
            made = dataset(case, layout.record(case), pixels, source.manifest, derived=layout.grey)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            made.save_as(folder / name, enforce_file_format=True)
            add(case, name)


def located(folder: Path, layout: Layout) -> Iterator[tuple[str, Record, Pixels | None]]:
    """Every record and its pixels, with the file below ``data/`` that they are in.

    Raises InputError where that is not the place of the case.
    """
    from pydicom import dcmread

    for split in layout.splits:
        for path in sorted((folder / split).rglob("*.dcm")):
            found = dcmread(path)
            if found.get("SyntheticData") != "YES":
                raise InputError(f"{split}/{path.name} is not marked as synthetic data")
            record = json.loads(found.private_block(GROUP, CREATOR)[RECORD].value)
            name = path.relative_to(folder).as_posix()
            stated(name.removeprefix(f"{record['split']}/"), record["index"], ".dcm")
            yield name, record, found.pixel_array


def dataset(case: Case, record: Record, pixels: Pixels, manifest: Manifest, *, derived: bool = False) -> Dataset:
    """One case as a DICOM dataset; ``derived`` says that its pixels are the luminance of the image that was made."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    model = manifest.models.get("image") or {}
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SpecificCharacterSet = "ISO_IR 192"
    made.ImageType = ["DERIVED", "SECONDARY"]
    made.SOPClassUID = SecondaryCaptureImageStorage
    made.SyntheticData = "YES"
    made.Modality, made.ConversionType = "OT", "SYN"
    made.Manufacturer = "diffalign"
    told = "; the pixels are the luminance of its colour image" if derived else ""
    made.DerivationDescription = _words(f"Made by the model {model.get('name', '')}; nothing was acquired{told}", 1024)
    made.StudyDescription, made.SeriesDescription = _words(manifest.name), _words(case.stratum)
    made.BurnedInAnnotation, made.LossyImageCompression = "NO", "00"
    for level in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(made, level, uid(manifest.spec_sha256, case.id, level))
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.SeriesNumber, made.InstanceNumber = 1, 1
    for empty in ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"):
        setattr(made, empty, "")
    made.PatientOrientation = ""
    _patient(made, case, manifest)
    if case.text is not None and len(case.text) <= _LONGEST_COMMENT and not _UNFIT.search(case.text):
        made.ImageComments = case.text
    _context(made, record)
    _pixels(made, pixels)
    made.private_block(GROUP, CREATOR, create=True).add_new(RECORD, "UT", as_text(record))
    return made


def uid(spec_sha256: str, name: str, level: str) -> str:
    """An identifier that follows from what it names, in the form that needs no registration (PS3.5, B.2)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps([spec_sha256, name, level])).int}"


def _patient(made: Dataset, case: Case, manifest: Manifest) -> None:
    made.PatientID = name = _words(case.id)
    made.PatientName, made.PatientBirthDate = f"SYNTHETIC^{name}"[:_LONGEST_WORDS], ""
    made.PatientSex = _SEXES.get(str(case.row.get("sex")).lower(), "")
    age = case.row.get("age")
    if isinstance(age, int) and not isinstance(age, bool) and 0 <= age <= 999:
        made.PatientAge = f"{age:03d}Y"
    if manifest.rows_from == "axes":
        made.PatientIdentityRemoved, made.DeidentificationMethod = "YES", "Synthetic: there is no patient"
    else:
        made.PatientIdentityRemoved = "NO"


def _context(made: Dataset, record: Record) -> None:
    """The prompt and the row as content items of the Acquisition Context Module; what it cannot hold is left out."""
    row = {name: value for name, value in record.items() if name not in ("id", "index", "split", "stratum", "text")}
    items = (_item(number, name, value) for number, (name, value) in enumerate(row.items()))
    made.AcquisitionContextSequence = [item for item in items if item is not None]


def _item(number: int, name: str, value: Value) -> Dataset | None:
    from pydicom.dataset import Dataset
    from pydicom.valuerep import DSfloat

    if value is None or value == "" or (isinstance(value, str) and _UNFIT.search(value)):
        return None
    item = Dataset()
    item.ConceptNameCodeSequence = [_code(f"COLUMN-{number}", SCHEME, _words(name) or f"column {number}")]
    if isinstance(value, bool | str):
        item.ValueType = "TEXT"
        item.TextValue = value if isinstance(value, str) else str(value).lower()
    else:
        item.ValueType = "NUMERIC"
        item.NumericValue, item.FloatingPointValue = DSfloat(float(value), auto_format=True), float(value)
        item.MeasurementUnitsCodeSequence = [_code("1", "UCUM", "no units")]
    return item


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    from pydicom.dataset import Dataset

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _pixels(made: Dataset, pixels: Pixels) -> None:
    bits = pixels.dtype.itemsize * 8
    photometric = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    made.set_pixel_data(np.ascontiguousarray(pixels), photometric, bits, generate_instance_uid=False)
    if pixels.ndim == 2:
        # All levels are shown, from the lowest to the highest that the type has: nothing is known to be better.
        made.WindowCenter, made.WindowWidth = 2 ** (bits - 1), 2**bits


def _words(text: str, longest: int = _LONGEST_WORDS) -> str:
    """A short text without what DICOM takes for the end of a value, cut where it is too long."""
    return " ".join(_UNFIT.sub(" ", text).replace("\\", "/").split())[:longest]
