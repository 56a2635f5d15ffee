"""The results of a study as one page that needs nothing but itself, and as sentences for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from apps.charts import minus
from apps.label import report_plots

if TYPE_CHECKING:
    from diffalign.preferences.agreement import Estimate, LeftBias
    from diffalign.preferences.ranking import Ranking
    from diffalign.study import Study
    from diffalign.study.criteria import CriterionStats
    from diffalign.study.noted import Flag
    from diffalign.study.report import RaterStats, Stats

HERE = Path(__file__).parent
FOLDERS = (HERE / "templates", HERE.parent / "templates")
GOOD, FAIR = 0.8, 0.667
"""Alphas from which Krippendorff calls data reliable, or good for tentative conclusions."""
ONE_SIDED = 0.9
"""Share of equal answers above which a low alpha says that the answers are one-sided, and not that raters disagree."""
REASONS = {"aa": "A/A pair", "gold": "gold pair", "flagged": "flagged pair"}
NONE = "–"
UNKNOWN = "not known"


def html(study: Study, *, served: bool = True) -> str:
    """The page. It names the arms, so raters should not see it before they are done.

    ``served``: it is looked at on the server of the study, so it links to the pairs; a file has no such place.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDERS), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    page = environment.get_template("stats.html.j2").render(context(study) | {"served": served})
    # A title or a name may hold halves of characters, which no page can.
    return page.encode("utf-8", "replace").decode()


def context(study: Study) -> dict[str, Any]:
    """What the template shows."""
    found, rules = study.stats(), study.protocol().rules
    kind, title, text = agreement(found)
    return {
        "title": study.title or study.folder.name,
        "protocol": f"{rules.name} version {rules.version}",
        "question": rules.question,
        "facts": facts(found, rules.overlap),
        "bar": report_plots.progress(found.complete, found.pairs),
        "verdict": {"kind": kind, "title": title, "text": text},
        "agreement": agreement_rows(found),
        "questions": questions(found),
        "raters": [rater(row) for row in found.raters if row.votes],
        "idle": idle(sum(not row.votes for row in found.raters)),
        "kappas": [
            (row.first, row.second, interval(row.kappa), interval(row.same, percent=True), row.kappa.n)
            for row in found.kappas
        ],
        "rankings": rankings(found),
        "flags": flagged(found.flags),
        "notes": found.notes,
    }


# --- in words, also for the terminal ---


def facts(found: Stats, overlap: int) -> list[tuple[str, str]]:
    """Progress in words, by name."""
    working = sum(bool(row.votes) for row in found.raters)
    have = _plural(found.pairs, "has", "have")
    rows = [
        ("pairs", f"{found.complete} of {found.pairs} {have} the {overlap} {_plural(overlap, 'vote')} that are wanted"),
        ("votes", f"{found.votes} by {working} {_plural(working, 'rater')}"),
        ("disputed", f"{_pairs(len(found.disputed))} on which some chose the one and some the other"),
    ]
    if found.simulated:
        rows.append(
            (
                "simulated",
                f"{found.simulated} of {_votes(found.votes)} {_plural(found.simulated, 'is', 'are')} simulated",
            )
        )
    if found.flagged:
        rows.append(("flagged", f"{_pairs(found.flagged)}, taken out"))
    if found.chosen:
        how = {"random": "in random order", "active": "chosen for what they would tell"}
        said = ", ".join(f"{count} on pairs {how.get(name, name)}" for name, count in sorted(found.chosen.items()))
        rows.append(("order", said))
    rows.append(("export", f"leaves out {left_out(found.left_out) or 'nothing'}"))
    return rows


def left_out(counts: Mapping[str, int], unit: str = "vote") -> str:
    """How many votes, or others, are left out, and of these how many for each reason; empty where none is."""
    reasons = ", ".join(f"{count} x {REASONS.get(why, why)}" for why, count in sorted(counts.items()) if count)
    total = sum(counts.values())
    return f"{total} {_plural(total, unit)} ({reasons})" if reasons else ""


def idle(count: int) -> str:
    """How many raters have not voted; empty where all have."""
    return f"{count} {_plural(count, 'rater has', 'raters have')} not voted." if count else ""


def agreement(found: Stats) -> tuple[str, str, str]:
    """Kind (good, unknown or alarm), heading and text of what the agreement means."""
    alpha = found.alpha_ordinal
    if math.isnan(alpha.value):
        return "unknown", "Agreement is not known", (
            "No pair was judged by two raters, or all answers are alike. Without that nothing says how far another"
            " rater would have answered the same."
        )  # fmt: skip
    shown = f"Krippendorff's alpha (first, tie, second in order) is {interval(alpha)} on {alpha.n} pairs"
    if found.agreement.value >= ONE_SIDED and not alpha.low >= FAIR:
        return "unknown", "Nearly all answers are the same", (
            f"Of the answers to one pair {_percent(found.agreement.value)} are equal, and nearly all pairs were"
            f" answered the same way. {shown}: it counts only what goes beyond chance, and here chance alone does as"
            " well. Pairs that are harder to tell apart would show how well raters agree."
        )  # fmt: skip
    if math.isnan(alpha.low):
        return "unknown", "Too few pairs to tell how well raters agree", f"{shown}."
    if alpha.low >= FAIR:
        high = "reliable" if alpha.low >= GOOD else "good enough for tentative conclusions"
        return "good", "Raters agree", f"{shown}. By the usual reading (0.8 and 0.667) the votes are {high}."
    if alpha.high < FAIR:
        return "alarm", "Raters agree little", (
            f"{shown}, below the 0.667 that is usually asked for. Do not rest much on single votes: look at the"
            " disputed pairs, sharpen the guideline, take more raters a pair, and report this number with every result."
        )  # fmt: skip
    return "unknown", "Not clear yet how well raters agree", (
        f"{shown}; the interval holds 0.667, from which on conclusions are usually drawn. More pairs will tell."
    )  # fmt: skip


def agreement_rows(found: Stats) -> list[tuple[str, str, int]]:
    """Each measure with its interval and n."""
    return [
        ("alpha, ordinal (a tie lies between)", interval(found.alpha_ordinal), found.alpha_ordinal.n),
        ("alpha, nominal", interval(found.alpha), found.alpha.n),
        ("share of equal answers", interval(found.agreement, percent=True), found.agreement.n),
    ]


def questions(found: Stats) -> list[tuple[str, str, int, list[tuple[str, str]]]]:
    """Each question: its name, alpha, answers, and how each arm stands in it (a share, or a mean of scores)."""
    return [
        (
            f"{row.criterion} (score)" if row.kind == "scale" else row.criterion,
            _of_level(row),
            row.answers,
            [(arm, interval(value, percent=row.kind == "prefer")) for arm, value in sorted(row.arms.items())],
        )
        for row in found.criteria
        if row.answers
    ]


def _of_level(row: CriterionStats) -> str:
    """Alpha with its kind: the agreement above is told by another one."""
    shown = interval(row.alpha)
    return shown if shown == UNKNOWN else f"{shown}, {'ordinal' if row.kind == 'scale' else 'nominal'}"


def rater(row: RaterStats) -> dict[str, Any]:
    """One row of the table of raters."""
    return {
        "name": row.rater,
        "votes": row.votes,
        "simulated": row.simulated,
        "cannot_judge": row.cannot_judge,
        "gold": _share(row.gold, row.gold.n),
        "repeats": _share(row.repeats, row.repeats.n),
        "aa": _share(row.aa_ties, row.aa_ties.n),
        "left": _share(row.left.left, row.left.left.n),
        "left_plot": report_plots.share(row.left.left, 0.5),
        "biased": biased(row.left),
        "seconds": NONE if math.isnan(row.median_seconds) else f"{row.median_seconds:.1f} s",
        "too_fast": row.too_fast,
        "reliability": _share(row.reliability, row.reliability.n),
        "reliability_plot": report_plots.share(row.reliability, None),
    }


def biased(left: LeftBias) -> bool:
    """Whether the left side was clearly chosen too often or too rarely."""
    return not math.isnan(left.p_value) and left.p_value < 0.05


def rankings(found: Stats) -> list[dict[str, Any]]:
    """Each group of arms: its name where there are several, why it has no ranking, the rows and the plot."""
    if not found.rankings:
        return [
            {
                "name": "",
                "why": "there is no comparison to rank by",
                "standings": [],
                "plot": report_plots.ranking(None),
            }
        ]
    several = len(found.rankings) > 1
    return [
        {
            "name": f" of {group.kind}s: {', '.join(group.arms)}" if several else "",
            "why": group.why,
            "standings": standings(group.ranking),
            "plot": report_plots.ranking(group.ranking),
        }
        for group in found.rankings
    ]


def standings(ranking: Ranking | None) -> list[tuple[str, str, str, str, int]]:
    """Rank, arm, strength with its interval, ranks that hold 95 % of the draws, comparisons."""
    if ranking is None:
        return []
    return [
        (
            str(place),
            row.arm,
            f"{number(row.strength, signed=True)} ({number(row.low, signed=True)} to {number(row.high, signed=True)})",
            f"{row.best_rank}" if row.best_rank == row.worst_rank else f"{row.best_rank} to {row.worst_rank}",
            row.comparisons,
        )
        for place, row in enumerate(ranking.standings, 1)
    ]


def flagged(flags: Sequence[Flag]) -> list[tuple[str, str, str]]:
    """Number of the pair, pseudonym of who flagged it, and the reason."""
    kinds = {"ordinary": "", "gold": " (gold)", "aa": " (A/A)"}
    return [(f"{flag.pair}{kinds[flag.kind]}", flag.rater, flag.reason or "no reason given") for flag in flags]


def interval(value: Estimate, *, percent: bool = False) -> str:
    """A number with its 95 % interval."""
    if math.isnan(value.value):
        return UNKNOWN
    show = _percent if percent else number
    if math.isnan(value.low) or math.isnan(value.high):
        return show(value.value)
    return f"{show(value.value)} ({show(value.low)} to {show(value.high)})"


def number(value: float, *, signed: bool = False) -> str:
    """Two decimals and a real minus sign."""
    return minus(f"{value:+.2f}" if signed else f"{value:.2f}")


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _share(value: Estimate, asked: int) -> Mapping[str, str]:
    """A share in words: the value, and the interval with n below it."""
    if math.isnan(value.value):
        return {"value": NONE, "range": ""}
    return {"value": _percent(value.value), "range": f"{100 * value.low:.0f} to {100 * value.high:.0f}, n {asked}"}


def _pairs(count: int) -> str:
    return f"{count} {_plural(count, 'pair')}"


def _votes(count: int) -> str:
    return f"{count} {_plural(count, 'vote')}"


def _plural(count: int, word: str, many: str = "") -> str:
    return word if count == 1 else many or f"{word}s"
