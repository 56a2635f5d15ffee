"""The gates: planted bad items are rejected, each by the right gate and for the right reason."""

from __future__ import annotations

import io
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apps.catalogue import dataset_recipes
from apps.generate_models import _pictures, encoder
from diffalign.errors import InputError, NotFoundError
from diffalign.synthesis import beginning, gates, rows, spec, store
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.engine import Engine, Maker
from diffalign.synthesis.gates import Blank, Candidate, Duplicates, Floor, Memorised, perceptual_hash
from diffalign.synthesis.store import Generated
from diffalign.types import Prompt, Sample, Scores
from diffalign.worlds import brain_mr, findings
from rewards.brain_mr_checker import BrainMRChecker
from rewards.findings_checker import FindingsChecker
from tests.synthetic import drawn

OTHER = {"left": "right", "right": "left", "anterior": "posterior", "posterior": "anterior"}


class Sharpness:
    """A reward that is low for blurred images: the mean difference of neighbouring pixels, of 255."""

    name, modality, unit, range, higher_is_better = "sharpness", "image", "levels", (0.0, 255.0), True

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        pixels = [np.asarray(s.image, dtype=np.float32) for s in samples if s.image is not None]
        return Scores(torch.tensor([float(np.abs(np.diff(one, axis=1)).mean()) for one in pixels]))


def planted(training: Image.Image) -> Maker:
    """Draws every case rightly, but for the first attempt at six of them."""
    first: set[str] = set()
    wrong = {1: "blank", 3: "copy", 4: "side", 6: "blurred", 8: "double", 10: "broken"}
    earlier: list[Image.Image] = []

    def sample(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        return [one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def one(prompt: Prompt, seed: int) -> Sample:
        facts = dict(prompt.attributes)
        number = int(prompt.id[-6:])
        kind = wrong.get(number) if prompt.id not in first else None
        first.add(prompt.id)
        if kind == "side":
            facts["side"] = OTHER[str(facts["side"])]
        image = brain_mr.render(facts, seed % 2**31).image
        if number == 7:
            earlier.append(image)
        if kind == "blank":
            image = Image.new("RGB", (64, 64), (40, 40, 40))
        elif kind == "copy":
            image = training
        elif kind == "blurred":
            image = image.resize((40, 40), Image.Resampling.BILINEAR).resize((64, 64), Image.Resampling.BILINEAR)
        elif kind == "double":
            image = Image.fromarray(np.clip(np.asarray(earlier[0]).astype(int) + 1, 0, 255).astype(np.uint8))
        elif kind == "broken":
            image = Image.new("RGB", (0, 0))
        return Sample(prompt, image=image, seed=seed)

    checker, sharp = BrainMRChecker(), Sharpness()
    return Maker(
        "image", sample, 4, [checker, sharp],
        [Blank(0.02), Memorised([training], 0.03), Floor(checker, "everything", 1), Floor(sharp, None, SHARP)],
    )  # fmt: skip


SHARP = 6.9
"""The drawn images of this test have 7.1 to 11.0, blurred ones 4.5 to 6.6."""


def test_planted_bad_items_are_rejected_for_the_right_reason(tmp_path: Path) -> None:
    """A blank image, a training image, a lesion on the wrong side, a blurred image, another case's image, and one that
    is no image. What a gate does not mind passes: all other images are the world's own, and right.
    """
    axes = (
        "axes={plane: [axial], contrast: [T2], lesion: [present], side: [left, right], size: [large], level: [vertex]}"
    )
    wanted = spec.load(
        dataset_recipes()["brain-mr-dataset"], ["cases=12", axes, "conditions=[]", "strata=[side]", "text=null",
        "rewards=[]", "gates=[]", "chunk=6"],
    )  # fmt: skip
    assert [row.cells["side"] for row in rows.rows(wanted)] == ["left"] * 6 + ["right"] * 6
    left = {"plane": "axial", "contrast": "T2", "lesion": "present", "side": "left", "size": "large", "level": "vertex"}
    training = brain_mr.render(left, 999).image
    found = rows.survey(wanted)
    manifest = Manifest("x", wanted.sha256, found.columns, found.strata, {}, {"image": {"name": "x"}}, {}, (), {}, "")
    beginning.begin(wanted, tmp_path / "out", manifest)
    duplicates = Duplicates(2, 0.9995, encoder())  # as by default
    Engine(wanted, tmp_path / "out", [planted(training)], duplicates=duplicates).run()
    dataset = Generated.open(tmp_path / "out")
    rejected = {a.row: a for a in dataset.attempts() if a.gate}
    assert {row: (a.attempt, a.gate) for row, a in rejected.items()} == {
        1: (0, "blank"), 3: (0, "memorised"), 4: (0, "brain-mr-checker/everything"), 6: (0, "sharpness"),
        8: (0, "duplicate"), 10: (0, "decodable"),
    }  # fmt: skip
    assert rejected[1].reason == "its contrast is 0.0000, below 0.02"
    assert rejected[3].reason == "a training image is 0.0000 away in pixels, not above 0.03"
    assert rejected[4].reason == "brain-mr-checker/everything is 0, below 1 (side)"
    assert rejected[6].reason.startswith("sharpness is ") and rejected[6].reason.endswith(", below 6.9")
    assert rejected[8].reason.startswith("like case 7: ")
    assert rejected[10].reason == "the image has no pixels"
    assert sum(1 for _ in dataset.cases()) == 12
    assert dataset.acceptance()["left"].rejected == {"blank": 1, "brain-mr-checker/everything": 1, "memorised": 1}
    dataset.close()


def test_a_text_that_says_something_else_is_rejected() -> None:
    asked = findings.prompt({"plane": "axial", "contrast": "T1", "lesion": "none", "level": "vertex"}, "findings")
    right = findings.realise(asked.attributes, 3)
    texts = [right, "There is a large lesion on the left.", " \n", "…"]
    maker = Maker(
        "text", lambda p, s: [Sample(a, text=texts[n]) for a, n in zip(p, s, strict=True)], 4, [FindingsChecker()],
        [Blank(0.1), Floor(FindingsChecker(), "everything", 1)],
    )  # fmt: skip
    verdicts = maker.judge(maker.make([asked] * 4, range(4)))
    assert [gate for gate, _ in verdicts] == [None, "findings-checker/everything", "blank", "blank"]
    assert "lesion" in verdicts[1][1] and "level" in verdicts[1][1]


@pytest.mark.parametrize(
    ("text", "evidence", "reason"),
    [
        ("cut", {"finished": False, "tokens": 9}, "the text was cut after 9 tokens"),
        ("half \ud800", {}, "the text has characters that no file can hold"),
        ("nul \0", {}, "the text has characters that no file can hold"),
        ("whole", {"finished": True, "tokens": 2}, ""),
    ],
)
def test_a_text_that_is_not_whole(text: str, evidence: dict[str, object], reason: str) -> None:
    maker = Maker("text", lambda p, s: [Sample(p[0], text=text, evidence=evidence)], 1)
    assert maker.judge(maker.make([Prompt("x")], [1])) == [("decodable" if reason else None, reason)]


def test_what_could_not_be_judged_does_not_pass() -> None:
    class Unsure(Sharpness):
        def __call__(self, samples: Sequence[Sample]) -> Scores:
            return Scores(torch.full((len(samples),), float("nan")))

    maker = Maker("image", lambda p, s: [Sample(p[0], image=drawn(0))], 1, [Unsure()], [Floor(Unsure(), None, -1e9)])
    made = maker.make([Prompt("x")], [1])
    assert made[0].scores == {}
    assert maker.judge(made) == [("sharpness", "sharpness could not judge it")]


def test_the_perceptual_hash() -> None:
    """Brightness and a little noise leave it alone; another image has about half of the bits."""
    smooth = [drawn(i, size=6).resize((64, 64), Image.Resampling.BICUBIC) for i in range(40)]
    hashes = [perceptual_hash(image) for image in smooth]
    noise = np.random.default_rng(0).integers(-4, 5, (64, 64, 3))
    for image, own in zip(smooth, hashes, strict=True):
        changed = Image.fromarray(np.clip(np.asarray(image) * 0.9 + noise + 10, 0, 255).astype(np.uint8))
        assert (perceptual_hash(changed) ^ own).bit_count() <= 4
        assert (perceptual_hash(image.resize((128, 128), Image.Resampling.BICUBIC)) ^ own).bit_count() <= 4
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 8 and abs(sum(apart) / len(apart) - 32) < 3


def test_wide_images_keep_their_bits() -> None:
    """16-bit greyscale is kept, compared and judged by its own range."""
    image = drawn(3, wide=True)
    data = store.png(image)
    with Image.open(io.BytesIO(data)) as found:
        assert found.mode == "I;16" and np.array_equal(np.asarray(found), np.asarray(image)) and not found.info
    assert store.fault_of(data, image) == "" and store.fault_of(data[:-30], image) != ""
    assert store.fault_of(data, drawn(4, wide=True)) == "it does not decode to its own pixels"
    dark = Image.fromarray(np.asarray(image) // 64)
    both = [Candidate(Sample(Prompt("x"), image=one), b"x") for one in (image, dark)]
    assert [bool(reason) for reason in Blank(0.02)(both)] == [False, True]
    assert Memorised([image], 0.03)(both)[0] != "" and Memorised([image], 0.03)(both)[1] == ""


def test_the_nearest_training_image_counts_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first, a middle or the last block of three; the distance is the root mean square of 32x32 grey pixels."""
    monkeypatch.setattr(gates, "_BLOCK", 4)
    training = [drawn(i, size=32) for i in range(10)]
    grey = [np.asarray(image.convert("L"), dtype=np.float64) / 255 for image in training]
    for i in (0, 3, 4, 9):
        changed = np.clip(np.asarray(training[i]).astype(int) + 5, 0, 255).astype(np.uint8)
        made = Image.fromarray(changed)
        own = np.asarray(made.convert("L"), dtype=np.float64) / 255
        least = min(float(np.sqrt(((own - one) ** 2).mean())) for one in grey)
        asked = [Candidate(Sample(Prompt("x"), image=made))]
        (reason,) = Memorised(training, 0.03)(asked)
        assert reason == f"a training image is {least:.4f} away in pixels, not above 0.03"
        assert Memorised([*training[:i], *training[i + 1 :]], 0.03)(asked) == [""]


def test_many_training_images_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 000 of them are 24 MiB of floats. They are decoded one at a time, and compared in blocks of 256 (1 MiB)."""
    monkeypatch.setattr(gates, "_BLOCK", 256)
    images, alive = [drawn(i, size=32) for i in range(5)], list[weakref.ref[Image.Image]]()

    def decoded() -> Iterator[Image.Image]:
        for i in range(6000):
            assert sum(one() is not None for one in alive[-4:]) <= 2
            image = images[i % 4].copy()
            alive.append(weakref.ref(image))
            yield image

    gate = Memorised(decoded(), 0.03)
    candidates = [Candidate(Sample(Prompt("x"), image=image)) for image in images]
    gate(candidates)
    tracemalloc.start()
    try:
        assert [bool(reason) for reason in gate(candidates)] == [True] * 4 + [False]
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_training_images_are_decoded_when_they_are_asked_for(tmp_path: Path) -> None:
    drawn(1, size=32).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    found = iter(_pictures(str(tmp_path)))
    assert next(found).size == (32, 32)
    with pytest.raises(InputError):
        next(found)
    (tmp_path / "none").mkdir()
    with pytest.raises(NotFoundError, match=r"memorised.images: there is no image in"):
        _pictures(str(tmp_path / "none"))
