"""What a reward over HTTP and its server say to each other: JSON with PNGs in it, nothing that could run.

Version 1. ``GET /v1/reward`` says what the reward is, ``POST /v1/score`` scores samples. See docs/remote-rewards.md.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from diffalign.errors import InputError
from diffalign.images import decode, png_bytes
from diffalign.types import Prompt, Reward, Sample, Scores

PROTOCOL: Final = 1
ABOUT: Final = "/v1/reward"
SCORE: Final = "/v1/score"
MAX_BYTES: Final = 2**26
"""Largest body of a request or a response."""
MAX_PIXELS: Final = 2**26
"""Most pixels of a request's images together: 64 images of 1024x1024. A small PNG can hold very many."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = ("text", "id", "negative")


def about(reward: Reward) -> dict[str, object]:
    """The answer to ``GET /v1/reward``; null stands for an end of the range that is infinite."""
    return {
        "protocol": PROTOCOL,
        "name": reward.name,
        "modality": reward.modality,
        "unit": reward.unit,
        "range": [float(end) if math.isfinite(end) else None for end in reward.range],
        "higher_is_better": reward.higher_is_better,
        "max_bytes": MAX_BYTES,
        "max_pixels": MAX_PIXELS,
    }


def pack(sample: Sample) -> bytes:
    """A sample as JSON. Raises InputError where its attributes or evidence are nothing that JSON can hold."""
    prompt = {name: getattr(sample.prompt, name) for name in _TEXTS}
    facts = {
        "prompt": prompt | {"attributes": dict(sample.prompt.attributes)},
        "image": None if sample.image is None else base64.b64encode(png_bytes(sample.image)).decode("ascii"),
        "text": sample.text,
        "seed": sample.seed,
        "evidence": dict(sample.evidence),
    }
    try:
        return json.dumps(facts, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the sample of {sample.prompt.text!r} cannot be sent: its attributes or evidence are not JSON ({error})"
        ) from None


def unpack(rows: object) -> list[Sample]:
    """The samples of a request, or an InputError that says which of them is wrong."""
    if not isinstance(rows, list):
        raise InputError('"samples" is a list of samples')
    budget = MAX_PIXELS
    samples = []
    for number, row in enumerate(rows):
        try:
            data = _png(row)
            budget -= _pixels(data) if data else 0
            if budget < 0:
                raise InputError(f"the images have more than {MAX_PIXELS} pixels together; send fewer at once")
            samples.append(_sample(row, data))
        except InputError as error:
            raise InputError(f"sample {number}: {error}") from None
    return samples


def numbers(column: Tensor) -> list[float | None]:
    """A column of scores as JSON: null for NaN, and for an infinity, which is no score either."""
    return [value if math.isfinite(value) else None for value in column.double().tolist()]


def scores(answer: Mapping[str, Any], count: int) -> Scores:
    """The scores in the answer to ``POST /v1/score``, or an InputError that says what is wrong with it."""
    parts = answer.get("parts", {})
    if not isinstance(parts, dict):
        raise InputError('"parts" is no mapping of columns')
    return Scores(
        _column("total", answer.get("total"), count),
        {str(name): _column(f"parts.{name}", values, count) for name, values in parts.items()},
    )


def read(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, of this version of the protocol, or an InputError."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise InputError("the body is not JSON") from None
    if not isinstance(found, dict):
        raise InputError("the body is no JSON object")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def check_version(found: Mapping[str, Any]) -> None:
    """Raises InputError unless a message is of this version of the protocol."""
    version = found.get("protocol")
    if version != PROTOCOL or isinstance(version, bool):
        raise InputError(f"it speaks version {version!r} of the protocol, and this diffalign speaks {PROTOCOL}")


def _png(row: object) -> bytes | None:
    if not isinstance(row, dict):
        raise InputError("it is no JSON object")
    image = row.get("image")
    if image is None:
        return None
    if not isinstance(image, str):
        raise InputError('"image" is a PNG in base64, or null')
    try:
        data = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        raise InputError('"image" is not valid base64') from None
    if not data.startswith(_SIGNATURE) or len(data) < 24:
        raise InputError('"image" is not a PNG')
    return data


def _pixels(png: bytes) -> int:
    """Width times height, as the header says, before anything is decoded."""
    width, height = struct.unpack(">II", png[16:24])
    return int(width) * int(height)


def _sample(row: Mapping[str, Any], png: bytes | None) -> Sample:
    prompt, text, seed, evidence = row.get("prompt"), row.get("text"), row.get("seed", 0), row.get("evidence", {})
    if not isinstance(prompt, dict) or not isinstance(prompt.get("text"), str):
        raise InputError('"prompt" is an object with a "text"')
    words = {name: prompt.get(name, "") for name in _TEXTS}
    attributes = prompt.get("attributes", {})
    if not all(isinstance(word, str) for word in words.values()) or not isinstance(attributes, dict):
        raise InputError(
            '"prompt" has a text, an id and a negative, which are texts, and attributes, which are an object'
        )
    if text is not None and (not isinstance(text, str) or png):
        raise InputError('"text" is a text where there is no image, or null')
    if isinstance(seed, bool) or not isinstance(seed, int) or not isinstance(evidence, dict):
        raise InputError('"seed" is a whole number and "evidence" an object')
    image = None if png is None else decode(png, '"image"')
    return Sample(Prompt(attributes=attributes, **words), image, text, seed, evidence)


def _column(name: str, values: object, count: int) -> Tensor:
    if not isinstance(values, list) or len(values) != count:
        given = f"{len(values)} numbers" if isinstance(values, list) else f"a {type(values).__name__}"
        raise InputError(f"{name!r} is {given} for {count} samples")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{name!r} holds {value!r}, which is neither a number nor null")
    try:
        return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float32)
    except OverflowError:
        raise InputError(f"{name!r} holds a number that is too large") from None


def body(samples: Sequence[bytes]) -> bytes:
    """A request to score packed samples."""
    return b'{"protocol": %d, "samples": [%s]}' % (PROTOCOL, b", ".join(samples))
