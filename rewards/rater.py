"""Simulated raters: they prefer by a hidden utility over what is asked and what pleases, and they err as people do.

They let the loop from labels to an aligned model be tested and shown without people, and measured: what they want is
known. Labels made by them are no evidence about people, and each one says in its provenance that it is simulated.

Each rater sees a sample's *terms*, all in [0, 1]: the graded credit of its world's checker for each attribute that the
prompt asks for, and measures of taste (``rewards.rater_tastes``). With the rater's own weights ``w``::

    u = sum(w * term) / sum(|w|)                      over the terms that the criterion and the prompt have
    perceived = u(first) - u(second) + noise * (side_bias + e),   e standard logistic
    answer    = tie where |perceived| < ties, else the first where perceived > 0, else the second

so without ties and side bias it is Bradley-Terry, P(first) = sigmoid((u1 - u2) / noise). The band is that of Rao and
Kupper (1967, JASA 62:194): P(first) = sigmoid((u1 - u2 - ties) / noise + side_bias). It is on purpose not the model of
ties (Davidson 1970) that reward models are fitted with here.

Shape legend: ``B`` samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from diffalign.errors import InputError
from diffalign.images import to_rgb
from diffalign.seeds import derive
from diffalign.types import Modality, Preference, Reward, Sample, Scores
from rewards import rater_file
from rewards.brain_mr_checker import BrainMRChecker
from rewards.emoji_checker import EmojiChecker
from rewards.findings_checker import FindingsChecker
from rewards.rater_file import OVERALL, RaterFile
from rewards.rater_tastes import TASTES, pixels
from rewards.rater_words import WORDS

Terms = Mapping[str, float]


class SimulatedRaters:
    """A panel of raters that a YAML file describes.

    A judgement depends on the seed, the prompt's key and the seeds and pixels of the two samples, never on the batch.
    The draws behind it depend on the keys and seeds alone; samples whose seeds are the same are told apart by their
    pixels.
    """

    def __init__(self, profile: RaterFile, *, file: str = "", sha256: str = "") -> None:
        """``file`` and ``sha256`` are what the provenance of a preference says about where the raters come from."""
        self.profile = profile
        self.file, self.sha256 = file, sha256

    @classmethod
    def load(cls, name_or_path: str | Path) -> SimulatedRaters:
        """Raters by the name of a shipped file (``emoji``, ``brain-mr``, ``findings``), or by a path."""
        path = rater_file.find(name_or_path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(rater_file.read(path), file=path.name, sha256=digest)

    @property
    def modality(self) -> Modality:
        """What they look at."""
        return "text" if self.profile.world in WORDS else "image"

    @property
    def criteria(self) -> list[str]:
        """What they are asked about a pair."""
        return self.profile.titles()

    def names(self) -> list[str]:
        """The raters' pseudonyms."""
        return [f"{self.profile.name}-{number + 1}" for number in range(self.profile.raters.count)]

    def judge(
        self, pairs: Sequence[tuple[Sample, Sample]], seed: int, criteria: Sequence[str] | None = None
    ) -> list[Preference]:
        """One preference per pair, criterion and assigned rater, in this order; without ``criteria``, on all of them.

        The first of a pair is shown on the left: shuffle the sides, for these raters have a side bias. Raises
        InputError for a pair of two prompts, and for a sample that is none of the raters' world.
        """
        titles = self.criteria if criteria is None else list(criteria)
        weights = {title: self._weights(title) for title in titles}
        terms = _Memory(self)
        found = []
        for first, second in pairs:
            if first.prompt.key != second.prompt.key:
                raise InputError(f"a pair is of one prompt; got {first.prompt.text!r} beside {second.prompt.text!r}")
            draw = (seed, first.prompt.key, *_identities(first, second))
            panel = self.profile.raters
            assigned = np.random.default_rng(derive(*draw, "raters")).permutation(panel.count)[: panel.overlap]
            for title in titles:
                for rater in sorted(assigned.tolist()):
                    own = weights[title][rater]
                    difference = _utility(terms(first), own) - _utility(terms(second), own)
                    label = self._answer(title, difference, derive(*draw, rater, title))
                    found.append(self._preference(first, second, label, title, rater, seed))
        return found

    def good(self, samples: Sequence[Sample], seed: int) -> list[bool]:
        """Thumbs up or down, each by one of the raters: up where utility plus noise is above ``good_above``."""
        profile, weights, terms = self.profile, self._weights(OVERALL), _Memory(self)
        noise = profile.criterion(OVERALL).noise or 0.0
        answers = []
        for sample in samples:
            rng = np.random.default_rng(derive(seed, "good", sample.prompt.key, sample.seed))
            rater, slip, error = int(rng.integers(profile.raters.count)), rng.random(), float(rng.logistic())
            perceived = _utility(terms(sample), weights[rater]) + noise * error - profile.good_above
            answers.append(bool(rng.random() < 0.5) if slip < profile.lapse else perceived > 0)
        return answers

    @property
    def utility(self) -> Reward:
        """The noise-free utility that is behind the overall judgements, as a reward."""
        return HiddenUtility(self)

    def terms(self, sample: Sample) -> dict[str, float]:
        """What the raters see in a sample, each in [0, 1]; attributes that the prompt does not ask for are left out.

        Raises InputError where the prompt is none of the raters' world, or there is nothing to look at.
        """
        if (sample.image if self.modality == "image" else sample.text) is None:
            raise InputError(
                f"the simulated rater {self.profile.name} looks at {self.modality}s; the sample of"
                f" {sample.prompt.text!r} has none"
            )
        try:
            credit = _checker(self.profile.world)([sample])
        except InputError:
            credit = Scores(torch.full((1,), math.nan))
        if credit.total.isnan().any():
            raise InputError(
                f"the simulated rater {self.profile.name} judges the world {self.profile.world}, and"
                f" {sample.prompt.text!r} is no prompt of it"
            )
        found = {name: float(part[0]) for name, part in credit.parts.items() if name in self.profile.asked}
        found |= _tastes(self.profile, sample)
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def utilities(self, sample: Sample, criterion: str = OVERALL) -> list[float]:
        """Every rater's noise-free utility of a sample, in the order of ``names``."""
        terms = self.terms(sample)
        return [_utility(terms, weights) for weights in self._weights(criterion)]

    def _weights(self, title: str) -> list[Terms]:
        """Each rater's own weights. A rater's taste is the same whatever the criterion."""
        panel, name = self.profile.raters, self.profile.name

        def own(rater: int, term: str) -> float:
            z = np.random.default_rng(derive(panel.seed, "rater", name, rater, term)).standard_normal()
            return math.exp(panel.spread * float(z))

        terms = self.profile.terms(title)
        return [{term: weight * own(rater, term) for term, weight in terms.items()} for rater in range(panel.count)]

    def _answer(self, title: str, difference: float, seed: int) -> float:
        profile, criterion = self.profile, self.profile.criterion(title)
        noise, ties = criterion.noise or 0.0, criterion.ties or 0.0
        rng = np.random.default_rng(seed)
        slip, error = rng.random(), float(rng.logistic())
        if slip < profile.lapse:
            return float(rng.random() < 0.5)
        perceived = difference + noise * (profile.side_bias + error)
        # Without noise and ties, equals are still a tie and not the second.
        return 0.5 if abs(perceived) < ties or perceived == 0 else float(perceived > 0)

    def _preference(self, first: Sample, second: Sample, label: float, title: str, rater: int, seed: int) -> Preference:
        provenance = {
            "simulated": True,
            "raters": self.file or self.profile.name,
            "raters_sha256": self.sha256,
            "seed": seed,
            "left": "first",
        }
        return Preference(
            first.prompt, first, second, label, criterion=title, rater=self.names()[rater], provenance=provenance
        )


class HiddenUtility:
    """What simulated raters want: the mean of their noise-free utilities, a measure to hold out from training.

    ``parts`` are the terms themselves, in [0, 1], NaN where the prompt does not ask for them.
    """

    unit = "utility"
    higher_is_better = True

    def __init__(self, raters: SimulatedRaters, criterion: str = OVERALL) -> None:
        self.raters, self.criterion = raters, criterion
        self.modality: Modality = raters.modality
        self._weights = raters._weights(criterion)
        self.name = "hidden-utility" if criterion == OVERALL else f"hidden-utility-{'-'.join(criterion.split())}"
        self.range = (-1.0 if any(weight < 0 for weight in self._weights[0].values()) else 0.0, 1.0)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Utilities ``(B,)``; NaN where there is nothing to look at, or the prompt is none of the raters' world."""
        parts = {term: torch.full((len(samples),), math.nan) for term in self._weights[0]}
        total = torch.full((len(samples),), math.nan)
        for i, sample in enumerate(samples):
            try:
                terms = self.raters.terms(sample)
            except InputError:
                continue
            for term, part in parts.items():
                part[i] = terms.get(term, math.nan)
            total[i] = sum(_utility(terms, weights) for weights in self._weights) / len(self._weights)
        return Scores(total, parts)


def hidden_utility(rater: str, criterion: str = OVERALL) -> HiddenUtility:
    """The reward ``hidden-utility?rater=NAME_OR_PATH``, of one criterion."""
    return HiddenUtility(SimulatedRaters.load(rater), criterion)


class _Memory:
    """The terms of the samples of one call; an image of several pairs is looked at once for its prompt."""

    def __init__(self, raters: SimulatedRaters) -> None:
        self._raters = raters
        self._seen: dict[tuple[int, int], tuple[Sample, Terms]] = {}

    def __call__(self, sample: Sample) -> Terms:
        key = id(sample.text if sample.image is None else sample.image), id(sample.prompt)
        # The sample is kept beside its terms, for an id belongs to an object only as long as that lives.
        if key not in self._seen:
            self._seen[key] = sample, self._raters.terms(sample)
        return self._seen[key][1]


def _utility(terms: Terms, weights: Terms) -> float:
    """Weighted mean of the terms that are there."""
    there = [name for name in weights if name in terms]
    return sum(weights[name] * terms[name] for name in there) / sum(abs(weights[name]) for name in there)


def _identities(first: Sample, second: Sample) -> tuple[object, object]:
    """What tells the draws of a pair from those of others of its prompt: the seeds, or the pixels where they agree."""
    if first.seed != second.seed:
        return first.seed, second.seed
    return _fingerprint(first), _fingerprint(second)


def _fingerprint(sample: Sample) -> str:
    said = (sample.text or "").encode("utf-8", "surrogatepass")
    data = said if sample.image is None else to_rgb(sample.image).tobytes()
    return hashlib.sha256(data).hexdigest()


def _tastes(profile: RaterFile, sample: Sample) -> dict[str, float]:
    if sample.image is None:
        return {name: WORDS[profile.world][name](sample) for name in profile.taste}
    seen = pixels(sample.image)
    return {name: TASTES[profile.world][name](seen) for name in profile.taste}


@cache
def _checker(world: str) -> Reward:
    if world in WORDS:
        return FindingsChecker()
    # One image at a time, so that not even the last bit of a utility depends on the batch.
    return EmojiChecker(graded=True) if world == "emoji" else BrainMRChecker(graded=True, batch_size=1)
