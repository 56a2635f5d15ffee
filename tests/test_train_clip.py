from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from diffalign.images import to_pil
from diffalign.worlds import brain_mr, emoji
from rewards import clip_scenes as world
from rewards import train_clip, validate_clip
from rewards.clip import ClipReward
from rewards.clip_scenes import Scenes


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return world.render("emoji", 40) + world.render("brain-mr", 6)


def test_the_loss_is_the_cross_entropy_with_shared_targets() -> None:
    """Two images of one caption a, and a wrong caption b; all cosines are 1 or 0, the scale is 1.

    By image: each sees (a: 1, b: 0), so it pays log(1 + e^-1). By caption: a sees both images at 1 and wants half of
    each, so it pays log 2; b is true of nothing and asks nothing. The loss is the mean of both ways.
    """
    images, captions = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 1]])
    true = torch.tensor([[True, False], [True, False]])
    expected = (np.log(1 + np.exp(-1)) + np.log(2)) / 2
    assert train_clip.contrastive_loss(images, captions, true, torch.tensor(1.0)).item() == pytest.approx(expected)


def test_a_batch_knows_what_is_true(scenes: Scenes) -> None:
    batch = next(train_clip.batches(scenes, 16, 2, seed=0))
    assert batch.images.shape == (16, 3, 64, 64)
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    assert batch.true.shape == (16, len(batch.captions))
    assert batch.true.any(1).all()
    assert (~batch.true.any(0)).any()  # some captions are only wrong
    assert len(set(batch.captions)) == len(batch.captions)


def test_a_batch_depends_on_its_number_alone(scenes: Scenes) -> None:
    third = list(islice(train_clip.batches(scenes, 8, 2, seed=0), 3))[2]
    resumed = next(train_clip.batches(scenes, 8, 2, seed=0, start=2))
    assert third.captions == resumed.captions
    assert torch.equal(third.images, resumed.images)
    assert torch.equal(third.true, resumed.true)


def test_rivals_are_wrong_and_truths_are_true(scenes: Scenes) -> None:
    for place, attributes in scenes.facts:
        true = {world.meaning(place, fact) for fact in world.truths(place, attributes)}
        for topic in world.TOPICS[place]:
            for rival in world.rivals(place, attributes, topic):
                assert world.meaning(place, rival) not in true
                assert world.caption(place, rival) != world.caption(place, attributes)


def test_the_same_said_in_two_ways_has_one_meaning() -> None:
    a = {"kind": "relation", "object": "cat", "relation": "right of", "other": "dog", "background": "blue"}
    b = {"kind": "relation", "object": "dog", "relation": "left of", "other": "cat", "background": "blue"}
    assert world.meaning("emoji", a) == world.meaning("emoji", b)
    assert world.meaning("emoji", a) != world.meaning("emoji", {**a, "relation": "left of"})


def test_rivals_of_a_relation_and_of_a_slice() -> None:
    relation = {"kind": "relation", "object": "cat", "relation": "above", "other": "dog", "background": "blue"}
    assert [r["relation"] for r in world.rivals("emoji", relation, "relation")] == ["left of", "right of", "below"]
    assert len(world.rivals("emoji", relation, "object")) == len(emoji.OBJECTS) - 2
    assert world.rivals("emoji", relation, "count") == []
    slices = brain_mr.scene(1).prompt.attributes
    planes = [str(rival["plane"]) for rival in world.rivals("brain-mr", slices, "plane")]
    assert sorted([*planes, str(slices["plane"])]) == sorted(brain_mr.PLANES)
    for rival in world.rivals("brain-mr", slices, "plane"):
        brain_mr.validate(rival)


def test_every_word_is_one_token_and_any_text_can_be_read() -> None:
    captions = world.all_captions()
    tokenizer = train_clip.build_tokenizer(captions)
    words = {word for caption in captions[::37] for word in caption.replace(",", " ,").split() if word.isalpha()}
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in words)
    assert max(len(tokenizer(caption)["input_ids"]) for caption in captions[::37]) <= train_clip.CONTEXT
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # CLIP pools at the largest id
    assert tokenizer.decode(tokenizer("Ünïcode ♥", add_special_tokens=False)["input_ids"]).strip() == "ünïcode ♥"


def test_a_few_steps_make_a_folder_that_open_clip_loads_and_that_resumes(tmp_path: Path, scenes: Scenes) -> None:
    train_clip.train(tmp_path, scenes, steps=1, batch=4)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    size = (tmp_path / "model" / "open_clip_model.safetensors").stat().st_size
    assert size == pytest.approx(2 * sum(p.numel() for p in model.state_dict().values()), rel=0.02)
    assert size < 12e6
    reward = ClipReward(str(tmp_path / "model"))
    assert reward.encode_images(to_pil(scenes.images[:2].float() / 255)).shape == (2, train_clip.EMBED_DIM)
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    train_clip.train(tmp_path, scenes, steps=3, batch=4, resume=True)
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (before["step"], after["step"]) == (1, 3)
    assert after["spent"] > before["spent"]


def test_the_validation_counts_what_a_model_gets_right() -> None:
    """8 of 10 right with four choices: the Wilson interval of 8 in 10 is 0.490 to 0.943."""
    tallied = validate_clip.Tally()
    for i in range(10):
        tallied.add(i < 8, 4)
    assert tallied.row() == "0.800 | 0.490 to 0.943 | 10 | 0.250"
