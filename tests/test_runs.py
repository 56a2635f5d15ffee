"""Run directories: nothing is ever half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from diffalign.config import parse
from diffalign.errors import ConfigError, NotFoundError, RefusedError
from diffalign.runs import Run, check_writable, new_file, new_folder, recover, unused_folder, write_text

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
    assert not list(run.path.glob(".*.tmp"))  # it would keep what is left of the disk


def test_a_place_that_takes_no_file_is_one_sentence(tmp_path: Path) -> None:
    """Nor can the half file be removed there: that hides nothing."""
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(RefusedError, match=r"cannot write .*pairs.parquet: "), new_file(place / "pairs.parquet"):
            pass
        with pytest.raises(RefusedError, match=r"cannot write into .*file.*: not a directory"):
            check_writable(place)
    check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_kill_while_a_folder_is_replaced_leaves_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    """From the ``kill_at``-th rename on nothing more happens, as if the process were gone; two renames replace it."""
    place = tmp_path / "adapter"
    with new_folder(place) as folder:
        (folder / "weights").write_text("old")
    done, replace = 0, os.replace

    def dying(source: Path, target: Path) -> None:
        nonlocal done
        done += 1
        if done >= kill_at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)
        with suppress(KeyboardInterrupt), new_folder(place) as folder:
            (folder / "weights").write_text("new")
    recover(place)
    assert (place / "weights").read_text() == ("new" if kill_at == 3 else "old")
    with new_folder(place) as folder:
        (folder / "weights").write_text("newest")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (place / "weights").read_text() == "newest"


def test_a_run_that_is_opened_gets_back_what_was_set_aside(tmp_path: Path) -> None:
    Run.create(tmp_path, CONFIG)
    (tmp_path / ".adapter.old").mkdir()
    (tmp_path / ".adapter.old" / "weights").write_text("old")
    Run.open(tmp_path)
    assert (tmp_path / "adapter" / "weights").read_text() == "old" and not (tmp_path / ".adapter.old").exists()


def test_a_checkpoint_is_written_once_and_an_empty_folder_is_none(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    run.save_checkpoint(1, {"epoch": 1}, keep=2)
    before = (tmp_path / "checkpoints" / "step-1" / "state.pt").stat()
    run.save_checkpoint(1, {"epoch": 99}, keep=2)
    after = (tmp_path / "checkpoints" / "step-1" / "state.pt").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    (tmp_path / "checkpoints" / "step-2").mkdir()
    state = run.load_checkpoint()
    assert state is not None and state["epoch"] == 1
    run.save_checkpoint(2, {"epoch": 2}, keep=2)
    assert [path.name for path in run.checkpoints()] == ["step-1", "step-2"]


def test_only_what_this_run_created_is_discarded(tmp_path: Path) -> None:
    """A folder that was there stays, and so does every file that the run did not write; an opened run loses nothing."""
    Run.create(tmp_path / "new", CONFIG).discard_unused()
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    run = Run.create(tmp_path / "mine", CONFIG)
    run.write_environment(0, {})
    run.discard_unused()
    assert list((tmp_path / "mine").iterdir()) == []
    run = Run.create(tmp_path / "mine", CONFIG)
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    run.discard_unused()
    Run.open(tmp_path / "mine").discard_unused()
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"config.yaml", "thesis.txt"}


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


def test_metrics_are_valid_json(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse({"model": "m", "rewards": ["x"], "prompts": {"source": "emoji"}}))
    run.log(1, {"a/b": 1.5, "a/c": float("nan"), "a/d": float("inf")})
    row = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["a/b"] == 1.5 and row.keys() == {"step", "time", "a/b"}
