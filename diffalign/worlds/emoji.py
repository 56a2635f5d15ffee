"""The emoji world: 64x64 scenes of Noto Emoji drawings whose caption says what is there, how many, and where.

Three kinds of scene: *count* ("three apples on a green background"), *relation* ("a cat left of a dog on a blue
background") and *position* ("a star in the top left corner on a pink background"). A scene is its attributes, a flat
dict that JSON can hold; caption, pixels and ground truth follow from it and a seed. Nothing is ever mirrored.

The attribute combinations are split into *train* (about 80 %) and *held-out* (about 20 %) by a hash. The split is for
alignment prompts; the base model is trained on ``scene(seed)``, which draws from both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.seeds import derive
from diffalign.types import Prompt

Task = Literal["all", "count", "relation", "position"]
Attributes = Mapping[str, object]
Box = tuple[int, int, int, int]

SIZE = 64
SPRITE = 26
"""Longest side of a drawing in pixels; each one placed is up to one pixel larger or smaller."""
JITTER = 2
"""Largest shift of a drawing from the centre of its place, in pixels: small enough that two never touch."""

_ASSETS = Path(__file__).parent / "assets" / "noto-emoji"
_INDEX = json.loads((_ASSETS / "sprites.json").read_text())
OBJECTS: tuple[str, ...] = tuple(entry["name"] for entry in _INDEX["sprites"])
PLURALS: dict[str, str] = {entry["name"]: entry["plural"] for entry in _INDEX["sprites"]}
BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "pink": (255, 182, 206),
    "blue": (150, 208, 255),
    "green": (168, 230, 160),
    "purple": (205, 178, 250),
    "orange": (255, 200, 130),
}
BACKGROUNDS: tuple[str, ...] = tuple(BACKGROUND_RGB)
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
CORNERS: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
COUNTS: tuple[str, ...] = ("one", "two", "three", "four")
TEMPLATES = 4
"""Number of caption templates; template 0 is the canonical one that prompts use."""
KINDS: dict[str, tuple[float, tuple[str, ...]]] = {
    "count": (0.45, ("object", "count", "background")),
    "relation": (0.35, ("object", "relation", "other", "background")),
    "position": (0.20, ("object", "corner", "background")),
}
"""Per kind of scene: its share, and its attributes in the order of the id."""

_VALUES: dict[str, tuple[object, ...]] = {
    "object": OBJECTS,
    "other": OBJECTS,
    "count": (1, 2, 3, 4),
    "relation": RELATIONS,
    "corner": CORNERS,
    "background": BACKGROUNDS,
}
_PLACES = {"top left": (16, 16), "top right": (48, 16), "bottom left": (16, 48), "bottom right": (48, 48)}
OFFSETS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where the first thing of a relation stands, seen from the second: right is ``(1, 0)``, down ``(0, 1)``."""
MIRRORED = {"right of": "left of", "below": "above"}
"""The relations that say the same as another with the two things exchanged."""


@dataclass(frozen=True)
class Placement:
    """One drawing of a scene."""

    object: str
    box: Box
    """Left, top, right and bottom in pixels; right and bottom are exclusive."""


@dataclass(frozen=True)
class Scene:
    """A prompt, an image that is right for it, and where everything is."""

    prompt: Prompt
    image: Image.Image
    """8-bit RGB, 64x64."""
    boxes: tuple[Placement, ...]


def scene(seed: int, *, held_out: bool | None = None) -> Scene:
    """A random scene with a random caption template, the same for the same seed.

    ``held_out=None`` draws from all combinations (training the base model), False and True from one side of the split.
    """
    rng = np.random.default_rng(derive(seed, "emoji-scene"))
    shares = [share for share, _ in KINDS.values()]
    while True:
        attributes = _draw(rng, list(KINDS)[int(rng.choice(len(KINDS), p=shares))])
        if held_out is None or is_held_out(attributes) == held_out:
            break
    return render(attributes, seed, template=int(rng.integers(TEMPLATES)))


def render(attributes: Attributes, seed: int, *, template: int = 0) -> Scene:
    """A scene with these attributes; ``seed`` decides places, jitter and sizes."""
    attributes = validate(attributes)
    rng = np.random.default_rng(derive(seed, "emoji-render", slug(attributes)))
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float64)
    canvas[:] = BACKGROUND_RGB[str(attributes["background"])]
    placements = []
    for name, (x, y) in _arrange(attributes, rng):
        drawing = sprite(name, SPRITE + int(rng.integers(-1, 2)))
        height, width = drawing.shape[:2]
        left, top = x - width // 2, y - height // 2
        region = canvas[top : top + height, left : left + width]
        region[:] = drawing[..., :3] + region * (1 - drawing[..., 3:] / 255)
        placements.append(Placement(name, (left, top, left + width, top + height)))
    image = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    return Scene(_prompt(attributes, template), image, tuple(placements))


@cache
def sprite(name: str, size: int = SPRITE) -> NDArray[np.float64]:
    """A drawing cropped to what is visible and resized so that its longest side is ``size`` pixels.

    Returns ``(H, W, 4)`` in 0..255, colour premultiplied by alpha; treat it as read-only.
    """
    entry = _INDEX["sprites"][OBJECTS.index(name)]
    x, y, tile = entry["x"], entry["y"], _INDEX["tile"]
    drawing = _atlas().crop((x, y, x + tile, y + tile))
    drawing = drawing.crop(drawing.getchannel("A").point(lambda alpha: 255 if alpha >= 16 else 0).getbbox())
    scale = size / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    # RGBa is premultiplied alpha: without it the colour of invisible pixels bleeds into the edges.
    small = drawing.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, dtype=np.float64)
    pixels.setflags(write=False)
    return pixels


def caption(attributes: Attributes, template: int = 0) -> str:
    """The sentence for these attributes in one of the ``TEMPLATES`` templates."""
    attributes = validate(attributes)
    if not 0 <= template < TEMPLATES:
        raise ConfigError(f"caption template {template} does not exist; there are 0 to {TEMPLATES - 1}")
    name = str(attributes["object"])
    background = f"{_article(str(attributes['background']))} background"
    verb = "is"
    if attributes["kind"] == "count":
        count = int(str(attributes["count"]))
        subject = f"{COUNTS[count - 1]} {name if count == 1 else PLURALS[name]}"
        verb = "is" if count == 1 else "are"
    elif attributes["kind"] == "relation":
        subject = f"{_article(name)} {attributes['relation']} {_article(str(attributes['other']))}"
    else:
        subject = f"{_article(name)} in the {attributes['corner']} corner"
    return (
        f"{subject} on {background}",
        f"{subject}, {attributes['background']} background",
        f"on {background} there {verb} {subject}",
        f"{background} with {subject}",
    )[template]


def parse(text: str) -> dict[str, object] | None:
    """The attributes of a caption of any template, or None where the text is not one.

    Case, a final full stop, "a" for "one", digits and "to the left of" are understood.
    """
    text = " ".join(text.lower().rstrip(" .").split())
    for frame in _FRAMES:
        if whole := frame.fullmatch(text):
            break
    else:
        return None
    subject, background = whole["subject"], whole["background"]
    singular = {name: name for name in OBJECTS}
    attributes: dict[str, object]
    if found := _RELATION.fullmatch(subject):
        relation = found["relation"].removeprefix("to the ")
        attributes = {"kind": "relation", "object": found["object"], "relation": relation, "other": found["other"]}
    elif found := _POSITION.fullmatch(subject):
        attributes = {"kind": "position", "object": found["object"], "corner": found["corner"].replace("-", " ")}
    elif found := _COUNT.fullmatch(subject):
        count = _NUMBERS[found["number"]]
        words = singular if count == 1 else {plural: name for name, plural in PLURALS.items()}
        attributes = {"kind": "count", "object": words.get(found["word"]), "count": count}
    else:
        return None
    try:
        return validate({**attributes, "background": background})
    except ConfigError:
        return None


def prompts(split: Literal["train", "held-out"], n: int, seed: int = 0, *, task: Task = "all") -> list[Prompt]:
    """``n`` distinct prompts of one side of the split, with the canonical caption.

    ``task="all"`` mixes the kinds by their shares for as long as each has combinations left. The first prompts of a
    longer list are those of a shorter one. Two captions of the same scene ("a cat left of a dog", "a dog right of a
    cat") are always on the same side.
    """
    if split not in ("train", "held-out"):
        raise ConfigError(f"unknown split {split!r}; there are 'train' and 'held-out'")
    if task != "all" and task not in KINDS:
        raise ConfigError(f"unknown task {task!r}; there are all, {', '.join(KINDS)}")
    kinds = list(KINDS) if task == "all" else [task]
    rng = np.random.default_rng(derive(seed, "emoji-prompts", split, task))
    pools = {kind: [a for a in combinations(kind) if is_held_out(a) == (split == "held-out")] for kind in kinds}
    available = sum(map(len, pools.values()))
    if not 0 <= n <= available:
        raise ConfigError(f"{n} distinct prompts asked for; split {split!r} of task {task!r} has {available}")
    orders = {kind: iter(rng.permutation(len(pools[kind])).tolist()) for kind in kinds}
    left = {kind: len(pools[kind]) for kind in kinds}
    chosen = []
    for _ in range(n):
        shares = np.array([KINDS[kind][0] if left[kind] else 0.0 for kind in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        left[kind] -= 1
        chosen.append(_prompt(pools[kind][next(orders[kind])], 0))
    return chosen


def combinations(kind: str) -> list[dict[str, object]]:
    """Every attribute combination of one kind of scene, in a fixed order."""
    found: list[dict[str, object]] = [{"kind": kind}]
    for field in KINDS[kind][1]:
        found = [{**partial, field: value} for partial in found for value in _VALUES[field]]
    return [attributes for attributes in found if attributes.get("other") != attributes["object"]]


def is_held_out(attributes: Attributes) -> bool:
    """Whether these attributes belong to the held-out fifth; the two captions of one relation always agree."""
    attributes = validate(attributes)
    relation = attributes.get("relation")
    if relation in MIRRORED:
        swapped = {"object": attributes["other"], "other": attributes["object"], "relation": MIRRORED[str(relation)]}
        attributes = {**attributes, **swapped}
    return derive(0, "emoji-split", slug(attributes)) % 5 == 0


def slug(attributes: Attributes) -> str:
    """The stable, readable id of a combination, such as ``emoji-count-apple-3-green``."""
    kind = str(attributes["kind"])
    return "-".join(["emoji", kind, *(str(attributes[field]).replace(" ", "-") for field in KINDS[kind][1])])


def validate(attributes: Attributes) -> dict[str, object]:
    """The attributes in canonical order and types, or a ConfigError that says what is wrong with them.

    Fields that are None are left out, as when the attributes were a row of a table of mixed scenes.
    """
    given = {field: value for field, value in attributes.items() if value is not None}
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"emoji attributes have kind {kind!r}; there are {', '.join(KINDS)}")
    fields = KINDS[kind][1]
    if set(given) != {"kind", *fields}:
        raise ConfigError(f"a {kind} scene has the attributes kind, {', '.join(fields)}; got {', '.join(given)}")
    valid: dict[str, object] = {"kind": kind}
    for field in fields:
        value = given[field]
        if isinstance(value, bool) or value not in _VALUES[field]:
            raise ConfigError(f"{field} is {value!r}; there are {', '.join(map(str, _VALUES[field]))}")
        valid[field] = _VALUES[field][_VALUES[field].index(value)]
    if valid.get("other") == valid["object"]:
        raise ConfigError(f"a relation is between two different objects; got {valid['object']!r} twice")
    return valid


def _prompt(attributes: Attributes, template: int) -> Prompt:
    return Prompt(caption(attributes, template), id=slug(attributes), attributes=dict(attributes))


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _draw(rng: np.random.Generator, kind: str) -> dict[str, object]:
    while True:
        values = {field: _VALUES[field][int(rng.integers(len(_VALUES[field])))] for field in KINDS[kind][1]}
        if values.get("other") != values["object"]:
            return {"kind": kind, **values}


def _arrange(attributes: Attributes, rng: np.random.Generator) -> list[tuple[str, tuple[int, int]]]:
    """The drawings of a scene and the pixel that each is centred on."""
    name, middle = str(attributes["object"]), SIZE // 2
    if attributes["kind"] == "relation":
        dx, dy = OFFSETS[str(attributes["relation"])]
        # Both slide together across the free axis, so that the relation is not always on the midline.
        slide = int(rng.integers(-8, 9))
        x, y = middle + slide * abs(dy), middle + slide * abs(dx)
        centres = [(name, (x + 16 * dx, y + 16 * dy)), (str(attributes["other"]), (x - 16 * dx, y - 16 * dy))]
    elif attributes["kind"] == "position":
        centres = [(name, _PLACES[str(attributes["corner"])])]
    else:
        count = int(str(attributes["count"]))
        layouts = [list(_PLACES.values())]
        if count == 1:
            layouts = [[(middle, middle)]]
        elif count == 2:
            layouts += [[(16, middle), (48, middle)], [(middle, 16), (middle, 48)]]
        places = layouts[int(rng.integers(len(layouts)))]
        centres = [(name, places[i]) for i in rng.permutation(len(places))[:count].tolist()]
    shift = rng.integers(-JITTER, JITTER + 1, size=(len(centres), 2)).tolist()
    return [(name, (x + dx, y + dy)) for (name, (x, y)), (dx, dy) in zip(centres, shift, strict=True)]


@cache
def _atlas() -> Image.Image:
    return Image.open(_ASSETS / "sprites.png").convert("RGBA")


def _any(words: Iterable[str], name: str) -> str:
    return f"(?P<{name}>{'|'.join(map(re.escape, words))})"


_NUMBERS = {"a": 1, "an": 1, **{word: i + 1 for i, word in enumerate(COUNTS)}, **{str(i): i for i in (1, 2, 3, 4)}}
_ON = _any(BACKGROUNDS, "background") + " background"
_FRAMES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?P<subject>.+) on an? {_ON}",
        rf"(?P<subject>.+), {_ON}",
        rf"on an? {_ON},? there (?:is|are) (?P<subject>.+)",
        rf"an? {_ON} with (?P<subject>.+)",
    )
)
_RELATION = re.compile(
    rf"(?:an?|one) {_any(OBJECTS, 'object')} (?P<relation>(?:to the )?(?:left|right) of|above|below)"
    rf" (?:an?|one) {_any(OBJECTS, 'other')}"
)
_POSITION = re.compile(
    rf"(?:an?|one) {_any(OBJECTS, 'object')} in the (?P<corner>(?:top|bottom)[ -](?:left|right)) corner"
)
_COUNT = re.compile(rf"{_any(_NUMBERS, 'number')} (?P<word>\w+)")
