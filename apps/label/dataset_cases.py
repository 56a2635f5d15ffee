"""Pairs from a synthetic dataset: two cases that were made for the same prompt, in the order of the dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from apps.label import pictures
from diffalign.errors import InputError
from diffalign.study import StudyPair
from diffalign.synthesis.cases import Case
from diffalign.synthesis.store import JOURNAL, MANIFEST, Generated
from diffalign.types import Prompt, Sample


def is_dataset(folder: Path) -> bool:
    """Whether ``diffalign generate`` made the folder."""
    return all((folder / name).is_file() for name in (MANIFEST, JOURNAL))


class Cases:
    """A dataset as a source of pairs: of its images, or of its texts where it has no images."""

    def __init__(self, folder: Path) -> None:
        self.made = Generated.open(folder)
        self.texts = "image" not in self.made.parts
        self.size = sum(1 for _ in self._pairs())
        if not self.size:
            raise InputError(f"no two cases of {folder} have the same prompt, so there is nothing to compare")

    def pairs(self, numbers: Collection[int] | None) -> Iterator[StudyPair]:
        """The pairs of these numbers, or all; an image is read when its pair is made."""
        arm = self.made.manifest.name
        for number, cases in enumerate(self._pairs()):
            if numbers is None or number in numbers:
                first, second = map(self._sample, cases)
                facts = {
                    side: {"seed": sample.seed, "case": case.id}
                    for side, sample, case in zip(("first", "second"), (first, second), cases, strict=True)
                }
                yield StudyPair(first.prompt, first, second, arm, arm, None, facts)

    def _pairs(self) -> Iterator[tuple[Case, Case]]:
        """Each case is in one pair at most."""
        waiting: dict[str, Case] = {}
        for case in self.made.cases():
            prompt = self._prompt(case)
            if (other := waiting.pop(prompt, None)) is None:
                waiting[prompt] = case
            else:
                yield other, case

    def _prompt(self, case: Case) -> str:
        return str(case.provenance["text_prompt"]) if self.texts else case.prompt

    def _sample(self, case: Case) -> Sample:
        prompt, seed = Prompt(self._prompt(case), attributes=case.row), int(case.provenance["seed"])
        if self.texts:
            return Sample(prompt, text=case.text, seed=seed)
        assert case.image is not None
        return Sample(prompt, image=pictures.decode(self.made.image(case.image), f"case {case.id}"), seed=seed)
