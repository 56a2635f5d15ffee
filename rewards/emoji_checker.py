"""The reward ``emoji-checker``: does an image of the emoji world show what its prompt asks for?

It knows the image and the attributes of the prompt, never the scene. Per sample it answers the attributes that the
prompt asks about, and the total is the mean of the answers:

==============  ==========================  ========================================================================
attribute       asked of                    right when
==============  ==========================  ========================================================================
``object``      every prompt                each named kind is there and no other; where the prompt says "a", just once
``count``       count prompts               exactly so many of the kind are there
``relation``    relation prompts            one lies in that direction of the other, within 45 degrees
``position``    position prompts            its centre is at least 8 px inside that quarter of the image
``background``  every prompt                it is nearest to that named colour, near enough, and plain
==============  ==========================  ========================================================================

Duplicates are the business of ``object`` and ``count``: a relation or a position is right when some of them fulfil it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from diffalign.errors import ConfigError
from diffalign.types import Modality, Prompt, Sample, Scores
from diffalign.worlds.emoji import OFFSETS, SIZE, parse, validate
from rewards.emoji_detector import ACCEPT, Detection, Sight, detect, look
from rewards.everything import EVERYTHING, everything

__all__ = ["ATTRIBUTES", "Detection", "EmojiChecker", "detect", "judge"]

ATTRIBUTES = ("object", "count", "relation", "position", "background")
"""What is judged, in the order of ``Scores.parts``."""

_CORNER = SIZE / 2 - 8
"""How far from the image's corner the centre of an object may be, per axis, in pixels."""
_PLAIN = 0.8
"""Least fraction of the free area that has the colour of the background."""


class EmojiChecker:
    """Fraction of the asked attributes that an image gets right, in 0..1.

    ``graded=False`` is accuracy: every part is 0 or 1, and the part ``everything`` is 1 where all of them are.
    ``graded=True`` is for training: near misses get part of the credit (an almost recognisable object, one object too
    many, a place not quite in the corner), a perfect image still gets exactly 1.

    A sample whose prompt cannot be understood, or that has no image, scores NaN.
    """

    modality: Modality = "image"
    unit = "fraction"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(self, *, graded: bool = False) -> None:
        self.graded = graded
        self.name = "emoji-checker-graded" if graded else "emoji-checker"

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Totals and the parts; a part that was not asked of a sample is NaN."""
        table = torch.full((len(samples), len(ATTRIBUTES)), math.nan)
        for row, sample in enumerate(samples):
            wanted = _wanted(sample.prompt)
            if wanted is None or sample.image is None:
                continue
            for name, value in judge(look([sample.image])[0], wanted, graded=self.graded).items():
                table[row, ATTRIBUTES.index(name)] = value
        total, parts = table.nanmean(dim=1), {name: table[:, i] for i, name in enumerate(ATTRIBUTES)}
        return Scores(total, parts if self.graded else {**parts, EVERYTHING: everything(total)})


def judge(sight: Sight, wanted: Mapping[str, object], *, graded: bool = False) -> dict[str, float]:
    """The answer for each attribute that ``wanted``, valid attributes of a prompt, asks about."""
    return (_grade if graded else _check)(sight, wanted)


def _wanted(prompt: Prompt) -> dict[str, object] | None:
    if not prompt.attributes:
        return parse(prompt.text)
    try:
        return validate(prompt.attributes)
    except ConfigError:
        return None


def _check(sight: Sight, wanted: Mapping[str, object]) -> dict[str, float]:
    """Right (1) or wrong (0) for each asked attribute."""
    objects = [found for found in sight.objects if found.score >= ACCEPT]
    kinds = [found.object for found in objects]
    right = {"background": sight.background == wanted["background"] and sight.plain >= _PLAIN}
    if wanted["kind"] == "count":
        right["object"] = set(kinds) == {wanted["object"]}
        right["count"] = kinds.count(str(wanted["object"])) == wanted["count"]
    elif wanted["kind"] == "relation":
        right["object"] = sorted(kinds) == sorted([str(wanted["object"]), str(wanted["other"])])
        right["relation"] = _aim(objects, wanted) == 1
    else:
        right["object"] = kinds == [wanted["object"]]
        right["position"] = _nearness(objects, wanted) == 1
    return {name: float(value) for name, value in right.items()}


def _grade(sight: Sight, wanted: Mapping[str, object]) -> dict[str, float]:
    """Credit between 0 and 1 for each asked attribute; exactly 1 on a perfect image."""
    names = [str(wanted[field]) for field in ("object", "other") if field in wanted]
    best = [_best(sight.objects, name) for name in names]
    credit = [_ramp(found.score, 0.4, 0.9) if found else 0.0 for found in best]
    spare = [found for found in sight.objects if found not in best]
    seen = [found for found in sight.objects if found in best or found.score >= ACCEPT]
    grades: dict[str, float] = {}
    if wanted["kind"] == "count":
        same = [found.score for found in sight.objects if found.object == names[0]]
        spare = [found for found in spare if found.object != names[0]]
        asked = int(str(wanted["count"]))
        there = sum(_ramp(score, 0.4, 0.9) for score in same[:asked]) + sum(map(_surplus, same[asked:]))
        grades["count"] = max(0.0, 1 - abs(there - asked) / asked)
    elif wanted["kind"] == "relation":
        grades["relation"] = min(credit) * _aim(seen, wanted)
    else:
        grades["position"] = credit[0] * _nearness(seen, wanted)
    grades["object"] = sum(credit) / (len(names) + sum(_surplus(found.score) for found in spare))
    near = 1 - _ramp(sight.distances[str(wanted["background"])], 5, 45)
    grades["background"] = near * _ramp(sight.plain, 0, 0.95)
    return grades


def _best(objects: Sequence[Detection], name: object) -> Detection | None:
    """The most certain one of that kind; the objects come best first."""
    return next((found for found in objects if found.object == name), None)


def _aim(objects: Sequence[Detection], wanted: Mapping[str, object]) -> float:
    """1 where the relation holds for some pair of the two kinds, down to 0 where it is the opposite."""
    x, y = OFFSETS[str(wanted["relation"])]
    aims = [0.0]
    for first in (found.center for found in objects if found.object == wanted["object"]):
        for second in (found.center for found in objects if found.object == wanted["other"]):
            dx, dy = first[0] - second[0], first[1] - second[1]
            along, across = dx * x + dy * y, abs(dx * y) + abs(dy * x)
            cosine = along / math.hypot(along, across)
            aims.append(1.0 if along >= across else (cosine + 1) / (math.cos(math.pi / 4) + 1))
    return max(aims)


def _nearness(objects: Sequence[Detection], wanted: Mapping[str, object]) -> float:
    """1 where some object of the kind is in the corner, less by its distance from the places that count as that."""
    row, column = str(wanted["corner"]).split()
    near = [0.0]
    for x, y in (found.center for found in objects if found.object == wanted["object"]):
        right = (x if column == "left" else SIZE - x) - _CORNER
        down = (y if row == "top" else SIZE - y) - _CORNER
        near.append(1 - math.hypot(max(0.0, right), max(0.0, down)) / (SIZE / 2))
    return max(near)


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _surplus(score: float) -> float:
    """What an object that nobody asked for weighs; chance matches between real objects weigh nothing."""
    return _ramp(score, 0.55, 0.8)
