"""Moments in 8 bits: that they are small, that they train, and that a run goes on with them bit for bit.

Where bitsandbytes is not installed (it is an extra, ``memory``), a stand-in shows that the settings reach it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from apps import build
from diffalign import optimisers
from diffalign.config import CreditConfig, SamplerConfig, TrainerConfig, parse
from diffalign.errors import NotFoundError
from diffalign.experience import Rollouts
from diffalign.runs import Run
from diffalign.trainer import Trainer
from pipelines.loading import load_policy
from tests import tiny_pipelines
from tests.test_families_table import PROMPTS
from tests.test_trainer import Brightness

EIGHT = TrainerConfig(optimiser="adamw-8bit", learning_rate=1e-2, weight_decay=0.5)


def test_the_default_is_the_adamw_of_torch() -> None:
    made = optimisers.make(TrainerConfig(learning_rate=0.5, weight_decay=0.25), [nn.Parameter(torch.ones(3))])
    assert type(made) is torch.optim.AdamW
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.5, 0.25)


def test_a_missing_package_is_one_sentence_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers, "find_spec", lambda name: None)
    fields = {"model": "embedded:emoji", "prompts": {"source": "embedded:emoji"}, "rewards": ["emoji-checker"]}
    sentence = "takes the package bitsandbytes, which is not installed; pip install 'diffalign\\[memory\\]'"
    for section in (
        {"trainer": {"optimiser": "adamw-8bit"}},
        {"warm_up": {"demonstrations": "emoji", "trainer": {"optimiser": "adamw-8bit"}}},
    ):
        with pytest.raises(NotFoundError, match=sentence):
            build.check(parse(fields | section, "test"))
    with pytest.raises(NotFoundError, match=sentence):
        optimisers.make(EIGHT, [nn.Parameter(torch.ones(3))])


def test_the_settings_reach_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the names and arguments of bitsandbytes 0.50."""
    given: dict[str, Any] = {}
    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")

    def stand_in(parameters: Any, **options: Any) -> str:
        given.update(options, parameters=parameters)
        return "made"

    optim.AdamW8bit = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    monkeypatch.setattr(optimisers, "find_spec", lambda name: object())
    weights = [nn.Parameter(torch.ones(3))]
    assert optimisers.make(EIGHT, iter(weights)) == "made"
    assert given == {"parameters": weights, "lr": 1e-2, "weight_decay": 0.5, "min_8bit_size": 4096}


def test_the_bytes_of_the_moments() -> None:
    """By hand. 5000 numbers in 8 bits: 5000 + 20 scales of 4 bytes, twice, 10160; 100 numbers stay at 2 x 400."""
    weights = [nn.Parameter(torch.ones(50, 100)), nn.Parameter(torch.ones(100))]
    assert optimisers.nbytes(EIGHT, weights) == 10160 + 800
    assert optimisers.nbytes(TrainerConfig(), weights) == 2 * 5100 * 4


def test_moments_have_the_bytes_that_are_planned() -> None:
    """What bitsandbytes itself holds, but for the two tables of 256 values that all weights share."""
    pytest.importorskip("bitsandbytes")
    weights = [nn.Parameter(torch.ones(50, 100)), nn.Parameter(torch.ones(100))]
    made = optimisers.make(EIGHT, weights)
    sum(weight.square().sum() for weight in weights).backward()  # type: ignore[union-attr]
    made.step()
    held = {}
    for state in made.state.values():
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and not k.startswith("qmap")}
        held |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}
    assert sum(held.values()) == optimisers.nbytes(EIGHT, weights)


def test_eight_bits_find_the_minimum_of_a_bowl() -> None:
    """64 x 128 weights from 1 to targets in [-1, 1], at most 2 away: 400 steps of 0.015 in the mean reach 6 far."""
    pytest.importorskip("bitsandbytes")
    target = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = nn.Parameter(torch.ones(64, 128))
    made = optimisers.make(TrainerConfig(optimiser="adamw-8bit", learning_rate=3e-2, weight_decay=0), [weight])
    for step in range(400):
        made.param_groups[0]["lr"] = 3e-2 * (1 - step / 400)
        made.zero_grad()
        (weight - target).square().sum().backward()
        made.step()
    assert float((weight - target).detach().abs().max()) < 0.01


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Every weight of a tiny U-Net, of which some have more than 4096 numbers: 3 epochs, or 1 and then 2 more."""
    pytest.importorskip("bitsandbytes")
    folder = tiny_pipelines.save("sd", tmp_path)
    fields = {"model": str(folder), "prompts": {"source": "embedded:emoji"}, "rewards": ["emoji-checker"]}

    def job(place: str) -> Trainer:
        policy = load_policy(str(folder), sampler=SamplerConfig(steps=2, size=tiny_pipelines.SIZE), full=True)
        path = tmp_path / place
        run = Run.open(path) if path.exists() else Run.create(path, parse(dict(fields), "test"))
        settings = TrainerConfig(
            epochs=3, samples_per_epoch=4, batch_size=2, learning_rate=1e-3, optimiser="adamw-8bit"
        )
        rewards = Rollouts(Brightness(), PROMPTS)
        return Trainer(policy, rewards, settings=settings, credit=CreditConfig(rule="batch"), run=run)

    whole, first = job("whole"), job("cut")
    whole.train()
    first.train(1)
    assert any(state["state1"].dtype == torch.uint8 for state in first.optimiser.state.values())
    again = job("cut")
    assert again.resume() and again.epoch == 1
    again.train()
    assert again.updates == whole.updates == 6
    for name, weight in whole.parameters.items():
        assert torch.equal(weight, again.parameters[name]), name
