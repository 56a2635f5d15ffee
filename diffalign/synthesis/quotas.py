"""Whether the strata can still be filled: a run that cannot hold its quotas says so as soon as that is sure."""

from __future__ import annotations

from collections.abc import Mapping

from diffalign.intervals import wilson
from diffalign.synthesis.journal import Journal, Part

ENOUGH = 20
"""Images or texts of a stratum from which on its acceptance is judged before all attempts are used up."""


def shortfall(journal: Journal, wanted: Mapping[str, int], parts: tuple[Part, ...], attempts: int) -> str | None:
    """Why some stratum will not be filled, in a sentence about the worst one; None while all of them may be.

    Before the last attempt a stratum counts as lost where even at the upper end of the 95 % interval of its acceptance
    one case at least would be missing in the end.
    """
    left = attempts - journal.rounds()
    tried = {
        (stratum, part): (count, right)
        for stratum, part, count, right in journal.read(
            "SELECT stratum, part, count(*), sum(gate IS NULL) FROM attempt JOIN row ON row = number"
            " WHERE attempt < ? GROUP BY stratum, part",
            (journal.rounds(),),
        )
    }
    worst: tuple[float, str, Part, int, int] | None = None
    for (stratum, part), (count, right) in tried.items():
        missing = wanted[stratum] - right
        most = wilson(right, count)[1]
        lost = missing * (1 - most) ** left >= 1 if left and count >= ENOUGH else not left
        share = right / wanted[stratum]
        if part in parts and missing > 0 and lost and (worst is None or share < worst[0]):
            worst = (share, stratum, part, count, right)
    return None if worst is None else _sentence(journal, *worst[1:], wanted[worst[1]], left, attempts)


def _sentence(
    journal: Journal, stratum: str, part: Part, count: int, right: int, wanted: int, left: int, attempts: int
) -> str:
    rejected = journal.read(
        "SELECT gate, count(*) FROM attempt JOIN row ON row = number WHERE stratum = ? AND part = ?"
        " AND gate IS NOT NULL AND attempt < ? GROUP BY gate ORDER BY count(*) DESC, gate",
        (stratum, part, journal.rounds()),
    )
    (gate, most), *others = list(rejected)
    beside = f" (then {', '.join(f'{name} {number / count:.0%}' for name, number in others)})" if others else ""
    when = "all attempts are used up" if not left else f"the {left} attempts that are left will not fill it"
    done = "none" if not right else f"{right}"
    return (
        f"stratum {stratum} would {'vanish' if not right else 'come short'}: of its {wanted} {part}s {done} passed, and"
        f" {when}; gate {gate} rejected {most / count:.0%} of the {count} {part}s made for it{beside}. Use a model that"
        f" does better there, lower that gate, or allow more attempts ({attempts} now:"
        f" --resume --set attempts={min(999, 2 * attempts)})"
    )
