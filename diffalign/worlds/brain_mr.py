"""The brain-mr world: 64x64 brain MR slices with lesions, whose caption, table row and pixels agree by construction.

A scene is its attributes, a flat dict that JSON can hold::

    {"plane": "axial", "contrast": "T2", "level": "ventricles", "lesion": "present", "side": "left", "size": "large"}

``lesion`` is "present" or "none"; with "none" there is no ``side`` and no ``size``. The anatomy is the ICBM152 average
template, deformed and re-contrasted for every seed; a lesion is bright on T2 and FLAIR and dark on T1.

**Sides.** Axial and coronal slices follow the radiological convention: the patient's left is on the *right of the
image*. On a sagittal slice left and right cannot be seen, so there ``side`` is "anterior" (the left half of the image,
where the face looks) or "posterior". Images are never flipped, and must not be when they are used for training.

The attribute combinations are split into *train* (about 75 %) and *held-out* (about 25 %), the same share in every
plane. The split is for alignment prompts; the base model is trained on ``scene(seed)``, which draws from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.seeds import derive
from diffalign.types import Prompt
from diffalign.worlds import brain_mr_pixels as pixels

Task = Literal["all", "lesion"]
Attributes = Mapping[str, object]

SIZE = pixels.SIZE
PLANES: tuple[str, ...] = ("axial", "coronal", "sagittal")
CONTRASTS: tuple[str, ...] = ("T1", "T2", "FLAIR")
LEVELS: dict[str, tuple[str, ...]] = {plane: tuple(levels) for plane, levels in pixels.LEVEL_MM.items()}
"""Per plane, the three levels at which it is cut; no name occurs in two planes."""
LESIONS: tuple[str, ...] = ("none", "present")
SIDES: dict[str, tuple[str, ...]] = {
    "axial": ("left", "right"),
    "coronal": ("left", "right"),
    "sagittal": ("anterior", "posterior"),
}
"""Per plane, the sides that can be seen: the patient's, not the image's."""
SIZES: tuple[str, ...] = ("small", "large")
FIELDS: tuple[str, ...] = ("plane", "contrast", "level", "lesion", "side", "size")
TEMPLATES = 3
"""Number of caption templates; template 0 is the canonical one that prompts use."""
LESION_SHARE = 0.65
"""Share of the scenes of ``scene`` that have a lesion."""


@dataclass(frozen=True)
class Scene:
    """A prompt, an image that is right for it, and where the lesion is."""

    prompt: Prompt
    image: Image.Image
    """8-bit RGB, 64x64, three equal channels."""
    lesion_mask: npt.NDArray[np.bool_]
    """``(64, 64)``, indexed row, column; all False where there is no lesion."""


def scene(seed: int, *, held_out: bool | None = None) -> Scene:
    """A random scene with a random caption template, the same for the same seed.

    ``held_out=None`` draws from all combinations (training the base model), False and True from one side of the split.
    """
    rng = np.random.default_rng(derive(seed, "brain-mr-scene"))
    while True:
        attributes = _draw(rng)
        if held_out is None or is_held_out(attributes) == held_out:
            break
    return render(attributes, seed, template=int(rng.integers(TEMPLATES)))


def render(attributes: Attributes, seed: int, *, template: int = 0) -> Scene:
    """A scene with these attributes; ``seed`` decides the subject, the exact contrast, the lesion and the noise.

    The same seed, plane and level show the same subject, whatever the other attributes are.
    """
    facts = validate(attributes)
    if "level" not in facts:
        levels = ", ".join(LEVELS[facts["plane"]])
        raise ConfigError(f"a scene needs a level to be drawn; {facts['plane']} slices have {levels}")
    lesion = (facts["side"], facts["size"]) if facts["lesion"] == "present" else None
    streams = {
        part: np.random.default_rng(derive(seed, "brain-mr-render", part))
        for part in ("subject", "contrast", "lesion", "scanner")
    }
    grey, mask = pixels.draw(facts["plane"], facts["contrast"], facts["level"], lesion, streams)
    image = Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))
    return Scene(_prompt(facts, template), image, mask)


def caption(attributes: Attributes, template: int = 0) -> str:
    """The sentence for these attributes in one of the ``TEMPLATES`` templates; without a level it is left out."""
    facts = validate(attributes)
    if not 0 <= template < TEMPLATES:
        raise ConfigError(f"caption template {template} does not exist; there are 0 to {TEMPLATES - 1}")
    plane, contrast, level = facts["plane"], facts["contrast"], facts.get("level", "")
    lesion, where = "no lesion", ""
    if facts["lesion"] == "present":
        part = "half" if plane == "sagittal" else "hemisphere"
        lesion, where = f"{facts['size']} lesion", f" in the {facts['side']} {part}"
    if template == 0:
        at = f" at the level of the {level}" if level else ""
        return f"{plane} {contrast} brain MRI{at}, {lesion}{where}"
    if template == 1:
        at = f" through the {level}" if level else ""
        return f"brain MRI with {lesion}{where}, {plane} {contrast} slice{at}"
    at = f"{level} level, " if level else ""
    return f"{contrast} {plane} brain slice, {at}{lesion}{where}"


def parse(text: str) -> dict[str, str] | None:
    """The attributes of a caption of any template, or None where the text is not one.

    Case, spacing, commas and a final full stop do not matter.
    """
    found = _captions().get(_normal(text))
    return dict(found) if found is not None else None


def prompts(split: Literal["train", "held-out"], n: int, seed: int = 0, *, task: Task = "all") -> list[Prompt]:
    """``n`` distinct prompts of one side of the split, with the canonical caption, in an order drawn from ``seed``.

    ``task="lesion"`` keeps the combinations that have a lesion. The first prompts of a longer list are those of a
    shorter one.
    """
    if split not in ("train", "held-out"):
        raise ConfigError(f"unknown split {split!r}; there are 'train' and 'held-out'")
    if task not in ("all", "lesion"):
        raise ConfigError(f"unknown task {task!r}; there are 'all' and 'lesion'")
    pool = [
        facts
        for facts in combinations()
        if is_held_out(facts) == (split == "held-out") and (task == "all" or facts["lesion"] == "present")
    ]
    if not 0 <= n <= len(pool):
        raise ConfigError(f"{n} distinct prompts asked for; split {split!r} of task {task!r} has {len(pool)}")
    order = np.random.default_rng(derive(seed, "brain-mr-prompts", split, task)).permutation(len(pool))
    return [_prompt(pool[i], 0) for i in order[:n].tolist()]


def combinations() -> list[dict[str, str]]:
    """Every attribute combination, in a fixed order."""
    found = []
    for plane, contrast in product(PLANES, CONTRASTS):
        for level in LEVELS[plane]:
            base = {"plane": plane, "contrast": contrast, "level": level}
            found.append({**base, "lesion": "none"})
            for side, size in product(SIDES[plane], SIZES):
                found.append({**base, "lesion": "present", "side": side, "size": size})
    return found


def is_held_out(attributes: Attributes) -> bool:
    """Whether these attributes belong to the held-out quarter."""
    return slug(attributes) in _held_out()


def slug(attributes: Attributes) -> str:
    """The stable, readable id of a combination, such as ``brain-mr-axial-t2-ventricles-large-left``."""
    facts = validate(attributes)
    words = [facts["plane"], facts["contrast"].lower(), *([facts["level"]] if "level" in facts else [])]
    words += [facts["size"], facts["side"]] if facts["lesion"] == "present" else ["no lesion"]
    return "-".join(["brain-mr", *words]).replace(" ", "-")


def validate(attributes: Attributes) -> dict[str, str]:
    """The attributes in canonical order, or a ConfigError that says what is wrong with them.

    ``level`` may be missing (a caption need not say it); everything else may not.
    """
    plane = attributes.get("plane")
    if not isinstance(plane, str) or plane not in PLANES:
        raise ConfigError(f"plane is {plane!r}; there are {', '.join(PLANES)}")
    present = attributes.get("lesion") == "present"
    needed = {"plane", "contrast", "lesion"} | ({"side", "size"} if present else set())
    if missing := needed - set(attributes):
        raise ConfigError(f"brain-mr attributes lack {', '.join(sorted(missing))}; got {', '.join(attributes)}")
    if unknown := set(attributes) - needed - {"level"}:
        why = " (without a lesion there is no side and no size)" if unknown <= {"side", "size"} else ""
        raise ConfigError(f"unexpected brain-mr attributes {', '.join(sorted(unknown))}{why}")
    allowed = {
        "plane": PLANES,
        "contrast": CONTRASTS,
        "level": LEVELS[plane],
        "lesion": LESIONS,
        "side": SIDES[plane],
        "size": SIZES,
    }
    for name, value in attributes.items():
        if value not in allowed[name]:
            raise ConfigError(f"{name} is {value!r}; {plane} slices have {', '.join(allowed[name])}")
    return {name: str(attributes[name]) for name in FIELDS if name in attributes}


def _draw(rng: np.random.Generator) -> dict[str, str]:
    """Attributes with every value equally likely, and a lesion in ``LESION_SHARE`` of the draws."""

    def pick(values: tuple[str, ...]) -> str:
        return values[int(rng.integers(len(values)))]

    plane = pick(PLANES)
    facts = {"plane": plane, "contrast": pick(CONTRASTS), "level": pick(LEVELS[plane])}
    if rng.random() >= LESION_SHARE:
        return {**facts, "lesion": "none"}
    return {**facts, "lesion": "present", "side": pick(SIDES[plane]), "size": pick(SIZES)}


def _prompt(facts: dict[str, str], template: int) -> Prompt:
    return Prompt(caption(facts, template), id=slug(facts), attributes=dict(facts))


def _normal(text: str) -> str:
    return " ".join(text.lower().replace(",", " ").rstrip(" .\n").split())


@cache
def _captions() -> dict[str, dict[str, str]]:
    """Every caption of every template, with and without the level, in normal form."""
    found = {}
    for facts in combinations():
        unlevelled = {name: value for name, value in facts.items() if name != "level"}
        for variant, template in product((facts, unlevelled), range(TEMPLATES)):
            found[_normal(caption(variant, template))] = variant
    return found


@cache
def _held_out() -> frozenset[str]:
    """In each plane, the quarter of the combinations whose hashes come first."""
    held = set()
    for plane in PLANES:
        names = [slug(facts) for facts in combinations() if facts["plane"] == plane]
        held.update(sorted(names, key=lambda name: derive(0, "brain-mr-split", name))[: len(names) // 4])
    return frozenset(held)
