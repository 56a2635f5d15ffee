"""``diffalign label export``: what raters said, in a form that our recipes or other people's tools read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import click
from sqlalchemy import RowMapping, select

from apps.label.report import left_out
from apps.reported import printable
from diffalign import preferences
from diffalign.errors import ConfigError, InputError
from diffalign.preferences import Written
from diffalign.study import Study, database
from diffalign.study.export import Export, asked, points, scores
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
        export = study.export()
        rows = scores(study, export) if form == "scores" else points(study, export)
        written = _whole(out, form, rows)
        _tell(out, form, written, export.left_out + _unanswered(export, form), final)
        _tell_simulated(export)
        return
    if form in ("trl", "kto", "pick-a-pic"):
        criterion = criterion or "overall"
    _check_criterion(study, criterion)
    chosen = Chosen(study, final, criterion, _kind(study, form, kind))
    written = _written(chosen, out, form)
    _tell(out, form, written, chosen.left_out, final)
    _tell_simulated(chosen.export)


class Chosen:
    """The preferences of a study of one kind and criterion. It can be gone through many times."""

    def __init__(self, study: Study, final: bool, criterion: str | None, kind: Kind) -> None:
        self.export = study.export(final=final)
        self.criterion, self.kind = criterion, kind
        self.left_out = self.export.left_out + Counter(why for row in self.export.rows if (why := self._why_not(row)))
        """Votes of which nothing is here, by reason."""

    def _why_not(self, row: RowMapping) -> str:
        if (found := self.export.kind(row)) != self.kind:
            return f"{found} pair"
        if self.criterion is None:
            return ""
        if not self.export.answers(row, self.criterion):
            return f"no answer to {printable(self.criterion)}"
        return "adjudicated" if self.export.replaced(row, self.criterion) else ""

    def __iter__(self) -> Iterator[Preference]:
        for preference in self.export:
            found: Kind = "text" if preference.first.image is None else "image"
            if found == self.kind and self.criterion in (None, preference.criterion):
                yield preference


def _check_criterion(study: Study, criterion: str | None) -> None:
    """Raises ConfigError for a criterion that nobody was asked, or that was answered by scores."""
    known = asked(study, "prefer")
    if criterion is None or criterion in known:
        return
    if criterion in asked(study, "scale"):
        raise ConfigError(f"{printable(criterion)} was answered by scores, not by a preference: --format scores")
    names = ", ".join(map(printable, known))
    raise ConfigError(f"there is no criterion {printable(criterion)}; there {_are(known)} {names}")


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _unanswered(export: Export, form: str) -> Counter[str]:
    """Votes that an export keeps, but that give no row of scores or points."""
    if form == "points":
        return Counter("nothing marked" for row in export.rows if not row["points"])
    return Counter("no score" for row in export.rows if not any(isinstance(v, dict) for v in row["answers"].values()))


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
    marked = chosen.export.simulated > 0
    try:
        match form:
            case "preferences":
                return Written(preferences.write(out, chosen))
            case "pick-a-pic":
                return preferences.write_pick_a_pic(out, chosen, simulated=marked)
            case "trl":
                return preferences.write_trl(out, chosen, simulated=marked)
            case _:
                return preferences.write_kto(out, chosen, simulated=marked)
    except InputError as error:
        reasons = left_out(chosen.left_out)
        raise InputError(f"{error}{'; left out: ' + reasons if reasons else ''}") from None


def _whole(out: Path, form: str, rows: Iterator[Mapping[str, object]]) -> Written:
    try:
        return preferences.write_rows(out, rows)
    except InputError as error:
        hint = "a criterion of the kind scale" if form == "scores" else "points"
        raise InputError(f"{error}: nobody has answered {hint}") from None


def _tell(out: Path, form: str, written: Written, votes: Counter[str], final: bool) -> None:
    """Everything left out is counted in votes; with ``final`` one row is of all votes on a pair, so it counts pairs."""
    click.echo(f"{written.rows} {'row' if written.rows == 1 else 'rows'} ({form}) in {out}")
    if reasons := left_out(votes if final else votes + written.left_out):
        click.echo(f"left out: {reasons}")
    if final and (pairs := left_out(written.left_out, "pair")):
        click.echo(f"left out: {pairs}")


def _tell_simulated(export: Export) -> None:
    if export.simulated:
        click.echo(f"note: {export.simulated} of {len(export.rows)} votes are simulated: no evidence about people")
