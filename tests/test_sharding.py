"""A denoiser whose frozen weights are divided among two real processes, against one that is whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import distributed

from diffalign.config import AdapterConfig, TrainerConfig, parse
from diffalign.errors import ConfigError
from diffalign.experience import Rollouts
from diffalign.lockstep import NOTHING, Lockstep, LostError
from diffalign.runs import Run
from diffalign.trainer import Trainer
from pipelines.loading import load_adapter, load_policy
from tests import test_cli, test_processes
from tests.processes_cases import SCENES, bright, trained
from tests.sharding_cases import CASES, evaluated, policy, short
from tests.test_cli import diffalign
from tests.test_processes import ROOT, Ranks, assert_same_training, ran
from tests.test_trainer import CONFIG

desk = test_cli.desk
two = test_processes.two


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained every case."""
    return ran("tests.sharding_cases", tmp_path_factory.mktemp("divided"))


@pytest.mark.parametrize("case", CASES)
def test_divided_weights_train_as_whole_ones_do(case: str, two: Ranks, tmp_path: Path) -> None:
    """Whether a process has more to do than the other, or nothing; on both the same bits come out."""
    assert_same_training(trained(CASES[case](tmp_path, False)), two[0][case])
    first, second = (rank[case]["weights"] for rank in two)
    assert all(torch.equal(weights, second[name]) for name, weights in first.items())


def test_each_process_keeps_half_of_every_frozen_weight(two: Ranks) -> None:
    """Rows are divided, so of an odd number one process has one more: of 9 rows 5."""
    assert all(rank["divided"] for rank in two)
    assert sum(rank["kept"] for rank in two) == two[0]["whole"] > 10_000
    assert max(rank["kept"] for rank in two) < 0.51 * two[0]["whole"]


def test_passes_of_one_process_alone_find_the_others(two: Ranks) -> None:
    """The first samples what the second does not, from the policy and from its reference: the bits of whole weights."""
    for rank in two:
        divided, whole = rank["latents"]
        assert torch.equal(divided, whole) and not torch.equal(*divided)


def test_an_error_before_the_weights_are_divided_ends_both(two: Ranks) -> None:
    assert two[0]["undivided"] == ["InputError", "process 1: no room for its part"]
    assert two[1]["undivided"] == ["InputError", "no room for its part"]


def test_an_error_between_passes_ends_both(two: Ranks) -> None:
    assert two[0]["broken"] == ["InputError", "process 1: the judge does not answer"]
    assert two[1]["broken"] == ["InputError", "the judge does not answer"]


def test_divided_runs_resume_bit_for_bit_and_go_on_whole(two: Ranks, folder: Path, tmp_path: Path) -> None:
    """An epoch and another are two in one go. What was saved loads into a whole model, as weights and as a state."""
    for rank in two:
        straight, resumed = rank["straight"]["weights"], rank["resumed"]["weights"]
        assert all(torch.equal(weights, resumed[name]) for name, weights in straight.items())
    whole = short(tmp_path, False, Run(folder / "resumed"))
    assert whole.resume() and whole.epoch == 2
    state = {name: weights.detach() for name, weights in whole.parameters.items()}
    assert all(torch.equal(weights, two[0]["straight"]["weights"][name]) for name, weights in state.items())
    fresh = policy(tmp_path, False)
    load_adapter(fresh, folder / "resumed" / "adapter")
    assert all(torch.equal(weights, state[name]) for name, weights in fresh.trainable().items())
    fresh.family.pipeline.unload_lora_weights()
    fresh.family.pipeline.load_lora_weights(folder / "resumed" / "adapter")
    assert fresh.family.pipeline.get_active_adapters()


def test_an_evaluation_is_that_of_whole_weights(two: Ranks, tmp_path: Path) -> None:
    alone = evaluated(tmp_path, False)
    for rank in two:
        found = rank["evaluation"]
        assert found["rewards"] == alone["rewards"] and found["distance"] == pytest.approx(alone["distance"], rel=1e-3)


@pytest.mark.parametrize(("how", "said"), [("broken", "ValueError: this block is broken"), ("kill", "")])
def test_a_process_that_ends_in_the_middle_of_a_pass_ends_the_other(how: str, said: str, tmp_path: Path) -> None:
    """Without a launcher, which would end the other itself: it notices, and says so, within a minute."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharding_cases", tmp_path, how], cwd=ROOT,
            env=os.environ | own | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    both[1].wait(timeout=200)
    began = time.monotonic()
    both[0].wait(timeout=60)
    assert time.monotonic() - began < 60
    found = {path.name: path.read_text() for path in tmp_path.glob("said-*")}
    assert found.pop("said-0").startswith("LostError: another process of this run has ended")
    assert found == ({"said-1": said} if said else {})


# -- one process ------------------------------------------------------------------------------------------------------


def test_alone_there_is_nothing_to_divide_among(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.shard divides .* there is one: start several"):
        policy(tmp_path, True)


def test_what_cannot_be_divided_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    shard = {"trainer": {"shard": True}}
    with pytest.raises(ConfigError, match="without an adapter all are trained: leave it out"):
        parse(CONFIG | shard | {"adapter": None})
    with pytest.raises(ConfigError, match="embedded:findings-lm makes texts: leave it out"):
        parse(CONFIG | shard | {"model": "embedded:findings-lm", "modality": "text"})
    with pytest.raises(ConfigError, match="makes texts, and only denoisers are divided"):
        load_policy("embedded:findings-lm", adapter=AdapterConfig(), shard=True)
    with pytest.raises(ConfigError, match="with full all are trained"):
        load_policy(str(tiny_folder), full=True, shard=True)
    with pytest.raises(ConfigError, match="build the policy with shard=True"):
        Trainer(policy(tmp_path, False), Rollouts(bright(), SCENES), settings=TrainerConfig(shard=True))


def test_a_dry_run_in_one_process_says_what_would_be_divided(desk: Path) -> None:
    """All of the denoiser but its adapter: in float32, 4 bytes a number."""
    done = diffalign("align", "run.yaml", "--dry-run", "--set", "trainer.shard=true")
    assert done.exit_code == 0, done.output
    model = yaml.safe_load((desk / "run.yaml").read_text())["model"]
    size = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(model, subfolder="unet").parameters()) * 4
    assert f"of it divided:       {size / 2**20:.1f} MiB of weights, of which each of N" in done.output
    assert "of it divided" not in diffalign("align", "run.yaml", "--dry-run").output


def test_who_waits_stands_in_until_all_want_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wants work 1, the others two of 0 and then 1; then it comes to an exchange, and they want one more of 1."""
    done: list[str] = []
    agreed = iter([0, 0, 1, 1, NOTHING])
    together = Lockstep(None)
    together.rest()  # nothing to help with, and nobody to ask
    monkeypatch.setattr(together, "_next", lambda wanted: next(agreed))
    assert together.add(lambda: done.append("for others: 0"), lambda: done.append("for others: 1")) == 0
    assert together.work(1, lambda: done.append("own") or "result") == "result"
    together.rest()
    assert done == ["for others: 0", "for others: 0", "own", "for others: 1"] and not together.broken


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), LostError),
        (distributed.DistBackendError("NCCL communicator was aborted"), LostError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
)
def test_an_error_within_work_cannot_be_told(
    error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Lockstep(None)
    monkeypatch.setattr(together, "_next", lambda wanted: wanted)

    def fail() -> None:
        raise error

    with pytest.raises(raised):
        together.work(together.add(fail), fail)
    assert together.broken
