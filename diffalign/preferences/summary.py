"""What can be wrong with preference data, counted in one pass. Of images only hashes are kept."""

from __future__ import annotations

import statistics
from collections import Counter
from hashlib import blake2b
from typing import Any

from diffalign.intervals import wilson
from diffalign.preferences.rows import Broken, Defects
from diffalign.types import Preference, Sample

COMMON = 10
"""How many of the most frequent values are listed."""


class Summary:
    """Counts over preferences that are added one at a time."""

    def __init__(self) -> None:
        self.pairs = 0
        """Rows that could be read: judgements, of which a pair may have several."""
        self.simulated = 0
        """How many of these are of raters that are marked as simulated."""
        self.broken = Defects()
        self.labels: Counter[str] = Counter()
        self.soft = 0
        """Labels other than 0, 0.5 and 1."""
        self.label_sum = 0.0
        self.prompts: Counter[int] = Counter()
        """Different pairs of each."""
        self.criteria: Counter[str] = Counter()
        self.raters: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.unequal_sizes = 0
        self.identical = 0
        self.identical_decided = 0
        self.repeated = 0
        self.swapped = 0
        self._torn: set[int] = set()
        """Pairs of which one question has both answers."""
        self._seen: dict[int, int] = {}
        self._judgements: set[int] = set()
        self._pairs: set[int] = set()
        self._places: dict[int, tuple[float, int]] = {}
        """Of each pair in the order in which it stands: the sum of the labels, and how many there are."""

    def add(self, item: Preference | Broken) -> None:
        """Counts a preference, or a row that could not be read."""
        if isinstance(item, Broken):
            self.broken.add(item)
            return
        self.pairs += 1
        self.simulated += bool(item.provenance.get("simulated"))
        self.labels["ties" if item.label == 0.5 else "first" if item.label > 0.5 else "second"] += 1
        self.soft += item.label not in (0, 0.5, 1)
        self.label_sum += item.label
        self.criteria[item.criterion] += 1
        self.raters[item.rater] += 1
        images = [sample.image for sample in (item.first, item.second) if sample.image is not None]
        self.sizes.update(image.size for image in images)
        self.unequal_sizes += len({image.size for image in images}) > 1
        self._compare(item)

    def _compare(self, item: Preference) -> None:
        """Looks for the same samples within the pair, and for the same pair seen before."""
        first, second = (_content(sample) for sample in (item.first, item.second))
        place = _hash(item.prompt.key, first, second)
        total, count = self._places.get(place, (0.0, 0))
        self._places[place] = (total + item.label, count + 1)
        if first == second:
            self.identical += 1
            self.identical_decided += item.label != 0.5
        swapped = first > second
        shown = _hash(item.prompt.key, *sorted((first, second)))
        self.prompts[_hash(item.prompt.key)] += shown not in self._pairs
        self._pairs.add(shown)
        pair = _hash(item.prompt.key, item.criterion, *sorted((first, second)))
        judgement = _hash(pair, item.rater)
        before = self._seen.get(pair, 0)
        if judgement in self._judgements:
            self.repeated += 1
            self.swapped += bool(before & 4) != swapped
        self._judgements.add(judgement)
        # Bits: 1 and 2, which of the two was preferred by anybody; 4, the order of the first time.
        won = 0 if item.label == 0.5 or first == second else 1 if (item.label > 0.5) != swapped else 2
        now = before | won if before else 8 | won | 4 * swapped
        if now & 3 == 3:
            self._torn.add(shown)
        self._seen[pair] = now

    def different(self) -> int:
        """How many different pairs there are, in whichever order."""
        return len(self._pairs)

    @property
    def contradictory(self) -> int:
        """How many different pairs have labels that contradict each other, of whichever criterion."""
        return len(self._torn)

    def position(self) -> tuple[float | None, tuple[float, float], int]:
        """Share of decided pairs in which the first is preferred, its 95 % interval, and how many are decided.

        A pair counts once, by the mean of its labels: what several raters say of it, or one by several criteria, is no
        further evidence of how its place was drawn.
        """
        means = [total / count for total, count in self._places.values()]
        first, decided = sum(mean > 0.5 for mean in means), sum(mean != 0.5 for mean in means)
        return first / decided if decided else None, wilson(first, decided), decided

    def warnings(self) -> list[str]:
        """What should be looked at before training, in sentences."""
        found = []
        if self.broken:
            found.append(f"{len(self.broken)} rows could not be read and are left out.")
        if self.simulated:
            found.append(f"{self.simulated} of {self.pairs} judgements are simulated: no evidence about people.")
        share, (low, high), decided = self.position()
        one = next((side for side in self.labels if self.labels[side] == self.pairs), "")
        if one == "ties":
            found.append("Every label is a tie: there is nothing to learn from.")
        elif one:
            found.append(
                f"Every label prefers the {one}: either the file names its winners {one}, or the labels are wrong."
                " Position bias cannot be told."
            )
        elif share is not None and not low <= 0.5 <= high:
            found.append(
                f"The first is preferred in {share:.1%} of {decided} decided pairs ({low:.1%} to {high:.1%}): the sides"
                " were not shuffled, or raters favour one."
            )
        for count, text in (
            (
                self.contradictory,
                "pairs have labels that contradict each other in one question, by one rater or several.",
            ),
            (
                self.repeated,
                f"rows repeat a judgement of the same rater ({self.swapped} of them with the sides swapped).",
            ),
            (self.identical_decided, "pairs prefer one of two identical samples."),
            (self.unequal_sizes, "pairs have images of different sizes: size may have decided instead of content."),
        ):
            if count:
                found.append(f"{count} {text}")
        if self.pairs and len(self.prompts) == 1:
            found.append("All pairs have the same prompt: nothing can be held out by prompt.")
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        share, interval, decided = self.position()
        counts = list(self.prompts.values()) or [0]
        return {
            "pairs": self.different(),
            "judgements": self.pairs,
            "simulated": self.simulated,
            "broken": {
                "rows": len(self.broken),
                "reasons": dict(self.broken.kinds.most_common()),
                "first": [str(broken) for broken in self.broken.first],
            },
            "labels": {
                **{name: self.labels[name] for name in ("first", "second", "ties")},
                "soft": self.soft,
                "mean": self.label_sum / self.pairs if self.pairs else None,
            },
            "first_preferred": {"share": share, "ci95": list(interval), "n": decided},
            "prompts": {
                "different": len(self.prompts),
                "pairs_each": {"min": min(counts), "median": statistics.median(counts), "max": max(counts)},
            },
            "criteria": dict(self.criteria.most_common(COMMON)),
            "raters": {
                "different": len(self.raters.keys() - {""}),
                "unknown": self.raters[""],
                "most": {name: count for name, count in self.raters.most_common(COMMON + 1) if name},
            },
            "sizes": {
                "different": len(self.sizes),
                "most": {f"{width}x{height}": n for (width, height), n in self.sizes.most_common(COMMON)},
                "unequal_pairs": self.unequal_sizes,
            },
            "repeats": {
                "same_judgement": self.repeated,
                "of_these_swapped": self.swapped,
                "contradictory_pairs": self.contradictory,
                "identical_samples": self.identical,
            },
            "warnings": self.warnings(),
        }


def _content(sample: Sample) -> int:
    image = sample.image
    if image is None:
        return _hash(sample.text)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return _hash(rgb.size, blake2b(rgb.tobytes(), digest_size=8).digest())


def _hash(*values: object) -> int:
    return int.from_bytes(blake2b(repr(values).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
