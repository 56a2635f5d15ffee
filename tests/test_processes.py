"""Two real processes, started by ``torchrun`` with gloo, against one: the same training, and nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from apps import build
from apps.cli import main
from diffalign import processes
from diffalign.config import parse
from diffalign.errors import ConfigError
from diffalign.processes import Processes, checksum, own_device
from diffalign.runs import Run
from tests.processes_cases import CASES, evaluated, trained, walk
from tests.test_trainer import CONFIG

ROOT = Path(__file__).resolve().parent.parent
Ranks = tuple[dict[str, Any], dict[str, Any]]


def launch(*arguments: str | Path, folder: Path = ROOT) -> subprocess.Popen[str]:
    """Two processes on this machine that meet at a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*torchrun, *map(str, arguments)], env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
    )  # fmt: skip


def ran(cases: str, folder: Path) -> Path:
    """The folder, in which two processes have trained every case of a module and left what they saw."""
    process = launch("-m", cases, folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained every case; one process left them a run of 2 epochs."""
    folder = tmp_path_factory.mktemp("two")
    walk(Run.create(folder / "of-one", parse(CONFIG)), epochs=2).train()
    return ran("tests.processes_cases", folder)


@pytest.fixture(scope="module")
def two(folder: Path) -> Ranks:
    """What each of the two processes that have worked in the module's folder saw."""
    first, second = (torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


def assert_same_training(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Weights to two thousandths of how far training moved them: Adam divides by how large a gradient is, so it makes
    more of a difference in the last bits than the gradient had. Metrics, the gradient's norm among them, to a
    thousandth, or 1e-6.
    """
    assert one["updates"] == other["updates"] > 0
    moved = max(float((weights - one["before"][name]).abs().max()) for name, weights in one["weights"].items())
    assert moved > 1e-4
    for name, weights in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], weights, rtol=0, atol=2e-3 * moved)
    assert len(one["metrics"]) == len(other["metrics"]) > 0
    for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        # Both processes make the checks of the first update, and both of the calls count.
        compared = {name for name in mine if not name.startswith("time/") and name != "count/denoiser_calls"}
        assert {n: theirs[n] for n in compared} == pytest.approx({n: mine[n] for n in compared}, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(case: str, two: Ranks, tmp_path: Path) -> None:
    assert_same_training(trained(CASES[case](tmp_path)), two[0][case])


@pytest.mark.parametrize("case", CASES)
def test_both_processes_end_with_the_same_bits(case: str, two: Ranks) -> None:
    first, second = (rank[case]["weights"] for rank in two)
    assert all(torch.equal(weights, second[name]) for name, weights in first.items())


def test_each_process_scores_its_own_share(two: Ranks) -> None:
    """12 images, 6 for each."""
    assert [rank["scored"] for rank in two] == [6, 6]


def test_an_error_in_one_process_ends_both(two: Ranks) -> None:
    assert two[0]["broken"] == ["InputError", "process 1: the judge does not answer"]
    assert two[1]["broken"] == ["InputError", "the judge does not answer"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not tell a process's threads")
def test_no_thread_of_gloo_is_left_when_the_processes_have_parted(two: Ranks) -> None:
    """Torch aborts a process that ends while one still holds a tensor of the last exchange."""
    for rank in two:
        during, after = ([name for name in names if "gloo" in name] for names in rank["threads"])
        assert during and not after


def test_processes_with_other_weights_are_refused(two: Ranks) -> None:
    for rank in two:
        kind, message = rank["apart"]
        assert kind == "RefusedError" and "the processes came apart: at the start" in message


def test_ctrl_c_in_one_process_stops_both_at_the_same_place(two: Ranks) -> None:
    """Pressed in the second process only, after its second epoch."""
    for rank in two:
        assert rank["interrupted"][0] == "Interrupted" and rank["checkpoints"] == ["step-2"]


def test_two_processes_resume_bit_for_bit(two: Ranks, tmp_path: Path) -> None:
    """2 epochs and 1 more are 3 in one go; the metrics of each epoch stand there once."""
    for rank in two:
        whole, resumed = rank["straight"], rank["resumed"]
        assert torch.equal(whole["weights"]["mean"], resumed["weights"]["mean"])
        assert [row["step"] for row in rank["resumed metrics"]] == [1, 2, 3]


def test_a_checkpoint_of_one_process_goes_on_in_two_and_back(two: Ranks, folder: Path) -> None:
    straight = trained(walk())
    back = walk(Run(folder / "of-two"))
    assert back.resume() and back.epoch == 2
    for resumed in (two[0]["resumed from one"], trained(back)):
        torch.testing.assert_close(resumed["weights"]["mean"], straight["weights"]["mean"], rtol=1e-5, atol=1e-6)


def test_an_evaluation_is_that_of_one_process(two: Ranks, tmp_path: Path) -> None:
    alone = evaluated(tmp_path)
    assert alone["rewards"]["target"]["difference"]["mean"] != 0
    for rank in two:
        assert rank["evaluation"] == alone


# -- one process ------------------------------------------------------------------------------------------------------


def test_alone_there_is_nobody_to_ask() -> None:
    alone = Processes()
    assert (alone.rank, alone.count, alone.device, alone.first) == (0, 1, None, True)
    answer = object()
    assert alone.exchange("anything", answer) == [answer]
    assert alone.first_says("anything", lambda: 7) == alone.first_then_all("anything", lambda: 7) == 7
    assert alone.own(5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="mine"), alone.telling():
        raise ValueError("mine")


def test_shares_are_disjoint_and_balanced() -> None:
    """7 rows for 3 processes: 3, 2 and 2."""
    crew = [Processes() for _ in range(3)]
    for rank, one in enumerate(crew):
        one.rank, one.count = rank, 3
    assert [one.own(7).tolist() for one in crew] == [[0, 3, 6], [1, 4], [2, 5]]
    assert crew[2].own(2).tolist() == []


def test_a_checksum_sees_the_last_bit() -> None:
    weights = torch.nn.Parameter(torch.linspace(-1, 1, 1001))
    other = torch.nn.Parameter(weights.detach().clone())
    scalar = torch.nn.Parameter(torch.tensor(0.5))
    assert checksum([weights, scalar]) == checksum([other, scalar]) != checksum([scalar, weights])
    other.data[500] = torch.nextafter(other.data[500], torch.tensor(9.0))
    assert checksum([weights]) != checksum([other])


def test_a_process_computes_on_what_the_launcher_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As process 3 of a machine with several GPUs, which this one need not have."""
    given = torch.device("cuda", 3)
    assert own_device("auto", given) == own_device("cuda", given) == given
    for name in ("cuda:0", "cpu"):
        with pytest.raises(
            ConfigError, match=f"device is '{name}', but the processes of this run were started on cuda"
        ):
            own_device(name, given)
    started = Processes()
    started.device = given
    monkeypatch.setattr(processes, "start", lambda: started)
    assert build.device("auto") == given


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(main, ["list", "recipes"])
    assert done.exit_code == 2 and "only align and generate run in several processes" in done.stderr
