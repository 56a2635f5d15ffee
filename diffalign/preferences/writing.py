"""Preferences in the forms of other tools: Pick-a-Pic columns, TRL's text pairs, labelled samples for KTO, plain rows.

Each function writes a file, whole or not at all, while the rows come in, and returns a ``Written``: how many rows it
has, and how many preferences found no place in that form, by reason. ``read`` and ``read_unpaired`` read them back.

Of the forms of others none says by itself that a program gave a judgement. Where that may be, ``simulated=True`` adds a
column of that name to every row, which other tools pass over, and ``read`` takes back into the provenance.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.errors import ConfigError, InputError
from diffalign.images import png_bytes
from diffalign.runs import new_file
from diffalign.types import Preference, Sample

GROUP_ROWS = 64
SIMULATED = "simulated"
"""The column that says of each row whether a program judged, in forms that have no such column themselves."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins so for a formula."""


@dataclass
class Written:
    """What a file holds, and what it could not."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Preferences that have no place in the form, by reason."""


_PICK_A_PIC = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_0_url": pa.string(),
        "image_1_uid": pa.string(),
        "image_1_url": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
    }
)
_KTO = {"prompt": pa.string(), "prompt_id": pa.string(), "attributes": pa.string(), "label": pa.bool_()}


def write_pick_a_pic(path: str | Path, preferences: Iterable[Preference], *, simulated: bool = False) -> Written:
    """The columns and types of Pick-a-Pic v2, as Parquet; images only.

    ``jpg_0`` and ``jpg_1`` hold PNG: a JPEG would change the pixels that were judged, and whoever decodes the bytes by
    their content reads both. A tie is 0.5 and 0.5, with ``tie`` as the best; a soft label stays soft. Image ids are the
    SHA-256 of the bytes, there are no addresses, and a rater's pseudonym becomes a number (see ``user_number``).
    ``preferences`` is gone through twice, the first time to count.
    """
    each = Counter(preference.prompt.text for preference in preferences)
    written = Written()

    def rows() -> Iterator[dict[str, object]]:
        encode = lru_cache(maxsize=256)(_encoded)
        for number, preference in enumerate(preferences):
            if preference.first.image is None or preference.second.image is None:
                written.left_out["text pair"] += 1
                continue
            origin = preference.provenance
            uids, data = zip(*(encode(_Held(s)) for s in (preference.first, preference.second)), strict=True)
            label = preference.label
            yield {
                "are_different": uids[0] != uids[1],
                "best_image_uid": "tie" if label == 0.5 else uids[0] if label > 0.5 else uids[1],
                "caption": preference.prompt.text,
                "created_at": _time(origin.get("received_at")),
                "has_label": True,
                **{f"image_{i}_uid": uid for i, uid in enumerate(uids)},
                "image_0_url": "",
                "image_1_url": "",
                **{f"jpg_{i}": png for i, png in enumerate(data)},
                "label_0": label,
                "label_1": 1 - label,
                **{f"model_{i}": _arm(origin.get(side)) for i, side in enumerate(("first", "second"))},
                "ranking_id": _whole(origin.get("pair"), number),
                "user_id": user_number(preference.rater),
                "num_example_per_prompt": each[preference.prompt.text],
                **_mark(preference, simulated),
            }

    schema = _PICK_A_PIC.append(pa.field(SIMULATED, pa.bool_())) if simulated else _PICK_A_PIC
    written.rows = _parquet(Path(path), rows(), schema)
    return written


def write_trl(path: str | Path, preferences: Iterable[Preference], *, simulated: bool = False) -> Written:
    """JSON lines of ``prompt, chosen, rejected``, as TRL's preference trainers read them; texts only.

    A tie has no chosen one, and is left out and counted; of a soft label only the side remains.
    """
    written = Written()

    def rows() -> Iterator[dict[str, object]]:
        for preference in preferences:
            first, second = preference.first.text, preference.second.text
            if first is None or second is None:
                written.left_out["image pair"] += 1
            elif preference.label == 0.5:
                written.left_out["tie"] += 1
            else:
                better, worse = (first, second) if preference.label > 0.5 else (second, first)
                about = {"prompt": preference.prompt.text, "chosen": better, "rejected": worse}
                yield about | _mark(preference, simulated)

    written.rows = _json_lines(Path(path), rows())
    return written


def write_kto(path: str | Path, preferences: Iterable[Preference], *, simulated: bool = False) -> Written:
    """Two labelled samples of each preference: ``prompt, completion, label`` as JSON lines, or images as Parquet.

    The preferred one is true and the other false; of a tie of two good ones (``choice`` in the provenance is
    ``tie_good``) both are true, of two bad ones (``tie_bad``) both false. A tie that does not say which is left out.
    """
    path, written = Path(path), Written()
    rest = iter(preferences)
    first = next(rest, None)
    if first is None:
        raise InputError(f"there is no preference to write to {path}")
    texts = first.first.image is None
    wanted = ".jsonl" if texts else ".parquet"
    if path.suffix != wanted:
        raise ConfigError(f"labelled {'texts' if texts else 'images'} are written as {wanted}; got {path}")

    def rows() -> Iterator[dict[str, object]]:
        encode = lru_cache(maxsize=256)(_encoded)
        for preference in chain([first], rest):
            if (preference.first.image is None) != texts:
                written.left_out["image pair" if texts else "text pair"] += 1
                continue
            labels = _good(preference)
            if labels is None:
                written.left_out["tie, good or bad is not known"] += 1
                continue
            asked = preference.prompt
            for sample, label in zip((preference.first, preference.second), labels, strict=True):
                mark = _mark(preference, simulated)
                if texts:
                    yield {"prompt": asked.text, "completion": sample.text, "label": label} | mark
                    continue
                yield {
                    "prompt": asked.text, "prompt_id": asked.id, "attributes": json.dumps(dict(asked.attributes)),
                    "image": {"bytes": encode(_Held(sample))[1], "path": None}, "label": label, **mark,
                }  # fmt: skip

    written.rows = _json_lines(path, rows()) if texts else _parquet(path, rows(), _kto_schema(simulated))
    return written


def write_rows(path: str | Path, rows: Iterable[Mapping[str, object]]) -> Written:
    """Plain rows as ``.csv``, ``.jsonl`` or ``.parquet``, by the suffix; all rows have the columns of the first.

    In CSV, which spreadsheets open, a text that they would take for a formula gets an apostrophe before it.
    """
    path, rest = Path(path), iter(rows)
    first = next(rest, None)
    if first is None:
        raise InputError(f"there is no row to write to {path}")
    every = chain([first], rest)
    match path.suffix:
        case ".csv":
            count = _csv(path, list(first), every)
        case ".jsonl":
            count = _json_lines(path, every)
        case ".parquet":
            made = [dict(row) for row in every]
            with new_file(path) as temporary:
                pq.write_table(pa.Table.from_pylist(made), temporary, compression="zstd")
            count = len(made)
        case other:
            raise ConfigError(f"rows are written as .csv, .jsonl or .parquet; got {other or 'no suffix'}")
    return Written(count)


def user_number(rater: str) -> int:
    """A pseudonym as the whole number that Pick-a-Pic has in ``user_id``; the same one has always the same. 0: none.

    Of ``r-`` and hexadecimal digits it is these digits, so that one can tell whose it is; of others it is a hash.
    """
    if not rater:
        return 0
    try:
        number = int(rater.removeprefix("r-"), 16) if rater.startswith("r-") else -1
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        import hashlib

        number = int.from_bytes(hashlib.sha256(rater.encode()).digest()[:6], "big")
    return number


class _Held:
    """A sample by the identity of its image: equal ones are many, and comparing pixels costs more than encoding."""

    def __init__(self, sample: Sample) -> None:
        self.image = sample.image

    def __hash__(self) -> int:
        return id(self.image)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.image is self.image


def _encoded(held: _Held) -> tuple[str, bytes]:
    import hashlib

    assert held.image is not None
    data = png_bytes(held.image)
    return hashlib.sha256(data).hexdigest(), data


def _good(preference: Preference) -> tuple[bool, bool] | None:
    if preference.label != 0.5:
        return preference.label > 0.5, preference.label < 0.5
    # What was said of the whole pair says nothing of a tie by another criterion.
    choice = preference.provenance.get("choice") if preference.criterion == "overall" else None
    return {"tie_good": (True, True), "tie_bad": (False, False)}.get(str(choice))


def _time(seconds: object) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None) if isinstance(seconds, float | int) else None


def _arm(facts: object) -> str | None:
    arm = facts.get("arm") if isinstance(facts, Mapping) else None
    return None if arm is None else str(arm)


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _mark(preference: Preference, wanted: bool) -> dict[str, object]:
    return {SIMULATED: bool(preference.provenance.get("simulated"))} if wanted else {}


def _kto_schema(simulated: bool) -> pa.Schema:
    plain = _KTO | ({SIMULATED: pa.bool_()} if simulated else {})
    kinds = {
        name: {"dtype": "bool" if kind == pa.bool_() else "string", "_type": "Value"} for name, kind in plain.items()
    }
    features = {**kinds, "image": {"_type": "Image"}}
    types = {**plain, "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    return pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _parquet(path: Path, rows: Iterator[dict[str, object]], schema: pa.Schema) -> int:
    if path.suffix != ".parquet":
        raise ConfigError(f"images are written as Parquet, so the name ends in .parquet; got {path}")
    count = 0
    group: list[dict[str, object]] = []
    with new_file(path) as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for row in rows:
                group.append(row)
                if len(group) == GROUP_ROWS:
                    count += _flush(writer, group, schema)
            count += _flush(writer, group, schema)
        if not count:
            raise InputError(f"there is no row to write to {path}")
    return count


def _flush(writer: pq.ParquetWriter, group: list[dict[str, object]], schema: pa.Schema) -> int:
    if not group:
        return 0
    try:
        writer.write_table(pa.Table.from_pylist(group, schema))
    except UnicodeEncodeError as error:
        raise InputError(f"a text is no Unicode text, so it cannot be written: {error}") from None
    count = len(group)
    group.clear()
    return count


def _json_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    if path.suffix != ".jsonl":
        raise ConfigError(f"JSON lines are written, so the name ends in .jsonl; got {path}")
    count = 0
    with new_file(path) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                # ASCII: any text, with half of a character too, comes back as it was.
                file.write(json.dumps(row, allow_nan=False) + "\n")
                count += 1
        if not count:
            raise InputError(f"there is no row to write to {path}")
    return count


def _csv(path: Path, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with (
        new_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})
            count += 1
    return count


def _cell(value: object) -> object:
    if isinstance(value, dict | list | tuple):
        value = json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
