"""`reward check` against rewards that are wrong in one known way each."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import InputError
from diffalign.types import Prompt, Sample, Scores
from rewards.check import Report, check, probes
from rewards.jpeg import Compressibility
from rewards.registry import load


def brightness(samples: Sequence[Sample]) -> list[float]:
    return [float(np.asarray(s.image, np.float64).mean()) / 255 for s in samples]


class Scripted:
    """Scores by a plain function, and says of itself what it is told to."""

    name = "scripted"
    modality = "image"
    unit = "fraction"
    higher_is_better = True

    def __init__(
        self,
        function: Callable[[Sequence[Sample]], object] = brightness,
        bounds: tuple[float, float] = (0.0, 1.0),
        **form: object,
    ) -> None:
        self.function, self.range = function, bounds
        vars(self).update(form)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        return Scores(torch.tensor(self.function(samples), dtype=torch.float32))


def gradients(count: int = 16) -> list[Sample]:
    """Smooth pictures of different brightness."""
    ramp = np.linspace(0, 60, 16)[None, :, None]
    pictures = [np.broadcast_to(ramp + 12 * i, (16, 16, 3)).astype(np.uint8) for i in range(count)]
    return [Sample(Prompt(f"picture {i}"), Image.fromarray(picture)) for i, picture in enumerate(pictures)]


def topics(report: Report, severity: str) -> set[str]:
    return {finding.topic for finding in report.findings if finding.severity == severity}


def test_a_good_reward_is_fit() -> None:
    report = check(Scripted(), gradients())
    assert topics(report, "problem") == topics(report, "warning") == set()
    assert {"speed", "finite", "range", "ties", "determinism", "batch", "sensitivity"} == topics(report, "ok")
    assert report.fit
    assert report.severity == "ok"
    assert str(report).endswith("scripted is fit to train on.")


def by_prompt(samples: Sequence[Sample]) -> list[float]:
    return [float(sample.prompt.text.split()[1]) / 20 for sample in samples]


def nan_for(*numbers: int) -> Callable[[Sequence[Sample]], list[float]]:
    return lambda samples: [
        math.nan if sample.prompt.text in {f"picture {n}" for n in numbers} else score
        for sample, score in zip(samples, brightness(samples), strict=True)
    ]


def normalised(samples: Sequence[Sample]) -> list[float]:
    if not samples:
        return []
    scores = np.array(brightness(samples))
    return ((scores - scores.mean()) / (scores.std() + 1e-6) / 10 + 0.5).tolist()  # type: ignore[no-any-return]


def last_one_higher(samples: Sequence[Sample]) -> list[float]:
    scores = brightness(samples)
    return [*scores[:-1], *(score + 0.2 for score in scores[-1:])]


def painting(samples: Sequence[Sample]) -> list[float]:
    scores = brightness(samples)
    for sample in samples:
        assert sample.image is not None
        sample.image.putpixel((0, 0), (0, 0, 0))
    return scores


def drawn() -> Callable[[Sequence[Sample]], list[float]]:
    rng = np.random.default_rng(0)
    return lambda samples: rng.random(len(samples)).tolist()


def checksum(samples: Sequence[Sample]) -> list[float]:
    """What nobody can see."""
    return [zlib.crc32(s.image.tobytes()) / 2**32 for s in samples if s.image]


@pytest.mark.parametrize(
    ("reward", "severity", "topic", "words"),
    [
        (Scripted(lambda samples: [0.5] * len(samples)), "problem", "spread", "constant"),
        (Scripted(nan_for(*range(16))), "problem", "finite", "16 of 16"),
        (Scripted(nan_for(3, 4)), "problem", "finite", "2 of 16"),
        (Scripted(bounds=(0.0, 0.5)), "problem", "range", "outside its declared range 0 to 0.5"),
        (Scripted(lambda s: [float(b > 0.75) for b in brightness(s)]), "warning", "ties", "saturated"),
        (Scripted(drawn()), "problem", "determinism", "the second time"),
        (Scripted(normalised), "problem", "batch", "judged alone"),
        (Scripted(last_one_higher), "problem", "batch", "in another order"),
        (Scripted(lambda s: brightness(s) if s else [0.0]), "warning", "empty", "no scores"),
        (Scripted(lambda s: brightness(s) if len(s) < 16 else [0.1]), "problem", "call", r"\(16,\)"),
        (Scripted(lambda s: [1 / 0]), "problem", "call", "ZeroDivisionError"),
        (Scripted(painting), "problem", "call", "changes the images"),
        (Scripted(checksum), "warning", "sensitivity", "cannot be seen"),
        (Scripted(differentiable=lambda x, p: x.mean((1, 2, 3)) * 0 + 0.4), "problem", "gradient", "zero"),
        (Scripted(differentiable=lambda x, p: x.mean((1, 2, 3)) + 0.3), "problem", "gradient", "off its score"),
        (Scripted(differentiable=lambda x, p: x.nothing), "problem", "gradient", "AttributeError"),
        (Scripted(differentiable=lambda x, p: x.mean((1, 2, 3))), "ok", "gradient", "agrees|within"),
    ],
)
def test_each_fault_is_found(reward: Scripted, severity: str, topic: str, words: str) -> None:
    report = check(reward, gradients())  # type: ignore[arg-type]
    assert topic in topics(report, severity), str(report)
    told = [f.message for f in report.findings if f.topic == topic and f.severity == severity]
    assert any(re.search(words, message) for message in told), told
    assert report.fit == (severity != "problem")


def test_a_few_failures_are_a_warning() -> None:
    many = gradients(16) + gradients(16)
    samples = [Sample(Prompt(f"picture {i}"), sample.image) for i, sample in enumerate(many)]
    assert "finite" in topics(check(Scripted(nan_for(3)), samples), "warning")  # 1 of 32 is 3 %


def test_a_reward_that_is_no_reward() -> None:
    class Wrong(Scripted):
        def __call__(self, samples: Sequence[Sample]) -> Scores:
            return brightness(samples)  # type: ignore[return-value]

    report = check(Wrong(), gradients())
    assert not report.fit
    assert "must return Scores" in str(report)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InputError, match="at least 8"):
        check(Scripted(), gradients(7))


def test_probes_are_of_the_world_that_the_reward_knows() -> None:
    def knows(kind: str) -> Scripted:
        return Scripted(lambda s: [1.0 if kind in x.prompt.attributes else math.nan for x in s])

    assert all("kind" in sample.prompt.attributes for sample in probes(knows("kind"), 8))
    assert all("plane" in sample.prompt.attributes for sample in probes(knows("plane"), 8))
    first, again = probes(Compressibility(), 8), probes(Compressibility(), 8)
    assert [s.image.tobytes() for s in first if s.image] == [s.image.tobytes() for s in again if s.image]
    text = Scripted()
    vars(text)["modality"] = "text"
    assert all(sample.text and "row: " in sample.prompt.text for sample in probes(text, 8))


def test_without_samples_it_makes_its_own() -> None:
    report = check(Compressibility())
    assert report.fit, str(report)


class Spaces:
    """How many spaces and line breaks a text has: nobody can see them."""

    name, modality, unit, range, higher_is_better = "spaces", "text", "spaces", (0.0, math.inf), True

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        return Scores(torch.tensor([float(sum(c.isspace() for c in s.text or "")) for s in samples]))


def test_a_reward_of_texts_is_checked_on_texts() -> None:
    """The checker of findings is fit; one that counts spaces is warned of, by what doubles them."""
    fit = check(load("findings-checker"))
    assert fit.fit and "doubled spaces moves" in str(fit)
    warned = [finding.message for finding in check(Spaces()).findings if finding.severity == "warning"]  # type: ignore[arg-type]
    assert any("doubled spaces" in message and "cannot be seen" in message for message in warned)
