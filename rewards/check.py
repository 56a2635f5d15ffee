"""Whether a reward is fit to train on, answered in sentences (``diffalign reward check SPEC``).

Shape legend: ``B`` samples.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from diffalign.errors import InputError
from diffalign.images import to_rgb, to_tensor
from diffalign.seeds import derive
from diffalign.types import Modality, Prompt, Reward, Sample, Scores
from diffalign.worlds import findings

Severity = Literal["ok", "warning", "problem"]

WORLDS = ("emoji", "brain-mr")


@dataclass(frozen=True)
class Finding:
    """One answer."""

    severity: Severity
    topic: str
    """A stable word, such as ``finite`` or ``speed``."""
    message: str
    """One sentence."""


@dataclass(frozen=True)
class Report:
    """All answers about one reward, in the order in which they were asked."""

    reward: str
    findings: tuple[Finding, ...]

    @property
    def severity(self) -> Severity:
        """The gravest of the findings."""
        found = {finding.severity for finding in self.findings}
        return "problem" if "problem" in found else "warning" if "warning" in found else "ok"

    @property
    def fit(self) -> bool:
        """Whether nothing speaks against training on it."""
        return self.severity != "problem"

    @property
    def verdict(self) -> str:
        """The overall answer in one sentence."""
        problems, warnings = (sum(f.severity == s for f in self.findings) for s in ("problem", "warning"))
        if problems:
            return f"{self.reward} is not fit to train on: {problems} problem{'s' * (problems > 1)}."
        if warnings:
            return f"{self.reward} can be trained on; mind {warnings} warning{'s' * (warnings > 1)}."
        return f"{self.reward} is fit to train on."

    def __str__(self) -> str:
        width = max((len(finding.topic) for finding in self.findings), default=0)
        lines = [f"{f.severity:<8} {f.topic:<{width}}  {f.message}" for f in self.findings]
        return "\n".join([*lines, self.verdict])


class _UnusableError(Exception):
    """What was found leaves nothing more to ask."""


def check(reward: Reward, samples: Sequence[Sample] | None = None) -> Report:
    """Asks the reward about samples in several ways; without samples, about ``probes``.

    At least eight samples of different quality are needed, some right for their prompt and some wrong: on good ones
    alone a checker is rightly constant.
    """
    samples = probes(reward) if samples is None else samples
    if len(samples) < 8:
        raise InputError(f"a reward is checked on at least 8 samples; got {len(samples)}")
    findings: list[Finding] = []
    say = _Speaker(findings)
    try:
        total = _first_call(reward, samples, say)
        _spread(reward, total, say)
        _determinism(reward, samples, total, say)
        _independence(reward, samples, total, say)
        _empty(reward, say)
        if all((sample.text if reward.modality == "text" else sample.image) is not None for sample in samples):
            _sensitivity(reward, samples, total, say)
        if reward.modality == "image" and all(sample.image is not None for sample in samples):
            _gradient(reward, samples, total, say)
    except _UnusableError:
        pass
    return Report(reward.name, tuple(findings))


def probes(reward: Reward, count: int = 48, seed: int = 0) -> list[Sample]:
    """Samples of the embedded world that a reward can judge best: a third of them right for their prompt.

    The others show a scene of another prompt, and half of the images are noisy; of texts, those of the findings world.
    """
    if reward.modality == "text":
        return _texts(count, seed)
    choices = [_scenes(world, count, seed) for world in WORLDS]

    def judged(samples: list[Sample]) -> float:
        try:
            return float(_call(reward, samples[:8]).total.isfinite().float().mean())
        except Exception:  # what goes wrong is for `check` to tell
            return 0.0

    return max(choices, key=judged)


def _texts(count: int, seed: int) -> list[Sample]:
    examples = [findings.example(derive(seed, "reward check", "findings", i)) for i in range(count)]
    return [
        Sample(one.prompt, text=(one if i % 3 == 0 else examples[i - 1]).text, seed=i) for i, one in enumerate(examples)
    ]


def _scenes(world: str, count: int, seed: int) -> list[Sample]:
    module = import_module(f"diffalign.worlds.{world.replace('-', '_')}")
    scenes = [module.scene(derive(seed, "reward check", world, i)) for i in range(count)]
    samples = []
    for i, scene in enumerate(scenes):
        image: Image.Image = scene.image if i % 3 == 0 else scenes[i - 1].image
        if i % 2:
            noise = np.random.default_rng(derive(seed, "noise", i)).normal(0, 8 * (1 + i % 8), (*image.size[::-1], 3))
            image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        prompt: Prompt = scene.prompt
        samples.append(Sample(prompt, image, seed=i))
    return samples


class _Speaker:
    def __init__(self, findings: list[Finding]) -> None:
        self._findings = findings

    def __call__(self, severity: Severity, topic: str, message: str) -> None:
        self._findings.append(Finding(severity, topic, message))


def _call(reward: Reward, samples: Sequence[Sample]) -> Scores:
    with torch.no_grad():
        return reward(samples)


def _first_call(reward: Reward, samples: Sequence[Sample], say: _Speaker) -> Tensor:
    before = [sample.image and sample.image.tobytes() for sample in samples]
    try:
        _call(reward, samples[:1])  # loads what is loaded lazily, which is no part of the speed
        start = time.perf_counter()
        scores = _call(reward, samples)
        seconds = time.perf_counter() - start
    except Exception as error:
        say("problem", "call", f"it failed on {len(samples)} samples: {type(error).__name__}: {error}")
        raise _UnusableError from None
    if type(scores) is not Scores:
        say("problem", "call", f"it returned a {type(scores).__name__}; it must return Scores.")
        raise _UnusableError
    columns = {"total": scores.total, **scores.parts}
    odd = [f"{name} {part.dtype} {tuple(part.shape)}" for name, part in columns.items() if not _fits(part, len(before))]
    if odd:
        say("problem", "call", f"every column must be float32 ({len(before)},) on the CPU; there is {', '.join(odd)}.")
        raise _UnusableError
    if before != [sample.image and sample.image.tobytes() for sample in samples]:
        say("problem", "call", "it changes the images that it is given; it must work on a copy.")
    each = seconds / len(samples) * 1000
    slow = "; training will mostly wait for it" if each > 1000 else ""
    say("warning" if slow else "ok", "speed", f"it takes {each:.3g} ms a sample in a batch of {len(samples)}{slow}.")
    return scores.total


def _fits(part: Tensor, count: int) -> bool:
    return part.dtype == torch.float32 and part.shape == (count,) and part.device.type == "cpu"


def _spread(reward: Reward, total: Tensor, say: _Speaker) -> None:
    finite = total[total.isfinite()]
    share = len(finite) / len(total)
    if share < 1:
        enough: Severity = "warning" if share >= 0.95 else "problem"
        say(enough, "finite", f"{len(total) - len(finite)} of {len(total)} scores are NaN or infinite.")
    else:
        say("ok", "finite", f"all {len(total)} scores are finite.")
    if not len(finite):
        raise _UnusableError
    low, high = reward.range
    slack = 1e-5 * max((abs(end) for end in (low, high) if math.isfinite(end)), default=0.0)
    outside = int(((finite < low - slack) | (finite > high + slack)).sum())
    seen = f"{float(finite.min()):.4g} to {float(finite.max()):.4g} {reward.unit}"
    if outside:
        say("problem", "range", f"{outside} scores lie outside its declared range {low:g} to {high:g}: {seen}.")
    else:
        say("ok", "range", f"scores run from {seen}, inside its declared range {low:g} to {high:g}.")
    values, counts = finite.unique(return_counts=True)
    if len(values) == 1:
        say("problem", "spread", f"every score is {float(values[0]):.4g}; a constant teaches nothing.")
        raise _UnusableError
    commonest, often = float(values[counts.argmax()]), int(counts.max()) / len(finite)
    if often > 0.5:
        bound = ", an end of its range (it is saturated)" if commonest in (low, high) else ""
        say("warning", "ties", f"{often:.0%} of the scores are {commonest:.4g}{bound}: those cannot be told apart.")
    else:
        say("ok", "ties", f"{len(values)} different scores; the commonest is {often:.0%} of them.")


def _determinism(reward: Reward, samples: Sequence[Sample], total: Tensor, say: _Speaker) -> None:
    gap = _gap(total, _call(reward, samples).total)
    if gap > _noise(total):
        say("problem", "determinism", f"the same samples got other scores the second time (up to {gap:.2g} apart).")
    else:
        say("ok", "determinism", "the same samples get the same scores twice.")


def _independence(reward: Reward, samples: Sequence[Sample], total: Tensor, say: _Speaker) -> None:
    few = range(min(len(samples), 16))
    alone = torch.cat([_call(reward, [samples[i]]).total for i in few])
    turned = _call(reward, list(reversed(samples))).total.flip(0)
    gaps = {"alone": _gap(total[: len(alone)], alone), "in another order": _gap(total, turned)}
    told = [f"{how} (up to {gap:.2g})" for how, gap in gaps.items() if gap > _noise(total)]
    if told:
        say("problem", "batch", f"the score of a sample changes when it is judged {' and '.join(told)}.")
    else:
        say("ok", "batch", "the score of a sample does not depend on its batch.")


def _empty(reward: Reward, say: _Speaker) -> None:
    try:
        fine = _call(reward, []).total.shape == (0,)
    except Exception as error:
        say("warning", "empty", f"an empty batch makes it fail ({type(error).__name__}); it should return no scores.")
        return
    if not fine:
        say("warning", "empty", "an empty batch should get no scores.")


def _sensitivity(reward: Reward, samples: Sequence[Sample], total: Tensor, say: _Speaker) -> None:
    """What nobody can see should hardly move the score: it would be the first thing that training finds."""
    spread = float(total[total.isfinite()].std())
    for name, change in CHANGES[reward.modality].items():
        changed = [change(sample) for sample in samples]
        moved = (_call(reward, changed).total - total).abs()
        moved = moved[moved.isfinite()]
        if not len(moved):
            say("problem", "sensitivity", f"after {name} no score is finite.")
            continue
        share = float(moved.median()) / spread
        brittle = "; it rewards what cannot be seen" if share > 0.5 else ""
        severity: Severity = "warning" if brittle else "ok"
        say(severity, "sensitivity", f"{name} moves the median score by {share:.2f} of their spread{brittle}.")


def _redrawn(change: Callable[[Image.Image], Image.Image]) -> Callable[[Sample], Sample]:
    return lambda sample: sample if sample.image is None else replace(sample, image=change(to_rgb(sample.image)))


def _respaced(change: Callable[[str], str]) -> Callable[[Sample], Sample]:
    return lambda sample: sample if sample.text is None else replace(sample, text=change(sample.text))


def _shift(image: Image.Image) -> Image.Image:
    moved = ImageChops.offset(image, 1, 0)
    moved.paste(image.crop((0, 0, 1, image.height)), (0, 0))
    return moved


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, subsampling=0)
    return to_rgb(Image.open(buffer))


CHANGES: Mapping[Modality, Mapping[str, Callable[[Sample], Sample]]] = {
    "image": {"a shift by one pixel": _redrawn(_shift), "JPEG 95": _redrawn(_jpeg)},
    "text": {
        "a line break at the end": _respaced(lambda text: text + "\n"),
        "doubled spaces": _respaced(lambda text: text.replace(" ", "  ")),
    },
}
"""What nobody would see, by modality."""


def _gradient(reward: Reward, samples: Sequence[Sample], total: Tensor, say: _Speaker) -> None:
    form = getattr(reward, "differentiable", None)
    if form is None:
        return
    few = list(samples[:8])
    pixels = to_tensor([to_rgb(s.image) for s in few if s.image is not None]).requires_grad_()
    try:
        scores = form(pixels, [sample.prompt for sample in few])
        (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    except Exception as error:
        say("problem", "gradient", f"its differentiable form failed: {type(error).__name__}: {error}")
        return
    gap = _gap(total[: len(few)], scores.detach().float().cpu()) / float(total[total.isfinite()].std())
    if not bool(gradient.isfinite().all()) or not bool((gradient.flatten(1).abs().amax(1) > 0).all()):
        say("problem", "gradient", "its differentiable form gives a sample a gradient that is zero, NaN or infinite.")
    elif gap > 0.25:
        say("problem", "gradient", f"its differentiable form is up to {gap:.2f} of the scores' spread off its score.")
    else:
        say("ok", "gradient", f"its differentiable form has a gradient, and is within {gap:.2g} spreads of its score.")


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference; a score that is NaN or infinite in only one of the two is infinitely far."""
    if a.shape != b.shape:
        return math.inf
    both = a.isfinite() & b.isfinite()
    if bool(((a.isfinite() != b.isfinite()) | (~both & ~((a == b) | (a.isnan() & b.isnan())))).any()):
        return math.inf
    return float((a[both].double() - b[both].double()).abs().max()) if bool(both.any()) else 0.0


def _noise(total: Tensor) -> float:
    """The largest difference that counts as floating-point noise."""
    finite = total[total.isfinite()].double()
    return 1e-6 * float(finite.abs().max()) + 1e-3 * float(finite.std())
