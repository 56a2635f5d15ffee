"""``croissant.json``: the dataset described for machines (Croissant 1.0, with its fields for responsible AI).

The library ``mlcroissant`` makes and checks it, and reads the record sets ``cases`` and ``provenance`` of every export;
with images, in Parquet.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import InputError
from diffalign.synthesis import card, provenance, sums
from diffalign.synthesis.exports import table
from diffalign.synthesis.exports.layout import Kind

if TYPE_CHECKING:
    import mlcroissant

    from diffalign.synthesis.exports import Exported

NAME = "croissant.json"
_TABLES: Mapping[str, tuple[str, str]] = {
    "parquet": ("data/*.parquet", "application/x-parquet"),
    "imagefolder": ("data/*/metadata.parquet", "application/x-parquet"),
    "png": ("data/rows.csv", "text/csv"),
    "webdataset": (f"data/{table.NAME}", "application/x-parquet"),
    "dicom": (f"data/{table.NAME}", "application/x-parquet"),
}
"""What holds the records, and its type."""
_FILES: Mapping[str, tuple[str, str]] = {
    "imagefolder": ("data/*/*/*.png", "image/png"),
    "png": ("data/images/*/*.png", "image/png"),
    "webdataset": ("data/*.tar", "application/x-tar"),
    "dicom": ("data/*/*/*.dcm", "application/dicom"),
}
_TYPES: Mapping[Kind, str] = {"string": "TEXT", "int64": "INTEGER", "float64": "FLOAT", "bool": "BOOL"}


def write(about: Exported, folder: Path) -> None:
    """Writes the description of an export whose provenance is there already."""
    (folder / NAME).write_text(json.dumps(describe(about, folder), indent=2) + "\n", encoding="ascii")


def check(path: Path) -> None:
    """Raises InputError where ``mlcroissant`` finds the description wrong."""
    import mlcroissant

    try:
        mlcroissant.Dataset(jsonld=json.loads(path.read_text(encoding="utf-8")))
    # The library reports what is wrong by errors of many kinds, its own and Python's.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path.name} is not valid Croissant: {reason[:300]}") from error


def describe(about: Exported, folder: Path) -> dict[str, Any]:
    """The description as JSON-LD."""
    import mlcroissant as mlc

    lineage = mlc.FileObject(
        id="provenance-file", name=provenance.NAME, content_url=provenance.NAME,
        encoding_formats=["application/jsonlines"], sha256=sums.of_file(folder / provenance.NAME),
        description="How each case came to be, one object per line.",
    )  # fmt: skip
    sets = [
        mlc.FileSet(id=name, name=name, description=f"The {name} of the cases.", encoding_formats=[kind], includes=[at])
        for name, known in (("table", _TABLES), ("files", _FILES))
        for at, kind in ([known[about.form]] if about.form in known else [])
    ]
    origin = mlc.Source(file_object="provenance-file", extract=mlc.Extract(column="id"))
    listed = mlc.RecordSet(
        id="provenance", name="provenance", description="One record per case.",
        fields=[mlc.Field(id="provenance/id", name="id", description="The case.", data_types=[mlc.DataType.TEXT],
                          source=origin)],
    )  # fmt: skip
    made: dict[str, Any] = mlc.Metadata(
        name=about.dataset.name,
        description=f"Synthetic cases made with diffalign: {sum(about.layout.splits.values())} in all.",
        license=sorted(set(provenance.licences(about.dataset).values())),
        date_published=datetime.datetime.fromisoformat(about.dataset.created),
        cite_as=f"{about.dataset.name}: synthetic dataset made with diffalign, begun {about.dataset.created}",
        version="1.0.0",
        distribution=[lineage, *sets],
        record_sets=[_cases(about), listed],
        **_responsibly(about),
    ).to_json()
    plain: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return plain


def _cases(about: Exported) -> mlcroissant.RecordSet:
    import mlcroissant as mlc

    columns = dict(about.layout.kinds)
    if about.form != "parquet":
        columns[table.FILE] = "string"
    fields = [
        mlc.Field(
            # A column's name may hold what an identifier cannot.
            id=f"cases/{number}", name=f"column-{number}", description=name,
            data_types=[getattr(mlc.DataType, _TYPES[kind])],
            source=mlc.Source(file_set="table", extract=mlc.Extract(column=name)),
        )
        for number, (name, kind) in enumerate(columns.items())
    ]  # fmt: skip
    if about.form == "parquet" and about.layout.images:
        image = mlc.Source(
            file_set="table", extract=mlc.Extract(column="image"), transforms=[mlc.Transform(json_path="bytes")]
        )
        fields.append(
            mlc.Field(
                id="cases/image", name="image", description="The image.", source=image,
                data_types=[mlc.DataType.IMAGE_OBJECT],
            )
        )  # fmt: skip
    return mlc.RecordSet(id="cases", name="cases", description="One record per case.", fields=fields)


def _responsibly(about: Exported) -> dict[str, Any]:
    """The fields for responsible AI; the card says the same at greater length."""
    judges = [f"{name} ({facts.get('unit', '')})" for name, facts in about.dataset.rewards.items()]
    texts = card.TEXTS if about.layout.texts and about.release.verdict == "passed" else ""
    privacy = f"Privacy report: {about.release.verdict}{texts}. {about.release.why}"
    persons = card.PERSONS.get(about.dataset.rows_from, card.PERSONS["unknown"]).replace("*", "")
    return {
        "data_collection": "A model made every image and text from a row of a specification. " + persons,
        "data_collection_type": ["Synthetic generation"],
        "data_annotation_protocol": ["A row says what its image and text were asked to show; gates checked it."],
        "machine_annotation_tools": judges,
        "data_biases": ["Inherits those of the models and of the data on which they were trained."],
        "data_limitations": ["A gate can be wrong; not everything in an image was asked for, or checked."],
        "data_use_cases": ["Training and testing of methods, beside real data."],
        "personal_sensitive_information": [
            f"{persons} Synthetic data are not automatically anonymous.",
            privacy,
        ],
        "data_social_impact": "Not for diagnosis, nor for any decision about a person.",
    }
