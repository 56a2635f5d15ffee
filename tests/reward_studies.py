"""Small studies with a known answer, for the tests of reward models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.preferences import write
from diffalign.types import Preference, Prompt, Sample
from diffalign.worlds import brain_mr, emoji
from rewards.fit_config import FitConfig
from rewards.fit_data import Study

DIMENSIONS = 16


def config(**fields: object) -> FitConfig:
    """A configuration whose file does not matter, with heads that are small and learn fast."""
    quick = {"preferences": "pairs.parquet", "learning_curve": False, "hidden": 8, "learning_rate": 3e-3}
    return FitConfig.model_validate(quick | fields)


def logistic(rng: np.random.Generator, *, ties: float = 0.0) -> Callable[[float], float]:
    """A rater who draws from the model of Davidson (1970): odds of win : tie : loss are e^(d/2) : v : e^(-d/2)."""

    def judge(difference: float) -> float:
        odds = np.array([np.exp(difference / 2), ties, np.exp(-difference / 2)])
        return float(rng.choice([1.0, 0.5, 0.0], p=odds / odds.sum()))

    return judge


def study(
    pairs: int,
    prompts: int = 60,
    seed: int = 0,
    ties: float = 0.0,
    raters: Mapping[str, Callable[[float], float]] | None = None,
    gain: float = 6.0,
) -> tuple[Study, Tensor]:
    """Pairs of random unit vectors judged by a hidden direction, and the true differences ``(P,)``.

    Raters take turns after each round of prompts; each gets the true difference and answers a label. A difference has
    standard deviation ``gain * sqrt(2 / 16)``, as each coordinate of a random unit vector has variance 1 / 16.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.nn.functional.normalize(torch.randn(2 * pairs, DIMENSIONS, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(torch.randn(prompts, DIMENSIONS, generator=generator), dim=1)
    # The direction is the same whatever the seed: a second study asks about the same utility.
    hidden = torch.nn.functional.normalize(torch.arange(1.0, DIMENSIONS + 1).cos(), dim=0)
    utility = gain * images @ hidden
    first, second = torch.arange(pairs), torch.arange(pairs, 2 * pairs)
    difference = utility[first] - utility[second]
    judges = raters or {"one": logistic(rng, ties=ties)}
    names = [list(judges)[i // prompts % len(judges)] for i in range(pairs)]
    labels = [judges[name](float(d)) for name, d in zip(names, difference, strict=True)]
    text = torch.arange(pairs) % prompts
    made = Study(
        images=images,
        texts=texts,
        brightness=torch.rand(2 * pairs, generator=generator),
        first=first,
        second=second,
        text=text,
        label=torch.tensor(labels),
        strength=torch.ones(pairs),
        criterion=["overall"] * pairs,
        rater=names,
        group=[f"prompt {n}" for n in text.tolist()],
        attributes=[{"kind": "even" if n % 2 == 0 else "odd"} for n in text.tolist()],
        digest="sha256:0",
    )
    return made, difference


def swapped(made: Study) -> Study:
    """The same judgements with the sides exchanged."""
    return dataclasses.replace(made, first=made.second, second=made.first, label=1 - made.label)


def emoji_pairs(count: int, seed: int = 0, rater: str = "r0") -> list[Preference]:
    """Emoji scenes, three pairs a prompt; a rater prefers, with little noise, the one whose background is right."""
    rng = np.random.default_rng(seed)
    prompts = emoji.prompts("train", max(1, count // 3), seed)
    made = []
    for i in range(count):
        asked = prompts[i % len(prompts)]
        scenes = [_emoji(asked, right, int(rng.integers(2**31))) for right in (True, False)]
        turned = bool(rng.random() < 0.5)
        noisy = bool(rng.random() < 0.1)
        first, second = reversed(scenes) if turned else scenes
        label = float(turned == noisy) if rng.random() < 0.9 else 0.5
        made.append(Preference(asked, Sample(asked, first), Sample(asked, second), label, rater=rater))
    return made


def _emoji(asked: Prompt, right: bool, seed: int) -> Image.Image:
    backgrounds = emoji.BACKGROUNDS
    other = backgrounds[(backgrounds.index(str(asked.attributes["background"])) + 1 + seed % 4) % len(backgrounds)]
    attributes = dict(asked.attributes) | ({} if right else {"background": other})
    return emoji.render(attributes, seed).image


def brain_pairs(count: int, seed: int = 0) -> list[Preference]:
    """Brain scenes judged by two criteria: is the contrast as asked, and is the noise low."""
    rng = np.random.default_rng(seed)
    prompts = brain_mr.prompts("train", max(1, count // 3), seed)
    made = []
    for i in range(count):
        asked = prompts[i % len(prompts)]
        right = [bool(rng.random() < 0.5) for _ in range(2)]
        noise = [float(rng.choice([0, 40])) for _ in range(2)]
        sides = [brain(asked, int(rng.integers(2**31)), r, n) for r, n in zip(right, noise, strict=True)]
        first, second = (Sample(asked, side) for side in sides)
        for criterion, better in (("contrast as asked", right[0] - right[1]), ("image quality", noise[1] - noise[0])):
            label = 0.5 if better == 0 else float((better > 0) == (rng.random() < 0.9))
            made.append(Preference(asked, first, second, label, criterion=criterion, rater=f"r{i % 2}"))
    return made


def brain(asked: Prompt, seed: int, right: bool = True, noise: float = 0.0) -> Image.Image:
    """A slice for a prompt, or one of another contrast, with white noise of this standard deviation in grey levels."""
    contrasts = brain_mr.CONTRASTS
    other = contrasts[(contrasts.index(str(asked.attributes["contrast"])) + 1 + seed % 2) % 3]
    image = brain_mr.render(dict(asked.attributes) | ({} if right else {"contrast": other}), seed).image
    if not noise:
        return image
    levels = np.asarray(image, dtype=np.float64) + np.random.default_rng(seed).normal(0, noise, (64, 64, 1))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def file(path: Path, pairs: Sequence[Preference]) -> Path:
    """The pairs as a native file."""
    write(path, pairs)
    return path
