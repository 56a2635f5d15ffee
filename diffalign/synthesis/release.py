"""The gate between a dataset and those whom it is given to: what ``privacy.json`` says of it, and what follows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from diffalign.errors import InputError, RefusedError
from diffalign.synthesis import store, sums

NAME = "privacy.json"
OF = "journal_sha256"
"""The field that says of which cases the report is."""
Verdict = Literal["passed", "failed", "not assessed"]


@dataclass(frozen=True)
class Release:
    """What was known of the privacy of a dataset when it was handed out."""

    verdict: Verdict
    why: str
    measures: Mapping[str, Any] = field(default_factory=dict)
    allowed_unsafe: bool = False
    """It was handed out although it had not passed, because somebody said so."""

    def as_json(self) -> dict[str, Any]:
        """As it stands in the manifest of an export."""
        return asdict(self)


def about(folder: Path) -> dict[str, str]:
    """What binds a report to the dataset in this folder: the hash of its journal, in which all its cases stand."""
    return {OF: sums.of_file(folder / store.JOURNAL)}


def read(folder: Path, beside: Path | None = None) -> Release:
    """What ``privacy.json`` in a dataset's folder says; a dataset without one, or with another's, was not assessed.

    ``beside`` is the folder that the report lies in, where it is not the dataset's.
    """
    path = (beside or folder) / NAME
    if not path.is_file():
        return Release("not assessed", "no privacy report was made of this dataset")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        verdict, why, measures = facts["verdict"], facts.get("why", ""), facts.get("measures", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a privacy report: {error}") from None
    if verdict not in get_args(Verdict) or not isinstance(why, str) or not isinstance(measures, dict):
        raise InputError(
            f"{path} is not a privacy report: its verdict is {', '.join(get_args(Verdict))}, with a reason"
        )
    if verdict == "passed" and facts.get(OF) != about(folder)[OF]:
        return Release("not assessed", "the privacy report beside it is of another dataset, or of other cases")
    return Release(verdict, why, measures)


def gate(folder: Path, *, allow_unsafe: bool) -> Release:
    """What is known, if the dataset may be handed out; it fails closed: only ``passed`` goes out by itself."""
    found = read(folder)
    if found.verdict == "passed":
        return found
    if not allow_unsafe:
        raise RefusedError(
            f"the privacy of this dataset is {'' if found.verdict == 'not assessed' else 'assessed, and it '}"
            f"{found.verdict} ({found.why}), so it is not exported; assess it with `diffalign evaluate`, or hand it"
            " out anyway with --allow-unsafe, which its card will say"
        )
    return Release(found.verdict, found.why, found.measures, allowed_unsafe=True)
