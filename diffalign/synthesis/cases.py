"""What a synthetic dataset consists of: cases, and what is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | bool | None
"""A cell of a table."""


@dataclass(frozen=True, slots=True)
class Case:
    """One synthetic case: a table row, an image, a text, and how they came to be. Image and text may be missing."""

    index: int
    """The number of its row in the specification's table, from 0: the order of the dataset."""
    id: str
    """Names it everywhere; tells nothing of a machine or a person. Unique in the dataset."""
    row: Mapping[str, Value]
    """The table row: every column of the specification."""
    stratum: str
    """The cell that quotas and reports go by, such as ``axial / T2 / left``."""
    split: str
    prompt: str
    """What the image model was given."""
    image: str | None = None
    """SHA-256 of the PNG file; its pixels are had by ``Generated.image``."""
    text: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    """By reward, and by part as ``REWARD/PART``."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What differs from case to case: ``seed``, ``attempt``, ``text_prompt``; the rest stands in the manifest."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is the same for all cases of a dataset. Holds no path, user or host."""

    name: str
    spec_sha256: str
    columns: Mapping[str, str]
    """Kind of each column: ``category``, ``integer``, ``number``, ``text`` or ``boolean``."""
    strata: Mapping[str, int]
    """Cases that the specification asks for, by stratum."""
    splits: Mapping[str, float]
    models: Mapping[str, Any]
    """``image`` and ``text``: name, SHA-256 of model and adapter, scheduler or generation settings, licence."""
    rewards: Mapping[str, Any]
    """By name: SHA-256, unit, range, direction."""
    gates: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    created: str
    """Day on which it was begun, ISO 8601; the bytes of the cases do not depend on it."""
    rows_from: str = "unknown"
    """``axes``, from which rows are drawn and are nobody's; or a ``table`` that was given, which may be people's."""
