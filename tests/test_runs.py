"""Run directories: nothing is ever half-written."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffalign.config import parse
from diffalign.errors import ConfigError, NotFoundError, RefusedError
from diffalign.runs import Run, new_folder, unused_folder, write_text

CONFIG = parse({"model": "m", "rewards": ["r"], "prompts": {"source": "emoji"}})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(small_disk: Path) -> None:
    run = Run.create(small_disk / "run", CONFIG)
    run.save_checkpoint(1, {"epoch": 1, "weights": torch.ones(100_000)}, keep=2)
    with pytest.raises(RefusedError, match=r"step-2: the disk is full; what was written before is intact"):
        run.save_checkpoint(2, {"epoch": 2, "weights": torch.ones(1_000_000)}, keep=2)
    state = run.load_checkpoint()
    assert state is not None and state["epoch"] == 1
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-1"]
    with pytest.raises(RefusedError):
        write_text(run.path / "config.yaml", "x" * 3_000_000)
    assert (run.path / "config.yaml").read_text().startswith("name: run")


def test_checkpoints_are_kept_up_to_a_number_and_in_numeric_order(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    for step in (8, 9, 10, 11):
        run.save_checkpoint(step, {"epoch": step}, keep=3)
    assert [path.name for path in run.checkpoints()] == ["step-9", "step-10", "step-11"]
    state = run.load_checkpoint()
    assert state is not None and state["epoch"] == 11


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "adapter") as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "adapter") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "adapter").exists()
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["whole"]


def test_metrics_survive_a_line_cut_off_by_a_crash(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    run.log(1, {"reward/total": 0.5})
    run.log(2, {"reward/total": 0.75})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert [row["step"] for row in run.metrics()] == [1, 2]
    run.rewind(1)
    assert [json.loads(line)["reward/total"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0.5]


def test_a_second_run_gets_a_second_name(tmp_path: Path) -> None:
    assert unused_folder(tmp_path / "quickstart").name == "quickstart"
    (tmp_path / "quickstart").mkdir()
    assert unused_folder(tmp_path / "quickstart").name == "quickstart-2"
    (tmp_path / "quickstart-2").mkdir()
    assert unused_folder(tmp_path / "quickstart").name == "quickstart-3"


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        Run.create(tmp_path / "file", CONFIG)
    with pytest.raises(ConfigError, match="is not empty"):
        Run.create(tmp_path, CONFIG)
    with pytest.raises(NotFoundError, match="not a run directory"):
        Run.open(tmp_path)
