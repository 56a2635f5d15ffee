"""The parts of the embedded models' training that can go wrong silently."""

from __future__ import annotations

from pathlib import Path

import torch

from diffalign.seeds import derive
from diffalign.worlds import brain_mr
from pipelines.embedded import reader, tokenizer
from pipelines.embedded.data import fingerprint, lesion_cells, scenes
from pipelines.embedded.denoiser import HALVES, OPPOSITE


def test_lesion_cells_cover_the_lesion_and_say_nothing_of_its_side() -> None:
    cells = lesion_cells(12)
    assert cells.shape == (12, 16, 16) and torch.equal(cells, cells.flip(2))
    for number in range(12):
        mask = brain_mr.scene(derive(number, "training scene", "brain-mr")).lesion_mask
        rows, columns = mask.nonzero()
        assert all(cells[number, row // 4, column // 4] for row, column in zip(rows, columns, strict=True))
        assert bool(cells[number].any()) == bool(mask.any())


def test_a_fingerprint_is_of_the_weights_as_they_are_stored() -> None:
    """Half precision, as in the files: read back it is the same; one other weight, or another name, is another."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    stored = torch.nn.Linear(3, 2)
    stored.load_state_dict({name: value.half().float() for name, value in layer.state_dict().items()})
    assert fingerprint(layer) == fingerprint(stored) != fingerprint(layer, layer)
    assert fingerprint(torch.nn.Sequential(layer)) != fingerprint(layer)
    with torch.no_grad():
        stored.weight[0, 0] += 0.5
    assert fingerprint(layer) != fingerprint(stored)


def test_facts_are_classes_with_zero_for_what_is_not_said() -> None:
    captions = ["two cats on a blue background", "a cat left of a dog on a pink background"]
    found = reader.facts("emoji", captions)
    assert found["count"][0] > 0 and found["count"][1] == 0
    assert found["relation"][0] == 0 and found["relation"][1] > 0
    assert found["background"][0] != found["background"][1]


def test_an_encoder_learns_to_read(tmp_path: Path) -> None:
    """Six attributes of 2 to 10 classes: guessing gives under a half; 60 small steps tell most of them. Seeded."""
    torch.manual_seed(0)
    _, captions = scenes("brain-mr", 64)
    words = tokenizer.build(captions, tmp_path)
    tokens = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoder, facts = reader.build(words), reader.facts("brain-mr", captions)
    guessed = reader.teach(encoder, tokens, facts, steps=1, batch=64)
    assert guessed < 0.5
    assert reader.teach(encoder, tokens, facts, steps=60, batch=64) > 0.8


def test_halves_are_where_the_worlds_draw_things() -> None:
    """A scene's own pixels tell: the lesion's mask lies in the named half, and opposite halves share no cell."""
    for number in range(40):
        scene = brain_mr.scene(number)
        if side := scene.prompt.attributes.get("side"):
            _, rows, columns = HALVES[str(side)]
            whole = scene.lesion_mask.reshape(16, 4, 16, 4).sum((1, 3))
            assert whole[rows, columns].sum() > 0.9 * whole.sum()
    for one, other in OPPOSITE.items():
        cells = torch.zeros(1, 16, 16)
        cells[HALVES[one]] += 1
        cells[HALVES[other]] += 1
        assert bool((cells == 1).all())


def test_what_stands_where_is_a_fact() -> None:
    """Cat left of dog: the cat is on the left and the dog on the right, and the other way round with "right of"."""
    found = reader.facts(
        "emoji", [f"a cat {how} a dog on a blue background" for how in ("left of", "right of", "above")]
    )
    left, right, top, bottom = (found[end].tolist() for end in ("left", "right", "top", "bottom"))
    assert left[2] == right[2] == 0 and top[:2] == bottom[:2] == [0, 0]
    assert left[0] != left[1] and left[0] > 0 and left[1] > 0
    assert [found["object"][0] > 0, found["other"][0] > 0] == [True, True]
    assert top[2] > 0 and bottom[2] > 0
