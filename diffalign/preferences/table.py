"""The native form of preferences: one Parquet file that holds everything, images included.

=========================  =====================  =============================================================
column                     type                   what it is
=========================  =====================  =============================================================
prompt                     string                 the text
prompt_id                  string                 stable name of the prompt; empty: the text is the id
attributes                 string                 JSON object: the table row behind the text
negative                   string                 negative text
first, second              struct {bytes, path}   images: PNG without metadata, and null
first_text, second_text    string                 texts, instead of images
label                      double                 probability that the first is preferred; a tie is 0.5
strength                   double                 0 or more; 1 is an ordinary judgement
criterion                  string                 what was judged
rater                      string                 who judged
provenance                 string                 JSON object: where the pair came from
=========================  =====================  =============================================================

A file holds images or texts, not both. Only ``prompt``, ``label`` and the two sides have to be there. Hugging Face
``datasets`` reads the file as it is and shows the images (``load_dataset("parquet", data_files=...)``). A sample's
seed and evidence are not kept: what should be known of them belongs into ``provenance``.

Rows stand in groups of at most 64 rows or 32 MB, so that writing and random access both need little memory. An image
that occurs in many pairs of a group is stored once there.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Image

from diffalign import parquet
from diffalign.errors import InputError
from diffalign.images import png_bytes
from diffalign.preferences import cells, formats
from diffalign.preferences.rows import Broken
from diffalign.preferences.splitting import group
from diffalign.runs import new_file
from diffalign.types import Modality, Preference, Prompt

GROUP_ROWS = 64
GROUP_BYTES = 2**25
CACHED_GROUPS = 2
SIDES: Mapping[Modality, tuple[str, str]] = {"image": ("first", "second"), "text": ("first_text", "second_text")}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema(modality: Modality) -> pa.Schema:
    """The columns of a file, with what Hugging Face ``datasets`` needs to know about them."""
    side = _IMAGE if modality == "image" else pa.string()
    types = dict.fromkeys(("prompt", "prompt_id", "attributes", "negative"), pa.string())
    types |= dict.fromkeys(SIDES[modality], side)
    types |= dict.fromkeys(("label", "strength"), pa.float64())
    types |= dict.fromkeys(("criterion", "rater", "provenance"), pa.string())
    kinds = {pa.string(): {"dtype": "string", "_type": "Value"}, pa.float64(): {"dtype": "float64", "_type": "Value"}}
    features = {name: kinds.get(kind, {"_type": "Image"}) for name, kind in types.items()}
    return pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def write(path: str | Path, preferences: Iterable[Preference]) -> int:
    """Writes a file, whole or not at all, while the preferences come in; returns how many there were.

    The file's metadata say how many rows there are and how many of these are marked as simulated (``diffalign``).
    """
    path = Path(path)
    rest = iter(preferences)
    first = next(rest, None)
    if first is None:
        raise InputError(f"there is no preference to write to {path}")
    modality: Modality = "text" if first.first.image is None else "image"
    form = schema(modality)
    count = simulated = 0
    with (
        new_file(path) as temporary,
        pq.ParquetWriter(
            temporary, form, compression="zstd", dictionary_pagesize_limit=GROUP_BYTES, write_statistics=["label"]
        ) as writer,
    ):
        for rows in _groups(chain([first], rest), modality):
            try:
                writer.write_table(pa.Table.from_pylist(rows, form))
            except UnicodeEncodeError as error:
                raise InputError(f"a text is no Unicode text, so it cannot be written: {error}") from None
            count += len(rows)
            simulated += sum(bool(json.loads(row["provenance"]).get("simulated")) for row in rows)
        writer.add_key_value_metadata({"diffalign": json.dumps({"rows": count, "simulated": simulated})})
    return count


def _groups(preferences: Iterable[Preference], modality: Modality) -> Iterator[list[dict[str, Any]]]:
    """Rows in groups that fit into memory. Within a group an image is encoded once, however often it occurs."""
    rows: list[dict[str, Any]] = []
    encoded: dict[int, tuple[Image, bytes]] = {}
    size = 0
    for number, preference in enumerate(preferences):
        row = _row(preference)
        for column, sample in zip(SIDES[modality], (preference.first, preference.second), strict=True):
            value = sample.image if modality == "image" else sample.text
            if value is None:
                raise InputError(f"preference {number} lacks its {modality}; a file holds images or texts, not both")
            if isinstance(value, str):
                row[column] = value
                size += len(value)
                continue
            # The image is kept beside its bytes, so that no other one gets its id meanwhile.
            _, data = encoded.setdefault(id(value), (value, b""))
            if not data:
                data = png_bytes(value)
                encoded[id(value)] = value, data
            row[column] = {"bytes": data, "path": None}
            size += len(data)
        rows.append(row)
        if len(rows) == GROUP_ROWS or size >= GROUP_BYTES:
            yield rows
            rows, encoded, size = [], {}, 0
    if rows:
        yield rows


def _row(preference: Preference) -> dict[str, Any]:
    return {
        "prompt": preference.prompt.text,
        "prompt_id": preference.prompt.id,
        "attributes": _json(preference.prompt.attributes, "attributes"),
        "negative": preference.prompt.negative,
        "label": float(preference.label),
        "strength": float(preference.strength),
        "criterion": preference.criterion,
        "rater": preference.rater,
        "provenance": _json(preference.provenance, "provenance"),
    }


def _json(value: Mapping[str, object], column: str) -> str:
    try:
        return json.dumps(dict(value))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{column} cannot be written as JSON: {error}; use texts, numbers, lists and mappings"
        ) from None


class Table:
    """A native file: ``len``, random access by number, iteration. An image is decoded when its row is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = parquet.open_file(self.path)
        self.modality = self._checked()
        counts = (self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups))
        self._starts: list[int] = list(accumulate(counts, initial=0))
        self._group = lru_cache(CACHED_GROUPS)(self._file.read_row_group)

    def _checked(self) -> Modality:
        """Which kind of samples the file holds; refuses files of another form."""
        found: pa.Schema = self._file.schema_arrow
        modality: Modality = "text" if "first_text" in found.names else "image"
        needed = schema(modality)
        missing = [name for name in ("prompt", *SIDES[modality], "label") if name not in found.names]
        if missing:
            raise InputError(
                f"{self.path} has the columns {', '.join(found.names)}, and lacks {', '.join(missing)}:"
                " bring it into the native form by `diffalign preferences convert`"
            )
        for field in found:
            if field.name in needed.names and not _fits(field.type, needed.field(field.name).type):
                expected = needed.field(field.name).type
                raise InputError(f"column {field.name} of {self.path} is {field.type}; it has to be {expected}")
        return modality

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Preference:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} preferences; there is none at {index}")
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        row = self._group(number).slice(index - self._starts[number], 1).to_pylist()[0]
        try:
            made = next(formats.native(row, self.path.parent))
        except InputError as error:
            raise InputError(f"row {index} of {self.path}: {error}") from None
        assert isinstance(made, Preference)
        return made

    def __iter__(self) -> Iterator[Preference]:
        return (self[i] for i in range(len(self)))

    def broken(self) -> Iterator[Broken | None]:
        """Of each row why it cannot be used, or None. One row is in memory at a time, and few images are decoded."""
        for number, row in parquet.rows(self.path):
            try:
                yield self._defect(number, row)
            except InputError as error:
                yield Broken(number, str(error))

    def _defect(self, number: int, row: dict[str, Any] | str) -> Broken | None:
        if isinstance(row, str):
            return Broken(number, row)
        if self.modality == "text":
            next(formats.native(row, self.path.parent))
            return None
        for column in SIDES["image"]:
            cells.require_image(row.get(column), column, self.path.parent)
        # The rest of the row, which needs no image: with words in their place.
        words = {f"{column}_text": column for column in SIDES["image"]}
        next(formats.native({name: row[name] for name in row if name not in SIDES["image"]} | words, self.path.parent))
        return None

    def prompts(self) -> list[Prompt]:
        """The prompt of each row; reads no image."""
        wanted = ("prompt", "prompt_id", "attributes", "negative")
        names = [name for name in wanted if name in self._file.schema_arrow.names]
        found: list[Prompt] = []
        for batch in self._file.iter_batches(1024, columns=names):
            found += [cells.prompt(row) for row in batch.to_pylist()]
        return found

    def criteria(self) -> list[str]:
        """What was judged in each row; reads no image."""
        if "criterion" not in self._file.schema_arrow.names:
            return ["overall"] * len(self)
        return [value or "overall" for value in self._column("criterion")]

    def labels(self) -> list[float | None]:
        """The label of each row, None where it has none; reads no image."""
        return self._column("label")

    def _column(self, name: str) -> list[Any]:
        batches = self._file.iter_batches(1024, columns=[name])
        return [value for batch in batches for value in batch.column(0).to_pylist()]

    def groups(self) -> list[str]:
        """What each row belongs to when the file is split (see ``splitting``); reads no image."""
        return [group(prompt) for prompt in self.prompts()]


def _fits(found: pa.DataType, needed: pa.DataType) -> bool:
    if pa.types.is_string(needed):
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
    if pa.types.is_floating(needed):
        return bool(pa.types.is_floating(found) or pa.types.is_integer(found))
    binary = pa.types.is_binary(found) or pa.types.is_large_binary(found)
    return bool(binary or (pa.types.is_struct(found) and {field.name for field in found} >= {"bytes"}))
