"""``diffalign label export``: what raters said, in a form that our recipes or other people's tools read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import click
from sqlalchemy import select

from apps.label.report import REASONS
from diffalign import preferences
from diffalign.errors import ConfigError, InputError
from diffalign.preferences import Written
from diffalign.study import Study, database
from diffalign.study.export import Export
from diffalign.study.schema import ItemRow
from diffalign.types import Preference

Kind = Literal["image", "text"]
FORMATS = ("preferences", "pick-a-pic", "trl", "kto", "scores", "points")
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "preferences": (".parquet",),
    "pick-a-pic": (".parquet",),
    "trl": (".jsonl",),
    "kto": (".parquet", ".jsonl"),
    "scores": (".parquet", ".csv", ".jsonl"),
    "points": (".parquet", ".csv", ".jsonl"),
}
ONLY: Mapping[str, Kind] = {"pick-a-pic": "image", "trl": "text"}
"""Formats for one kind of pair."""


def run(study: Study, out: Path, form: str, *, final: bool, criterion: str | None, kind: Kind | None) -> None:
    """Writes the file and says what is in it, and what is not."""
    if out.suffix.lower() not in SUFFIXES[form]:
        raise ConfigError(f"{form} are written as {' or '.join(SUFFIXES[form])}; got {out}")
    if out.exists():
        raise ConfigError(f"output {out} exists already: choose another --out")
    if form in ("scores", "points"):
        if final or criterion or kind:
            raise ConfigError(f"--final, --criterion and --kind are about preferences, not about {form}")
        rows = study.scores() if form == "scores" else study.points()
        _tell(out, form, _whole(out, form, rows), Counter())
        _tell_simulated(study.export())
        return
    if form in ("trl", "kto", "pick-a-pic"):
        criterion = criterion or "overall"
    chosen = Chosen(study, final, criterion, _kind(study, form, kind))
    written = _written(chosen, out, form)
    _tell(out, form, written, chosen.export.left_out + chosen.left_out)
    _tell_simulated(chosen.export)


class Chosen:
    """The preferences of a study of one kind and criterion. It can be gone through many times."""

    def __init__(self, study: Study, final: bool, criterion: str | None, kind: Kind) -> None:
        self.export = study.export(final=final)
        self.criterion, self.kind = criterion, kind
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Preference]:
        self.left_out.clear()
        for preference in self.export:
            found: Kind = "text" if preference.first.image is None else "image"
            if found != self.kind:
                self.left_out[f"{found} pair"] += 1
            elif self.criterion not in (None, preference.criterion):
                self.left_out["another criterion"] += 1
            else:
                yield preference


def _kind(study: Study, form: str, kind: Kind | None) -> Kind:
    with database.reading(study.engine) as connection:
        kinds = set(connection.scalars(select(ItemRow.kind).distinct()))
    wanted = kind or ONLY.get(form)
    if wanted is None and len(kinds) > 1:
        raise ConfigError("the study has image pairs and text pairs, and a file holds one kind: say which, --kind")
    if kind is not None and kind != ONLY.get(form, kind):
        raise ConfigError(f"{form} is a form for {ONLY[form]} pairs")
    wanted = wanted or ("text" if kinds == {"text"} else "image")
    if wanted not in kinds:
        raise InputError(f"the study has no {wanted} pairs")
    return wanted


def _written(chosen: Chosen, out: Path, form: str) -> Written:
    try:
        match form:
            case "preferences":
                return Written(preferences.write(out, chosen))
            case "pick-a-pic":
                return preferences.write_pick_a_pic(out, chosen)
            case "trl":
                return preferences.write_trl(out, chosen)
            case _:
                return preferences.write_kto(out, chosen)
    except InputError as error:
        reasons = _reasons(chosen.export.left_out + chosen.left_out)
        raise InputError(f"{error}{'; left out: ' + reasons if reasons else ''}") from None


def _whole(out: Path, form: str, rows: Iterator[Mapping[str, object]]) -> Written:
    try:
        return preferences.write_rows(out, rows)
    except InputError as error:
        hint = "a criterion of the kind scale" if form == "scores" else "points"
        raise InputError(f"{error}: nobody has answered {hint}") from None


def _tell(out: Path, form: str, written: Written, left_out: Counter[str]) -> None:
    click.echo(f"{written.rows} rows ({form}) in {out}")
    reasons = _reasons(left_out + written.left_out)
    if reasons:
        click.echo(f"left out: {reasons}")


def _tell_simulated(export: Export) -> None:
    if export.simulated:
        click.echo(f"note: {export.simulated} of {len(export.rows)} votes are simulated: no evidence about people")


def _reasons(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} x {REASONS.get(why, why)}" for why, count in sorted(left_out.items()))
