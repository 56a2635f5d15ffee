"""Scenes and captions that ``embedded:clip`` learns from, and which caption is true of which image.

Shape legend: ``N`` scenes, images uint8 ``(N, 3, 64, 64)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from diffalign.seeds import derive
from diffalign.worlds import brain_mr, emoji

World = Literal["emoji", "brain-mr"]
Attributes = Mapping[str, object]

_EMOJI_VALUES: dict[str, Sequence[object]] = {
    "count": (1, 2, 3, 4),
    "object": emoji.OBJECTS,
    "other": emoji.OBJECTS,
    "background": emoji.BACKGROUNDS,
    "relation": emoji.RELATIONS,
    "corner": emoji.CORNERS,
}
TOPICS: dict[World, tuple[str, ...]] = {
    "emoji": (*_EMOJI_VALUES, "order"),
    "brain-mr": ("plane", "contrast", "level", "lesion", "side", "size"),
}
"""What a wrong caption can be wrong about; "order" swaps the two objects of a relation."""


@dataclass(frozen=True)
class Scenes:
    """Images and what they show."""

    images: Tensor
    facts: list[tuple[World, Attributes]]

    def __add__(self, other: Scenes) -> Scenes:
        return Scenes(torch.cat([self.images, other.images]), self.facts + other.facts)


def render(world: World, count: int, start: int = 0) -> Scenes:
    """``count`` random scenes of a world, from number ``start`` on."""
    module = emoji if world == "emoji" else brain_mr
    images = np.empty((count, 64, 64, 3), np.uint8)
    facts: list[tuple[World, Attributes]] = []
    for i in range(count):
        scene = module.scene(derive(start + i, "clip scene", world))
        images[i] = np.asarray(scene.image)
        facts.append((world, scene.prompt.attributes))
    return Scenes(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), facts)


def caption(world: World, attributes: Attributes, template: int = 0) -> str:
    """The sentence for these attributes; any whole number chooses one of the world's templates."""
    if world == "emoji":
        return emoji.caption(attributes, template % emoji.TEMPLATES)
    return brain_mr.caption(attributes, template % brain_mr.TEMPLATES)


def all_captions() -> list[str]:
    """Every caption of both worlds in every template."""
    found = [
        caption("emoji", attributes, template)
        for kind, template in product(emoji.KINDS, range(emoji.TEMPLATES))
        for attributes in emoji.combinations(kind)
    ]
    for facts, template in product(brain_mr.combinations(), range(brain_mr.TEMPLATES)):
        found += [caption("brain-mr", facts, template), caption("brain-mr", unlevelled(facts), template)]
    return found


def unlevelled(attributes: Attributes) -> dict[str, object]:
    """The attributes without the level, which a caption need not say."""
    return {name: value for name, value in attributes.items() if name != "level"}


def meaning(world: World, attributes: Attributes) -> str:
    """The same text for two captions that say the same: "a cat left of a dog" is "a dog right of a cat"."""
    if world == "brain-mr":
        return brain_mr.slug(attributes)
    relation = str(attributes.get("relation"))
    if relation in emoji.MIRRORED:
        swapped = {"object": attributes["other"], "other": attributes["object"], "relation": emoji.MIRRORED[relation]}
        attributes = {**attributes, **swapped}
    return emoji.slug(attributes)


def truths(world: World, attributes: Attributes) -> list[Attributes]:
    """What is true of an image with these attributes, as captions say it; the fullest comes first."""
    if world == "brain-mr":
        return [attributes, unlevelled(attributes)]
    if attributes["kind"] == "position":
        less = {"kind": "count", "object": attributes["object"], "count": 1, "background": attributes["background"]}
        return [attributes, less]
    return [attributes]


def rivals(world: World, attributes: Attributes, topic: str) -> list[Attributes]:
    """The attributes of every caption that is wrong about this topic only; none where the scene has no such thing."""
    if world == "emoji":
        return _emoji_rivals(attributes, topic)
    if topic == "plane":
        return [_replaned(attributes, plane) for plane in brain_mr.PLANES if plane != attributes["plane"]]
    if topic == "lesion":
        if attributes["lesion"] == "present":
            return [{**{k: v for k, v in attributes.items() if k not in ("side", "size")}, "lesion": "none"}]
        sides = brain_mr.SIDES[str(attributes["plane"])]
        return [{**attributes, "lesion": "present", "side": a, "size": b} for a, b in product(sides, brain_mr.SIZES)]
    values: dict[str, Sequence[str]] = {
        "contrast": brain_mr.CONTRASTS,
        "level": brain_mr.LEVELS[str(attributes["plane"])],
        "side": brain_mr.SIDES[str(attributes["plane"])],
        "size": brain_mr.SIZES,
    }
    return [{**attributes, topic: v} for v in values[topic] if topic in attributes and v != attributes[topic]]


def _emoji_rivals(attributes: Attributes, topic: str) -> list[Attributes]:
    if topic == "order":
        if attributes["kind"] != "relation":
            return []
        return [{**attributes, "object": attributes["other"], "other": attributes["object"]}]
    if topic not in attributes:
        return []
    taken = {attributes[topic], *(attributes.get(name) for name in ("object", "other") if topic in ("object", "other"))}
    return [{**attributes, topic: value} for value in _EMOJI_VALUES[topic] if value not in taken]


def _replaned(attributes: Attributes, plane: str) -> Attributes:
    """The same in another plane, where levels and sides have other names: the one of the same rank."""
    old, found = str(attributes["plane"]), {**attributes, "plane": plane}
    for name, names in (("level", brain_mr.LEVELS), ("side", brain_mr.SIDES)):
        if name in attributes:
            found[name] = names[plane][names[old].index(cast(str, attributes[name]))]
    return found
