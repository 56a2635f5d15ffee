"""What a cell of a preference file can hold: a prompt, a label, an image. Every mistake is an InputError.

Its message begins with the kind of the defect and a colon, so that defects can be counted by kind.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Image

from diffalign import images
from diffalign.errors import InputError
from diffalign.preferences.rows import Row
from diffalign.types import Prompt, Sample

PLACES = (".", "train", "test", "valid", "images", "test_images")
"""Folders beside a file in which its images are looked for: HPDv2 and ImageReward leave these names out."""
WORDS = {
    "left": 1.0, "first": 1.0, "image_0": 1.0, "text_0": 1.0,
    "right": 0.0, "second": 0.0, "image_1": 0.0, "text_1": 0.0,
    "tie": 0.5,
}  # fmt: skip
SHOWN = 80
_HALF = re.compile("[\ud800-\udfff]")


def prompt(row: Row, column: str = "prompt") -> Prompt:
    """The prompt with what belongs to it: prompt_id, attributes, negative."""
    said, name = text(row, column), text(row, "prompt_id", "")
    if not said.strip() and not name:
        raise InputError(f"no prompt: {column} is empty")
    negative = text(row, "negative", "") or text(row, "negative_prompt", "")
    return Prompt(said, name, mapping(row, "attributes"), negative)


def text(row: Row, column: str, default: str | None = None) -> str:
    """A text; without a default it has to be there."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")  # a conversation of one message is that message
    if isinstance(value, list):
        raise InputError(f"conversation: {column} is a list of {len(value)} messages; only single texts are read")
    if not isinstance(value, str):
        raise InputError(f"no {column}: it is {_what(value)}")
    if _HALF.search(value):
        raise InputError(f"broken text: {column} holds half of a character")
    return value


def mapping(row: Row, column: str) -> Mapping[str, object]:
    """A JSON object, as text or as it is; empty where there is none."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (json.JSONDecodeError, RecursionError):
            raise InputError(f"broken {column}: {shown(value)} is not JSON") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"broken {column}: it is {_what(value)}, and a JSON object is needed")
    return value


def number(row: Row, column: str, default: float | None = None) -> float:
    """A finite number, also one that is written as text; without a default it has to be there."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise InputError(f"no {column}: it is {_what(value)}, and a number is needed")


def label(row: Row, column: str = "label") -> float:
    """The probability that the first is preferred: a number, or one of ``WORDS``.

    Refuses true and false: some mean by true that the second was chosen, so a guess would turn labels round.
    """
    value = row.get(column)
    if value is None or value == "":
        raise InputError(f"no label: {column} is empty")
    if isinstance(value, str) and value.strip().lower() in WORDS:
        return WORDS[value.strip().lower()]
    try:
        return number(row, column)
    except InputError:
        raise InputError(
            f"unknown label: {column} is {shown(value)}; write the probability that the first is preferred (1, 0.5, 0),"
            f" or one of {', '.join(WORDS)}"
        ) from None


def items(row: Row, column: str) -> list[Any]:
    """A list."""
    value = row.get(column)
    if not isinstance(value, list):
        raise InputError(f"no {column}: it is {_what(value)}, and a list is needed")
    return value


def require_image(value: object, column: str, folder: Path) -> None:
    """Raises InputError where ``image`` would, but looks at bytes without decoding their pixels where it can."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes) or not data:
        image(value, column, folder)
        return
    try:
        images.require_whole(data, column)
    except InputError as error:
        raise InputError(f"unreadable image: {error}") from None


def image(value: object, column: str, folder: Path) -> Image:
    """The image in a cell: the bytes of a file, ``{bytes, path}``, a data URL, or a path from ``folder`` on."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return _decoded(value, column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"no image: {column} is {_what(value)}")
    if value.startswith("data:"):
        try:
            return _decoded(base64.b64decode(value.partition(",")[2], validate=True), column)
        except binascii.Error as error:
            raise InputError(f"unreadable image: {column} is not base64 ({error})") from None
    if "://" in value:
        raise InputError(f"an address: {column} is {shown(value)}; nothing is downloaded, so fetch the images first")
    return _at(value, column, folder)


def sample(asked: Prompt, value: object, column: str, folder: Path) -> Sample:
    """An image as a sample."""
    return Sample(asked, image=image(value, column, folder))


def shown(value: object) -> str:
    """A value as an error shows it: not too long."""
    written = repr(value)
    return written if len(written) <= SHOWN else f"{written[:SHOWN]}…"


def _at(value: str, column: str, folder: Path) -> Image:
    # By the text of the path and not where links lead: dataset caches are folders of links.
    name = os.path.normpath(value)
    if not os.path.isabs(name) and name.split(os.sep)[0] == os.pardir:
        raise InputError(f"path outside: {column} {shown(value)} leaves the folder of the file; write an absolute path")
    found = next((path for place in PLACES if os.path.isfile(path := folder / place / name)), None)
    if found is None:
        raise InputError(f"missing image: {column} {shown(value)} is not there")
    try:
        data = found.read_bytes()
    except OSError as error:
        raise InputError(f"unreadable image: {column} {shown(value)}: {error.strerror}") from None
    return _decoded(data, f"{column} {shown(value)}")


def _decoded(data: bytes, name: str) -> Image:
    try:
        return images.decode(data, name)
    except InputError as error:
        raise InputError(f"unreadable image: {error}") from None


def _what(value: object) -> str:
    return "empty" if value is None or value == "" else shown(value)
