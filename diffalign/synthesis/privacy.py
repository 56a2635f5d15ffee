"""Does a synthetic dataset, or the model behind it, give its training data away? A release gate that fails closed.

Each measure is set against real images that the model was not trained on, and judged by its whole interval: "passed"
where even the worse end is within the limit, "failed" where even the better end is not, and else "not assessed".

Shape legend: ``S`` synthetic, ``T`` training, ``H`` held-out images or rows, ``D`` numbers that each is known by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.errors import InputError
from diffalign.intervals import wilson
from diffalign.synthesis.cases import Value
from diffalign.synthesis.estimates import difference, share
from diffalign.synthesis.release import Verdict

Floats = NDArray[np.float64]
EXPECTED = 0.01
"""Held-out cases that lie within a threshold: it is their 1st percentile."""
SHARE_LIMIT = 0.05
"""Share of synthetic cases within the threshold, where 0.01 are expected of a model that copies nothing."""
COPY = 0.5
"""A copy is as near to a training image as this share of the 1st percentile of the held-out ones' distances. An image
that differs from a training image by noise of its own alone is at least ``1/sqrt(2)`` as far as a held-out one."""
AUC_LIMIT = 0.6
"""Area under the curve of membership inference: 0.5 is a guess. As far below 0.5 the images are not what they are said
to be."""
FEWEST_HELD_OUT = 200
"""Fewer held-out cases have no 1st percentile worth the name: it would be their nearest one, or the second."""
CLIQUE = 5
"""Images of a prompt that are all alike, from which on they count as a memory of something (Carlini et al. 2023 take 10
of 500)."""
NAMED = 20
"""Cases that a report names at most."""
_CANDIDATES = 8
_CHUNK = 512


@dataclass(frozen=True)
class Measure:
    """One measure and what it says."""

    verdict: Verdict | None
    """None: it describes, and decides nothing."""
    why: str
    """One sentence."""
    value: float | None = None
    ci95: tuple[float, float] | None = None
    n: int = 0
    limit: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Thresholds, baselines, counts."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``privacy.json``; what decides nothing is "described"."""
        return {
            "verdict": self.verdict or "described",
            "why": self.why,
            "value": self.value,
            "ci95": list(self.ci95) if self.ci95 else None,
            "n": self.n,
            "limit": self.limit,
            **self.facts,
        }


REQUIRED = ("nearest_features", "nearest_pixels", "copies", "extraction", "membership")
"""Without one of these nothing passes."""


def unmeasured(why: str) -> Measure:
    """Something that could not be measured, and why."""
    return Measure("not assessed", why)


def report(
    measures: Mapping[str, Measure], about: Mapping[str, Any], *, index: str = "", scope: str = ""
) -> dict[str, Any]:
    """The content of ``privacy.json``: the verdict over all measures, why, and each of them.

    One that failed fails the dataset. It passes only if all of ``REQUIRED`` and everything else that decides
    passed, and the training index is whole; ``index`` says what is wrong with it. ``about`` says what was compared, and
    ``scope`` is a sentence on what a pass does not cover, or rests on.
    """
    missing = {name: unmeasured("it was not measured") for name in REQUIRED if name not in measures}
    known = {**measures, **missing}
    failed = [name for name, measure in known.items() if measure.verdict == "failed"]
    open_ = [name for name, measure in known.items() if measure.verdict == "not assessed"]
    verdict: Verdict = "failed" if failed else "not assessed" if open_ or index else "passed"
    if failed:
        why = "; ".join(f"{shown(name)}: {known[name].why}" for name in failed)
    elif open_ or index:
        why = "; ".join([*([index] if index else []), *(f"{shown(name)}: {known[name].why}" for name in open_)])
    else:
        why = (
            "nothing that was measured tells the training data from held-out data by more than the limits; that is no"
            " proof that the dataset is anonymous" + (f"; {scope}" if scope else "")
        )
    return {
        "verdict": verdict,
        "why": why,
        "measures": {name: measure.to_json() for name, measure in known.items()},
        "about": dict(about),
    }


def unassessed(why: str) -> dict[str, Any]:
    """The content of ``privacy.json`` of a dataset without a training index."""
    return {"verdict": "not assessed", "why": why, "measures": {}, "about": {}}


def shown(name: str) -> str:
    """The name of a measure in words."""
    return name.replace("_", " ")


def nearest(
    queries: NDArray[np.floating[Any]], training: NDArray[np.floating[Any]], count: int = 1
) -> tuple[Floats, NDArray[np.int64]]:
    """Distances ``(Q, count)`` of each row to the nearest training rows, and which these are; nearest first.

    Candidates are found by a matrix product; their distances are then computed exactly, so that a copy is at 0. Raises
    InputError where rows do not fit each other or hold what is no number: then nothing is known to be far.
    """
    asked, known = (np.ascontiguousarray(rows, dtype=np.float32) for rows in (queries, training))
    if len(known) < count or asked.ndim != 2 or asked.shape[1:] != known.shape[1:]:
        raise InputError(f"{len(known)} training rows of {known.shape[1:]} do not fit rows of {asked.shape[1:]}")
    for rows, words in ((asked, "rows that are compared"), (known, "training rows")):
        if wrong := int((~np.isfinite(rows)).any(axis=1).sum()):
            raise InputError(
                f"{wrong} of {len(rows)} {words} hold what is no number, so nothing can be measured by them"
            )
    middle = known.mean(0)
    centred, lengths = known - middle, ((known - middle) ** 2).sum(1)
    take = min(len(known), max(_CANDIDATES, 2 * count))
    distances, which = [np.empty((0, count))], [np.empty((0, count), dtype=np.int64)]
    for start in range(0, len(asked), _CHUNK):
        some = asked[start : start + _CHUNK]
        rough = lengths[None] - 2 * (some - middle) @ centred.T
        near = np.argpartition(rough, take - 1, axis=1)[:, :take]
        exact = np.stack(
            [
                np.linalg.norm(known[index].astype(np.float64) - row, axis=1)
                for index, row in zip(near, some, strict=True)
            ]
        )
        order = np.argsort(exact, axis=1, kind="stable")[:, :count]
        distances.append(np.take_along_axis(exact, order, 1))
        which.append(np.take_along_axis(near, order, 1))
    return np.concatenate(distances), np.concatenate(which)


def threshold(held_out: Floats) -> float:
    """The 1st percentile of held-out distances: the ``ceil(H / 100)``-th smallest."""
    return float(np.sort(held_out)[math.ceil(EXPECTED * len(held_out)) - 1])


def closer(synthetic: Floats, held_out: Floats, what: str) -> Measure:
    """The share of distances ``(S,)`` to training below the 1st percentile of the held-out ones' ``(H,)``."""
    if len(held_out) < FEWEST_HELD_OUT:
        return unmeasured(f"{len(held_out)} held-out cases are too few; it needs {FEWEST_HELD_OUT}")
    if not len(synthetic):
        return unmeasured("there is no synthetic case")
    if not (np.isfinite(synthetic).all() and np.isfinite(held_out).all()):
        return unmeasured("a distance is no number")
    limit = threshold(held_out)
    found = share(synthetic < limit)
    assert found.ends is not None
    facts = {
        "threshold": limit,
        "expected": EXPECTED,
        "median": float(np.median(synthetic)),
        "median_held_out": float(np.median(held_out)),
        "held_out": len(held_out),
    }
    text = (
        f"{found.value:.1%} ({found.ends[0]:.1%} to {found.ends[1]:.1%}) of {found.n} are nearer to training {what}"
        f" than 99% of held-out ones are; the limit is {SHARE_LIMIT:.0%}"
    )
    return Measure(judged(found.ends, SHARE_LIMIT), text, found.value, found.ends, found.n, SHARE_LIMIT, facts)


def judged(ends: tuple[float, float], limit: float) -> Verdict:
    """What an interval says of a limit that must not be passed."""
    return "passed" if ends[1] <= limit else "failed" if ends[0] > limit else "not assessed"


def nearness(held_out: Floats) -> float:
    """How near to a training image a copy is: ``COPY`` times the 1st percentile of held-out distances ``(H,)``.

    Not their least one: a single real image that resembles a training image would set it to nothing.
    """
    return COPY * threshold(held_out)


def copies(distances: Mapping[str, tuple[Floats, Floats]], names: Sequence[str], same: Sequence[bool] = ()) -> Measure:
    """Synthetic cases that are copies: far nearer to training than held-out ones, in any of the spaces. One fails.

    ``distances`` holds, by space, those of synthetic ``(S,)`` and held-out ``(H,)`` cases to training. ``names`` are
    the synthetic cases' ids; ``same`` says which are training images pixel by pixel, wherever the limits lie.
    """
    fewest = min(len(held) for _, held in distances.values())
    found = np.array(same or [False] * len(names), dtype=bool)
    if not found.any():
        if fewest < FEWEST_HELD_OUT or not names:
            return unmeasured(f"{fewest} held-out and {len(names)} synthetic cases; it needs {FEWEST_HELD_OUT} and 1")
        if not all(np.isfinite(side).all() for sides in distances.values() for side in sides):
            return unmeasured("a distance is no number")
    limits = {space: nearness(held_out) for space, (_, held_out) in distances.items() if len(held_out)}
    for space, (own, _) in distances.items():
        found |= own <= limits.get(space, 0.0)
    who = [name for name, hit in zip(names, found.tolist(), strict=True) if hit]
    facts = {"threshold": limits, "cases": who[:NAMED]}
    if not who and (zero := [space for space, limit in limits.items() if not limit]):
        return unmeasured(f"by {zero[0]}, 1% of the held-out images or more are training images: nothing can be nearer")
    text = (
        f"{len(who)} of {len(names)} are no more than half as far from a training image as 99% of held-out ones, or are"
        " the same image"
    )
    ends = wilson(len(who), len(names))
    return Measure("failed" if who else "passed", text, len(who) / len(names), ends, len(names), 0.0, facts)


def authenticity(synthetic: Floats, training: Floats, held_out: Floats) -> Measure:
    """Share of rows farther from their nearest training row than that is from its own nearest (Alaa et al. 2022).

    Beside it stands that of held-out rows. It describes and decides nothing: images that are more typical than real
    ones lower it as copies do.
    """
    own, who = nearest(synthetic, training)
    other, whom = nearest(held_out, training)
    asked, index = np.unique(np.concatenate([who[:, 0], whom[:, 0]]), return_inverse=True)
    gaps = nearest(training[asked], training, 2)[0][:, 1]
    mine, theirs = gaps[index[: len(own)]], gaps[index[len(own) :]]
    found, base = share(own[:, 0] > mine), share(other[:, 0] > theirs)
    gap = difference(found, base)
    text = f"{found.value:.1%} of synthetic images are authentic, and {base.value:.1%} of held-out ones"
    return Measure(None, text, found.value, found.ends, found.n, None, {"held_out": base.to_json(), "difference": gap})


def membership(members: Floats, others: Floats) -> Measure:
    """Can the losses of training cases ``(T,)`` be told from held-out ones' ``(H,)``? (Yeom et al. 2018).

    The area under the curve of "a lower loss is a training case", with DeLong's interval (1988), and, at the threshold
    below which 1 % of the held-out cases are, the share of training cases (Carlini et al. 2022). Both have a limit. An
    area as far below 0.5 as the limit is above it says that the cases are not what they are said to be: no pass.
    """
    if min(len(members), len(others)) < FEWEST_HELD_OUT or not (
        np.isfinite(members).all() and np.isfinite(others).all()
    ):
        return unmeasured(
            f"{len(members)} losses of training and {len(others)} of held-out cases; it needs {FEWEST_HELD_OUT} of"
            " each, all of them numbers"
        )
    value, ends = auc(members, others)
    caught = closer(members, others, "cases")
    assert caught.ci95 is not None
    upside_down = ends[0] < 1 - AUC_LIMIT
    verdicts = (judged(ends, AUC_LIMIT), caught.verdict, "not assessed" if upside_down else "passed")
    verdict: Verdict = "failed" if "failed" in verdicts else "not assessed" if "not assessed" in verdicts else "passed"
    text = (
        f"the loss tells training from held-out images with an area under the curve of {value:.3f} ({ends[0]:.3f} to"
        f" {ends[1]:.3f}; 0.5 is a guess, the limit {AUC_LIMIT}), and {caught.value:.1%} ({caught.ci95[0]:.1%} to"
        f" {caught.ci95[1]:.1%}) of training images at 1% false alarms; the limit is {SHARE_LIMIT:.0%}"
    )
    if upside_down:
        text += (
            f"; so far below {1 - AUC_LIMIT:g} the held-out images are known better than the training ones, and one of"
            " the two sets is not what it is said to be"
        )
    facts = {"at_1_percent": {"value": caught.value, "ci95": list(caught.ci95), "limit": SHARE_LIMIT}}
    return Measure(verdict, text, value, ends, len(members), AUC_LIMIT, {**facts, "held_out": len(others)})


def auc(members: Floats, others: Floats) -> tuple[float, tuple[float, float]]:
    """Probability that a member's loss is the lower one (a tie is half), and its 95 % interval (DeLong et al. 1988)."""
    below = (members[:, None] < others[None]) + 0.5 * (members[:, None] == others[None])
    value = float(below.mean())
    # The variances of the two means, with one added so that a perfect separation does not claim certainty.
    variance = below.mean(1).var(ddof=1) / len(members) + below.mean(0).var(ddof=1) / len(others)
    floor = 0.25 / min(len(members), len(others)) ** 2
    half = 1.96 * math.sqrt(max(variance, floor))
    return value, (max(0.0, value - half), min(1.0, value + half))


def closest_records(
    rows: Sequence[Mapping[str, Value]],
    training: Sequence[Mapping[str, Value]],
    held_out: Sequence[Mapping[str, Value]],
    kinds: Mapping[str, str],
) -> Measure:
    """Are table rows nearer to training rows than held-out ones are? By Gower's distance (1971) over ``kinds``.

    Where 1 % of the held-out rows have twins in the training table, a twin says nothing of a person: then the measure
    describes, and decides nothing.
    """
    from diffalign.synthesis.tabular import gower

    there = [{name for row in side for name in row} for side in (training, held_out)]
    columns = {name: kind for name, kind in kinds.items() if all(name in side for side in there)}
    if not (rows and training and held_out and columns):
        return unmeasured("training and held-out images have no table with these columns")
    own, other = gower(rows, training, columns), gower(held_out, training, columns)
    if len(other) < FEWEST_HELD_OUT:
        return unmeasured(f"{len(other)} held-out rows are too few; it needs {FEWEST_HELD_OUT}")
    if threshold(other) > 0:
        return closer(own, other, "rows")
    twins, base = share(own == 0), share(other == 0)
    text = (
        f"{base.value:.0%} of held-out rows have a twin in the training table, so that a twin gives nobody away"
        f" ({twins.value:.0%} of synthetic rows have one)"
    )
    return Measure(
        None, text, twins.value, twins.ends, twins.n, None, {"held_out": base.to_json(), "columns": [*columns]}
    )
