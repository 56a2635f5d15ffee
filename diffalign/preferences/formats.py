"""One function per format: a row of a file becomes preferences. ``FORMATS`` is all that is known.

``label`` is everywhere the probability that the *first* is preferred. Where a format ranks, 1 is the best rank, and
equal ranks are a tie: no winner is invented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.errors import InputError
from diffalign.preferences import cells
from diffalign.preferences.rows import Row
from diffalign.types import Preference, Sample

Made = Iterator[Preference | str]
"""Preferences, and reasons why a part of the row gave none."""


def native(row: Row, folder: Path) -> Made:
    """``prompt, first, second, label`` and more: the form that ``table.write`` writes."""
    asked = cells.prompt(row)
    if "first" in row:
        first, second = (cells.sample(asked, row.get(name), name, folder) for name in ("first", "second"))
    else:
        first, second = (Sample(asked, text=cells.text(row, f"{name}_text")) for name in ("first", "second"))
    yield _preference(row, first, second, cells.number(row, "label"), cells.mapping(row, "provenance"))


def pick_a_pic(row: Row, folder: Path) -> Made:
    """Pick-a-Pic: ``caption, jpg_0, jpg_1, label_0, label_1``; a tie is 0.5 and 0.5, and ``has_label`` may be false."""
    if row.get("has_label") is False:
        raise InputError("no label: nobody chose (has_label is false)")
    label = cells.number(row, "label_0")
    if abs(label + cells.number(row, "label_1", 1 - label) - 1) > 1e-6:
        raise InputError(f"labels disagree: label_0 {label:g} and label_1 {row['label_1']} do not add up to 1")
    asked = cells.prompt(row, "caption")
    first, second = (cells.sample(asked, row.get(name), name, folder) for name in ("jpg_0", "jpg_1"))
    names = ("image_0_uid", "image_1_uid", "model_0", "model_1", "ranking_id")
    origin = {name: row[name] for name in names if row.get(name) is not None}
    yield _preference(row, first, second, label, origin)


def hpd_train(row: Row, folder: Path) -> Made:
    """HPDv2 train.json: ``prompt, file_path: [2], human_preference: [2]`` with a 1 for the preferred one."""
    paths, votes = cells.items(row, "file_path"), cells.items(row, "human_preference")
    if len(paths) != 2 or len(votes) != 2:
        raise InputError(f"not a pair: {len(paths)} images with {len(votes)} preferences")
    first_vote, second_vote = (cells.number({"human_preference": vote}, "human_preference") for vote in votes)
    if min(first_vote, second_vote) < 0 or first_vote + second_vote <= 0:
        raise InputError(f"no label: human_preference is {votes}")
    asked = cells.prompt(row)
    first, second = (cells.sample(asked, path, "file_path", folder) for path in paths)
    yield _preference(row, first, second, first_vote / (first_vote + second_vote), _names(paths))


def hpd_test(row: Row, folder: Path) -> Made:
    """HPDv2 test.json: ``prompt, image_path, rank``, or one rank list per rater in ``raw_annotations``: all pairs."""
    votes = row.get("raw_annotations") or row.get("raw_annotation")
    rankings = [(row.get("rank"), "")]
    if isinstance(votes, list) and all(isinstance(vote, dict) for vote in votes):
        rankings = [(vote.get("rank"), str(vote.get("user_hash") or "")) for vote in votes]
    yield from _ranked(row, "image_path", rankings, folder)


def image_reward(row: Row, folder: Path) -> Made:
    """ImageReward: ``prompt, generations, ranking``: all pairs."""
    yield from _ranked(row, "generations", [(row.get("ranking"), "")], folder)


def labelled(row: Row, folder: Path) -> Made:
    """``prompt, image_0, image_1, label``, where ``label`` is the probability that image_0 is preferred."""
    label, asked = cells.label(row), cells.prompt(row)
    first, second = (cells.sample(asked, row.get(name), name, folder) for name in ("image_0", "image_1"))
    yield _preference(row, first, second, label, _names([row.get("image_0"), row.get("image_1")]))


def labelled_texts(row: Row, folder: Path) -> Made:
    """``prompt, text_0, text_1, label``, where ``label`` is the probability that text_0 is preferred."""
    label, asked = cells.label(row), cells.prompt(row)
    first, second = (Sample(asked, text=cells.text(row, name)) for name in ("text_0", "text_1"))
    yield _preference(row, first, second, label, {})


def invoke(row: Row, folder: Path) -> Made:
    """invoke-training: ``image_0, image_1, prefer_0, prefer_1`` with ``prompt`` or ``caption``; both true is a tie."""
    votes = [row.get(name) for name in ("prefer_0", "prefer_1")]
    if not all(isinstance(vote, bool) for vote in votes):
        raise InputError(f"unknown label: prefer_0 and prefer_1 are {cells.shown(votes)}, and true or false are needed")
    if not any(votes):
        raise InputError("no label: neither image was chosen (prefer_0 and prefer_1 are false)")
    asked = cells.prompt(row, "prompt" if "prompt" in row else "caption")
    first, second = (cells.sample(asked, row.get(name), name, folder) for name in ("image_0", "image_1"))
    label = 0.5 if all(votes) else float(bool(votes[0]))
    yield _preference(row, first, second, label, _names([row.get("image_0"), row.get("image_1")]))


def longcat(row: Row, folder: Path) -> Made:
    """LongCat-Image: ``prompt, img_path_win, img_path_lose``."""
    if row.get("ref_img_path"):
        raise InputError("an edit: the pair was judged beside a third image (ref_img_path), which diffalign cannot use")
    asked = cells.prompt(row)
    first, second = (cells.sample(asked, row.get(name), name, folder) for name in ("img_path_win", "img_path_lose"))
    yield _preference(row, first, second, 1.0, _names([row["img_path_win"], row["img_path_lose"]]))


def chosen_rejected(row: Row, folder: Path) -> Made:
    """TRL: ``prompt, chosen, rejected``, texts."""
    if "prompt" not in row:
        raise InputError("no prompt; where chosen and rejected begin with it, move it to a column of its own")
    asked = cells.prompt(row)
    first, second = (Sample(asked, text=cells.text(row, name)) for name in ("chosen", "rejected"))
    yield _preference(row, first, second, 1.0, {})


@dataclass(frozen=True)
class Format:
    """A format, and the columns by which it is known."""

    name: str
    columns: tuple[str, ...]
    make: Callable[[Row, Path], Made]
    also: tuple[str, ...] = ()
    """Columns that it reads where they are there."""

    @property
    def read(self) -> frozenset[str]:
        """Every column that is worth loading."""
        return frozenset((*self.columns, *self.also, *_COMMON))


_COMMON = (
    "prompt", "prompt_id", "attributes", "negative", "negative_prompt", "strength", "criterion", "rater", "user_id",
    "user_hash", "simulated",
)  # fmt: skip
_ORIGIN = ("label_1", "has_label", "image_0_uid", "image_1_uid", "model_0", "model_1", "ranking_id")
FORMATS = (
    Format("diffalign images", ("prompt", "first", "second", "label"), native, ("provenance",)),
    Format("diffalign texts", ("prompt", "first_text", "second_text", "label"), native, ("provenance",)),
    Format("Pick-a-Pic", ("caption", "jpg_0", "jpg_1", "label_0"), pick_a_pic, _ORIGIN),
    Format("HPDv2 train", ("prompt", "file_path", "human_preference"), hpd_train),
    Format("HPDv2 test", ("prompt", "image_path", "rank"), hpd_test, ("raw_annotations", "raw_annotation")),
    Format("ImageReward", ("prompt", "generations", "ranking"), image_reward),
    Format("invoke-training", ("image_0", "image_1", "prefer_0", "prefer_1"), invoke, ("caption",)),
    Format("labelled rows", ("prompt", "image_0", "image_1", "label"), labelled),
    Format("labelled texts", ("prompt", "text_0", "text_1", "label"), labelled_texts),
    Format("LongCat-Image", ("prompt", "img_path_win", "img_path_lose"), longcat, ("ref_img_path",)),
    Format("TRL texts", ("chosen", "rejected"), chosen_rejected),
)


def _preference(
    row: Row, first: Sample, second: Sample, label: float, origin: Mapping[str, object], rater: str | None = None
) -> Preference:
    who = next((cells.text(row, name) for name in ("rater", "user_id", "user_hash") if row.get(name)), "")
    return Preference(
        first.prompt,
        first,
        second,
        label,
        strength=cells.number(row, "strength", 1.0),
        criterion=cells.text(row, "criterion", "") or "overall",
        rater=who if rater is None else rater,
        provenance={**origin, "simulated": True} if _is_simulated(row) else origin,
    )


def _is_simulated(row: Row) -> bool:
    """Whether a column of this name marks the row, as our exports do in the forms of others."""
    return str(row.get("simulated")).lower() in ("true", "1")


def _names(values: list[Any]) -> dict[str, str]:
    """The file names of a pair, where images were given by path; folders above them may be somebody's own."""
    if not all(isinstance(value, str) and not value.startswith("data:") for value in values):
        return {}
    return {"first": Path(values[0]).name, "second": Path(values[1]).name}


def _ranked(row: Row, column: str, rankings: list[tuple[Any, str]], folder: Path) -> Made:
    """All pairs of a ranking. An image that cannot be read costs its own pairs only."""
    asked, paths = cells.prompt(row), cells.items(row, column)
    samples: dict[int, Sample] = {}
    for i, path in enumerate(paths):
        try:
            samples[i] = cells.sample(asked, path, column, folder)
        except InputError as error:
            yield str(error)
    for ranks, rater in rankings:
        try:
            values = [cells.number({"rank": rank}, "rank") for rank in cells.items({"rank": ranks}, "rank")]
        except InputError as error:
            yield str(error)
            continue
        if len(values) != len(paths):
            yield f"broken ranking: {len(values)} ranks for {len(paths)} images"
            continue
        for i, j in combinations(samples, 2):
            label = 0.5 if values[i] == values[j] else float(values[i] < values[j])
            yield _preference(row, samples[i], samples[j], label, _names([paths[i], paths[j]]), rater or None)
