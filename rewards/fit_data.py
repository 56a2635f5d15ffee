"""Pairs as a reward head learns them: embeddings of their images and prompts, and what was judged, by whom.

Shape legend: ``N`` different images, ``M`` different prompts' texts, ``D`` dimensions of an embedding, ``S`` statistics
of pixels, ``P`` pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.errors import ConfigError, InputError
from diffalign.images import to_rgb
from diffalign.preferences import Broken, Defects, group, split
from diffalign.seeds import derive
from diffalign.types import Preference, Prompt, Sample
from rewards.fit_pixels import statistics

CHUNK = 32
"""Images that are in memory at a time."""
MOST = 20_000
"""Samples from which means and covariances are taken: more would need more memory, and say the same."""


class Encoder(Protocol):
    """What turns images and texts into unit vectors of one space."""

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """float32 ``(B, D)``."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """float32 ``(B, D)``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """All pairs of a file. What is compared stands once, however often it occurs."""

    first: Tensor
    """int64 ``(P,)``: number of what stands first; so is ``second``."""
    second: Tensor
    text: Tensor
    """int64 ``(P,)``: number of the prompt's text."""
    label: Tensor
    """float32 ``(P,)``: probability that the first is preferred."""
    strength: Tensor
    """float32 ``(P,)``."""
    criterion: Sequence[str]
    rater: Sequence[str]
    group: Sequence[str]
    """The prompt or case that is never split."""
    attributes: Sequence[Mapping[str, object]]
    digest: str
    """SHA-256 of all that was read: prompts, pixels or texts, labels, strengths, criteria, raters."""
    broken: Defects = field(default_factory=Defects)

    def __len__(self) -> int:
        return len(self.label)

    def rows_of(self, criterion: str, among: Iterable[int]) -> list[int]:
        """Those rows that judge this criterion."""
        return [row for row in among if self.criterion[row] == criterion]

    def naive(self, train: Sequence[int], rows: Sequence[int]) -> Mapping[str, Tensor]:
        """By name, judges of these rows that understand nothing: float64 ``(P,)``, positive where the first is better.

        What they go by, such as whether bright wins, they may learn from ``train``.
        """
        raise NotImplementedError

    def traits(self, rows: Sequence[int]) -> Mapping[str, Sequence[str]]:
        """By name, what makes groups of these rows beside the raters and the attributes of the prompts."""
        return {}

    def facts(self, rows: Sequence[int], difference: Tensor) -> Mapping[str, Any]:
        """Further numbers of a card, of a model with these differences of scores ``(P,)`` on these rows."""
        return {}

    def towards(self, rows: Sequence[int], values: Tensor) -> bool:
        """Whether the larger value ``(N,)`` was preferred more often than the smaller, or as often."""
        index = torch.tensor(list(rows))
        gap = values[self.first[index]] - values[self.second[index]]
        return float((gap.sign() * (self.label[index] - 0.5).sign()).sum()) >= 0


@dataclass(frozen=True, kw_only=True)
class Study(Pairs):
    """Pairs of images, as an encoder sees them: ``first`` and ``second`` number ``images``, ``text`` the ``texts``."""

    images: Tensor
    """float32 ``(N, D + S)``: the embedding, then the statistics of the pixels."""
    texts: Tensor
    """float32 ``(M, D)``."""
    brightness: Tensor
    """float32 ``(N,)`` in [0, 1]: what a judge of no understanding could go by."""

    def naive(self, train: Sequence[int], rows: Sequence[int]) -> Mapping[str, Tensor]:
        """See Pairs."""
        index, bright = torch.tensor(list(rows)), self.brightness.double()
        towards = self.towards(train, bright)
        gap = (bright[self.first[index]] - bright[self.second[index]]) * (1 if towards else -1)
        text = self.texts[self.text[index]]
        seen = (self.images[self.first[index]] - self.images[self.second[index]])[:, : text.shape[1]]
        return {
            "the brighter image" if towards else "the darker image": gap,
            "the encoder's own cosine": (seen * text).sum(1).double(),
        }

    def samples(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images ``(B, D + S)`` and texts ``(B, D)`` of the different samples in these rows, at most ``MOST``."""
        index = torch.tensor(rows)
        both = torch.cat([
            torch.stack([self.first[index], self.text[index]], 1),
            torch.stack([self.second[index], self.text[index]], 1),
        ]).unique(dim=0)  # fmt: skip
        both = both[spaced(range(len(both)))]
        return self.images[both[:, 0]], self.texts[both[:, 1]]


@dataclass(frozen=True)
class Parts:
    """Numbers of the rows to learn from, to stop and calibrate by, and to measure on; no prompt is in two of them."""

    train: list[int]
    tune: list[int]
    measure: list[int]


def gather(
    items: Iterable[Preference | Broken],
    encoder: Encoder,
    criteria: Collection[str] | None = None,
    pixels: bool = True,
    on_progress: Callable[[str, int, int | None], None] | None = None,
) -> Study:
    """Goes through the pairs once and encodes every different image and text once.

    Keeps those of ``criteria``, or all; ``pixels`` adds the statistics of the images. InputError where texts are
    compared instead of images, or nothing is left; ConfigError for a criterion that nobody judged.
    """
    collected = _Collected(encoder, pixels)
    return collected.study(collect(items, collected, criteria, on_progress))


def collect(
    items: Iterable[Preference | Broken],
    collected: Collected,
    criteria: Collection[str] | None = None,
    on_progress: Callable[[str, int, int | None], None] | None = None,
) -> Defects:
    """Adds the pairs of ``criteria``, or all, and returns what could not be read; see ``gather`` for errors."""
    broken, seen = Defects(), set[str]()
    for number, item in enumerate(items, 1):
        if on_progress:
            on_progress("encoding pairs", number, None)
        if isinstance(item, Broken):
            broken.add(item)
            continue
        seen.add(item.criterion)
        if criteria is None or item.criterion in criteria:
            try:
                collected.add(item)
            except Unreadable as error:
                broken.add(Broken(number - 1, str(error)))
    if seen and (missing := sorted(set(criteria or ()) - seen)):
        there = ", ".join(sorted(seen))
        raise ConfigError(
            f"criteria: no pair judges {', '.join(missing)}; the file has {there} (of a run: fit.criteria)"
        )
    if not collected.label:
        reasons = ", ".join(f"{kind} ({count})" for kind, count in broken.kinds.most_common()) or "it has no rows"
        raise InputError(f"there is no preference to learn from: {reasons}")
    return broken


def divide(study: Pairs, held_out: float, seed: int) -> Parts:
    """Three parts by prompt or case: ``held_out`` is halved into the pairs that stop and those that measure.

    The halves have equally many prompts, drawn by ``seed``. InputError where one would be empty.
    """
    train, held = split(study.group, held_out, seed)
    groups = sorted({study.group[row] for row in held}, key=lambda name: derive(seed, "measure", name))
    if len(groups) < 2:
        raise InputError(
            f"held_out {held_out:g} with seed {seed} holds out a single prompt or case, and it takes one to stop by and"
            " another to measure on; take more prompts, a larger share, or another seed"
        )
    stopping = set(groups[: len(groups) // 2])
    sides: tuple[list[int], list[int]] = ([], [])
    for row in held:
        sides[study.group[row] not in stopping].append(row)
    return Parts(train, *sides)


def spaced(numbers: Sequence[int]) -> list[int]:
    """The numbers, or ``MOST`` of them at equal distances where there are more."""
    if len(numbers) <= MOST:
        return list(numbers)
    return [numbers[i * len(numbers) // MOST] for i in range(MOST)]


def look(encoder: Encoder, images: Sequence[Image], pixels: bool) -> Tensor:
    """float32 ``(B, D + S)``: the embeddings, and with ``pixels`` the statistics beside them."""
    embeddings = encoder.encode_images(images)
    return torch.cat([embeddings, statistics(images)], 1) if pixels else embeddings


class Unreadable(Exception):
    """A pair that the encoder cannot read; the message is ``KIND: DETAILS``."""


class Collected:
    """What was read so far."""

    def __init__(self) -> None:
        self.text_numbers: dict[str, int] = {}
        self.first: list[int] = []
        self.second: list[int] = []
        self.text: list[int] = []
        self.label: list[float] = []
        self.strength: list[float] = []
        self.criterion: list[str] = []
        self.rater: list[str] = []
        self.group: list[str] = []
        self.attributes: list[Mapping[str, object]] = []
        self.digest = hashlib.sha256()

    def add(self, item: Preference) -> None:
        """One pair."""
        sides = [self.number(sample) for sample in (item.first, item.second)]
        self.first.append(sides[0][0])
        self.second.append(sides[1][0])
        self.text.append(self.text_numbers.setdefault(item.prompt.text, len(self.text_numbers)))
        self.label.append(item.label)
        self.strength.append(item.strength)
        self.criterion.append(item.criterion)
        self.rater.append(item.rater)
        self.group.append(group(item.prompt))
        self.attributes.append(_plain(item.prompt))
        facts = [item.prompt.key, item.prompt.text, item.label, item.strength, item.criterion, item.rater]
        self.digest.update(json.dumps(facts).encode("utf-8", "surrogatepass") + sides[0][1] + sides[1][1])

    def number(self, sample: Sample) -> tuple[int, bytes]:
        """The number of a sample's content, and its hash."""
        raise NotImplementedError

    def pairs(self, broken: Defects) -> dict[str, Any]:
        """The fields of ``Pairs``."""
        return {
            "first": torch.tensor(self.first), "second": torch.tensor(self.second), "text": torch.tensor(self.text),
            "label": torch.tensor(self.label, dtype=torch.float32),
            "strength": torch.tensor(self.strength, dtype=torch.float32),
            "criterion": self.criterion, "rater": self.rater, "group": self.group, "attributes": self.attributes,
            "digest": f"sha256:{self.digest.hexdigest()}", "broken": broken,
        }  # fmt: skip


class _Collected(Collected):
    """Images wait in ``queue`` until there are enough to be encoded at once."""

    def __init__(self, encoder: Encoder, pixels: bool) -> None:
        super().__init__()
        self.encoder, self.pixels = encoder, pixels
        self.queue: list[Image] = []
        self.images: list[Tensor] = []
        self.brightness: list[float] = []
        self.image_numbers: dict[bytes, int] = {}

    def number(self, sample: Sample) -> tuple[int, bytes]:
        """See Collected; the hash is of the pixels."""
        if sample.image is None:
            raise InputError(
                "the pairs compare texts, and the encoder sees images; a reward model of texts is fitted to a language"
                " model: set encoder to one, such as embedded:findings-lm"
            )
        rgb = to_rgb(sample.image)
        content = hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).digest()
        number = self.image_numbers.setdefault(content, len(self.image_numbers))
        if number == len(self.brightness):
            self.brightness.append(_brightness(rgb))
            self.queue.append(rgb)
            if len(self.queue) == CHUNK:
                self._encode()
        return number, content

    def _encode(self) -> None:
        if self.queue:
            self.images.append(look(self.encoder, self.queue, self.pixels))
            self.queue = []

    def study(self, broken: Defects) -> Study:
        """Everything read."""
        self._encode()
        return Study(
            images=torch.cat(self.images),
            texts=self.encoder.encode_texts(list(self.text_numbers)),
            brightness=torch.tensor(self.brightness),
            **self.pairs(broken),
        )


def _brightness(rgb: Image) -> float:
    histogram = rgb.convert("L").histogram()
    return sum(level * count for level, count in enumerate(histogram)) / (255 * sum(histogram))


def _plain(prompt: Prompt) -> Mapping[str, object]:
    """The attributes that subgroups can be made of."""
    return {name: value for name, value in prompt.attributes.items() if isinstance(value, str | int | float | bool)}
