"""How like real images synthetic ones are, and how varied, by the features that one encoder gives them.

Numbers by different encoders are not comparable, and neither are numbers of sets of different size where the text says
so. All of them reward copies of the real images, so privacy is reported beside them.

Shape legend: ``N`` synthetic images, ``M`` real ones, ``D`` features, ``R`` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from diffalign.errors import InputError
from diffalign.synthesis.estimates import RESAMPLES, Estimate, Floats, share, spread, weights

Kernel = Callable[[Floats, Floats], Floats]
NEAREST = 5
"""Neighbours that a ball of precision, recall, density and coverage reaches to (Naeem et al. 2020)."""
SIGMA = 10.0
"""Width of CMMD's kernel (Jayasumana et al. 2024)."""
CMMD_SCALE = 1000.0
FEW = 2048
"""Below so many cases a note says what follows."""
LEAST = 20
"""Cases of a stratum, synthetic and real each, that it needs to be measured by itself."""
PARTS = 20
"""Parts of the cases that are left out in turn for the interval of the Vendi score."""
LESS_IS_BETTER = frozenset({"kid", "cmmd"})


def fidelity(
    synthetic: Floats, real: Floats, *, clip: bool = True, k: int = NEAREST, seed: int = 0
) -> dict[str, Estimate]:
    """KID, CMMD, precision, recall, density, coverage and Vendi scores of features ``(N, D)`` against ``(M, D)``.

    ``clip`` says that an image tower of a CLIP gave the features, for which alone CMMD is defined. Sets of features of
    the same real images draw the same resamples of them, so that two datasets can be compared by ``difference``. Raises
    InputError for features that are not numbers, do not fit together, or are too few.
    """
    synthetic, real = check(synthetic, k), check(real, k)
    if synthetic.shape[1] != real.shape[1]:
        raise InputError(
            f"features of {synthetic.shape[1]} and of {real.shape[1]} numbers are of two encoders; compare by one"
        )
    n, m = len(synthetic), len(real)
    drawn, drawn_real = weights(n, seed, "synthetic"), weights(m, seed, "real")
    found = {"kid": mmd(*_kernels(polynomial, synthetic, real), drawn, drawn_real)}
    if clip:
        found["cmmd"] = mmd(*_kernels(gaussian, unit(synthetic), unit(real)), drawn, drawn_real)
    found |= neighbourhoods(synthetic, real, k, drawn, drawn_real)
    found["vendi"] = vendi(synthetic, seed)
    few = min(n, m)
    found["vendi_real"] = vendi(real[np.random.default_rng(seed).permutation(m)[:few]], seed)
    return found


def check(features: Floats, k: int = NEAREST) -> Floats:
    """The features as float64 ``(N, D)``; raises InputError where they are none."""
    found = np.asarray(features, dtype=np.float64)
    if found.ndim != 2 or not np.isfinite(found).all():
        raise InputError("features are finite numbers, a row for each image")
    if len(found) < k + 1:
        raise InputError(f"{len(found)} images are too few: their {k} nearest neighbours are asked for")
    return found


def unit(features: Floats) -> Floats:
    """Each row at length 1."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def _kernels(kernel: Kernel, synthetic: Floats, real: Floats) -> tuple[Floats, Floats, Floats]:
    return kernel(synthetic, synthetic), kernel(synthetic, real), kernel(real, real)


def polynomial(first: Floats, second: Floats) -> Floats:
    """KID's kernel ``(x·y / D + 1)^3`` (Binkowski et al. 2018)."""
    kernel: Floats = (first @ second.T / first.shape[1] + 1) ** 3
    return kernel


def gaussian(first: Floats, second: Floats) -> Floats:
    """CMMD's kernel ``1000 exp(-|x - y|² / 2σ²)``, of unit vectors."""
    kernel: Floats = CMMD_SCALE * np.exp(-cdist(first, second, "sqeuclidean") / (2 * SIGMA**2))
    return kernel


def mmd(own: Floats, cross: Floats, other: Floats, drawn: Floats, drawn_other: Floats) -> Estimate:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, eq. 3), of kernel matrices.

    ``own (N, N)``, ``cross (N, M)``, ``other (M, M)``. About 0 for two samples of one distribution, by chance below
    it, and below it for exact copies. In a resample the pairs of a case with itself are left out, as in the estimate;
    where the distributions are the same the interval is too wide, never too narrow.
    """
    replicates = _within(own, drawn) + _within(other, drawn_other)
    replicates -= 2 * ((drawn @ cross) * drawn_other).sum(1) / (own.shape[0] * other.shape[0])
    ones, ones_other = np.ones((1, len(own))), np.ones((1, len(other)))
    value = float((_within(own, ones) + _within(other, ones_other))[0] - 2 * cross.mean())
    return spread(value, replicates, len(own))


def _within(kernel: Floats, drawn: Floats) -> Floats:
    """``(R,)``: mean of the kernel over pairs of two different cases, as often as they were drawn."""
    n = len(kernel)
    squares = drawn**2
    found: Floats = (((drawn @ kernel) * drawn).sum(1) - squares @ np.diag(kernel)) / (n * n - squares.sum(1))
    return found


def neighbourhoods(
    synthetic: Floats, real: Floats, k: int, drawn: Floats | None = None, drawn_real: Floats | None = None
) -> dict[str, Estimate]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), with balls of ``k``.

    The intervals are over the cases that are averaged: synthetic ones for precision and density, real ones for recall
    and coverage. The balls of the others stay as they are, so the intervals are a little narrow.
    """
    drawn = weights(len(synthetic), 0, "synthetic") if drawn is None else drawn
    between = cdist(real, synthetic)
    reach_real, reach = (_reach(features, k) for features in (real, synthetic))
    inside = between < reach_real[:, None]
    counts = inside.sum(0) / k
    return {
        "precision": share(inside.any(0), drawn),
        "recall": share((between < reach[None]).any(1), drawn_real),
        "density": spread(float(counts.mean()), drawn @ counts / len(counts), len(synthetic), (0.0, math.inf)),
        "coverage": share(inside.any(1), drawn_real),
    }


def _reach(features: Floats, k: int) -> Floats:
    """Distance ``(N,)`` of each to its ``k``-th nearest other one."""
    found: Floats = np.partition(cdist(features, features), k, axis=1)[:, k]
    return found


def expected_coverage(n: int, m: int, k: int = NEAREST) -> float:
    """Coverage of ``m`` real cases by ``n`` others of the same distribution (Naeem et al. 2020, lemma 2)."""
    return 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))


def vendi(features: Floats, seed: int = 0) -> Estimate:
    """Vendi score with the cosine as its kernel (Friedman & Dieng 2023): how many different images the set is worth.

    Between 1 and the smaller of ``N`` and ``D``; it grows with ``N``. Resampling would repeat images, so the interval
    leaves out parts of the set in turn (delete-group jackknife, Kott 2001).
    """
    vectors = unit(features)
    value, n = _vendi(vectors), len(vectors)
    part = np.random.default_rng(seed).permutation(n) % min(PARTS, n)
    left = np.array([_vendi(vectors[part != i]) for i in range(min(PARTS, n))])
    error = math.sqrt((len(left) - 1) / len(left) * float(((left - left.mean()) ** 2).sum()))
    return Estimate(value, (max(1.0, value - 1.96 * error), value + 1.96 * error), n)


def _vendi(vectors: Floats) -> float:
    gram = vectors.T @ vectors if len(vectors) > vectors.shape[1] else vectors @ vectors.T
    shares = np.clip(np.linalg.eigvalsh(gram / len(vectors)), 0, None)
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def groups(
    own: Sequence[Mapping[str, str]], other: Sequence[Mapping[str, str]]
) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
    """Groups that both sets have: name, synthetic cases, real ones. Each case says, by kind, which groups it is in."""
    names: dict[str, tuple[list[int], list[int]]] = {}
    for side, cases in enumerate((own, other)):
        for i, labels in enumerate(cases):
            for kind, label in labels.items():
                names.setdefault(f"{kind}: {label}", ([], []))[side].append(i)
    for name, (first, second) in sorted(names.items()):
        if first and second:
            yield name, np.array(first), np.array(second)


def by_group(
    synthetic: Floats,
    real: Floats,
    own: Sequence[Mapping[str, str]],
    other: Sequence[Mapping[str, str]],
    *,
    clip: bool = True,
    k: int = NEAREST,
) -> tuple[dict[str, dict[str, Estimate]], list[str]]:
    """``fidelity`` in every group that has ``LEAST`` cases on both sides, and the names of those that have fewer."""
    found, few = {}, []
    for name, first, second in groups(own, other):
        if min(len(first), len(second)) < LEAST:
            few.append(name)
        else:
            found[name] = fidelity(synthetic[first], real[second], clip=clip, k=k)
    return found, few


def notes(n: int, m: int, k: int = NEAREST) -> list[str]:
    """What to mind when reading the numbers of sets of these sizes."""
    said = [
        f"For {n} cases of the very distribution of the {m} real ones, coverage would be"
        f" {expected_coverage(n, m, k):.2f}.",
        "Fidelity rewards copies: read it beside the privacy report.",
    ]
    if min(n, m) < FEW:
        said.append(
            f"Fewer than {FEW} cases ({min(n, m)}): precision, recall, density, coverage and Vendi scores depend on"
            " the number of cases, so compare them with those of as many cases only; KID and CMMD do not, but their"
            f" intervals are wide ({RESAMPLES} resamples)."
        )
    return said
