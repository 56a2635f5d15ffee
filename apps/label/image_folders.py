"""Pairs from a folder of images: each subfolder is an arm, and files of one name in several arms are of one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path

from apps.label import pictures
from diffalign.errors import InputError
from diffalign.prompts import of_images
from diffalign.study import StudyPair
from diffalign.types import Prompt, Sample


class Arms:
    """What a folder holds, by the name of a file without its suffix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arms = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        for arm in self.arms:
            pictures.inside(arm, folder)
        self.files: dict[str, dict[str, Path]] = {}
        for arm in self.arms:
            for path in pictures.listed(arm):
                stem = path.relative_to(arm).with_suffix("").as_posix()
                other = self.files.setdefault(stem, {}).setdefault(arm.name, path)
                if other is not path:
                    raise InputError(f"{other} and {path.name} have one name, so it is not clear which is meant")
        if not self.files:
            kinds = ", ".join(sorted(pictures.SUFFIXES))
            raise InputError(
                f"{folder} has no images ({kinds}) in subfolders; each subfolder is an arm, such as base/ and tuned/,"
                " and files of one name are of one prompt"
            )
        self.lone = sum(len(found) < 2 for found in self.files.values())
        """Names that only one arm has."""
        if self.lone == len(self.files):
            raise InputError(f"no file name is in two subfolders of {folder}, so there is nothing to compare")

    def plan(self) -> list[tuple[str, str, str]]:
        """Every pair that can be made: name of the files, first arm, second arm."""
        return [
            (stem, first, second)
            for stem, found in sorted(self.files.items())
            for first, second in combinations(sorted(found), 2)
        ]

    def pairs(self, plan: list[tuple[str, str, str]]) -> Iterator[StudyPair]:
        """The pairs of a plan, in its order; each image is read when its pair is made."""
        listed = of_images(self.folder)
        by_arm = {arm.name: of_images(arm) for arm in self.arms}
        for stem, *arms in plan:
            paths = [self.files[stem][arm] for arm in arms]
            prompt = self._prompt(stem, listed, by_arm)
            first, second = (Sample(prompt, image=pictures.read(path, self.folder)) for path in paths)
            yield StudyPair(prompt, first, second, arms[0], arms[1])

    def _prompt(self, stem: str, listed: Mapping[str, Prompt], by_arm: Mapping[str, Mapping[str, Prompt]]) -> Prompt:
        """What was asked for, as ``diffalign score --images`` finds it; the arms must not say different things."""
        said: dict[str, Prompt] = {}
        for arm, path in self.files[stem].items():
            inner = path.relative_to(self.folder / arm).as_posix()
            known = (listed.get(f"{arm}/{inner}"), listed.get(inner), listed.get(stem), by_arm[arm].get(inner))
            found = next((prompt for prompt in known if prompt is not None), None) or _beside(path, self.folder)
            if found is not None:
                said[arm] = found
        found = _beside(self.folder / f"{stem}.png", self.folder)
        if found is not None:
            said.setdefault("", found)
        if len({prompt.text for prompt in said.values()}) > 1:
            raise InputError(f"the arms say different prompts for {stem} in {self.folder}, so it is no pair")
        # Without a prompt the name tells the pairs apart, and raters see none.
        return next(iter(said.values()), Prompt("", id=stem))


def _beside(image: Path, root: Path) -> Prompt | None:
    path = image.with_suffix(".txt")
    if not path.is_file():
        return None
    pictures.inside(path, root)
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    return Prompt(text) if text else None
