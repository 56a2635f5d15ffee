"""What of a dataset is on the disk at every moment: as its specification changes, and as files take their names."""

from __future__ import annotations

import os
import pathlib
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign.synthesis import beginning, store
from tests import synthesis_stubs as stubs
from tests.synthesis_stubs import begun, contents, run, spec_of
from tests.test_synthesis_engine import NEEDS_FORK, Ticks


@NEEDS_FORK
def test_killed_while_attempts_are_raised(tmp_path: Path) -> None:
    """At every moment of it: taken up again it is as if nobody had killed it, and the hash is that of the file."""
    few, many = spec_of(attempts=2), spec_of(attempts=20)

    def taken_up(folder: Path, tick: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            ticks = Ticks(patch, tick)
            beginning.resume(many, folder, stubs.manifest(many))
            return ticks.now

    begun(tmp_path / "whole", few)
    moments = taken_up(tmp_path / "whole", 0)
    whole = contents(tmp_path / "whole")
    assert store.read_manifest(tmp_path / "whole")[0].spec_sha256 == many.sha256
    assert yaml.safe_load(whole[store.SPEC]) == many.public() and moments >= 6
    half = 0
    for tick in range(1, moments + 1):
        folder = tmp_path / str(tick)
        begun(folder, few)
        if (child := os.fork()) == 0:
            try:
                taken_up(folder, tick)
            finally:
                os._exit(3)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        written = yaml.safe_load((folder / store.SPEC).read_text())["attempts"]
        half += written == 20 and store.read_manifest(folder)[0].spec_sha256 == few.sha256
        beginning.resume(many, folder, stubs.manifest(many))
        assert contents(folder) == whole, f"killed at moment {tick}"
    assert half, "the test needs a moment between the two files"


def test_what_was_left_half_written_does_not_stay(tmp_path: Path) -> None:
    """A process that raised the attempts was killed before its specification had its name; the old one goes on."""
    begun(tmp_path / "out", spec_of())
    before = contents(tmp_path / "out")
    (tmp_path / "out" / f".{store.SPEC}.tmp").write_text("name: st")
    beginning.resume(spec_of(), tmp_path / "out", stubs.manifest(spec_of()))
    assert contents(tmp_path / "out") == before


def test_a_name_is_on_the_disk_before_anything_relies_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each file that took its name, and each folder that was made, the next thing flushed is the folder around.
    Without that a power cut may leave a journal that names an image which is not there.
    """
    events = list[tuple[str, int]]()
    fsync, replace, mkdir = os.fsync, pathlib.Path.replace, pathlib.Path.mkdir

    def flushed(handle: int) -> None:
        fsync(handle)
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            events.append(("flushed", os.fstat(handle).st_ino))

    def replaced(path: Path, target: Path) -> Path:
        found = replace(path, target)
        events.append(("named", target.parent.stat().st_ino))
        return found

    def made(path: Path, *args: Any, **options: Any) -> None:
        new = not path.exists()
        mkdir(path, *args, **options)
        if new:
            events.append(("named", path.parent.stat().st_ino))

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(pathlib.Path, "replace", replaced)
    monkeypatch.setattr(pathlib.Path, "mkdir", made)
    begun(tmp_path / "out", spec_of())
    run(tmp_path / "out", spec_of())
    named = [i for i, (what, _) in enumerate(events) if what == "named"]
    assert len(named) >= 12 + 6  # an image for each case, and out/, spec, journal (twice), manifest (twice), list
    assert all(events[i + 1] == ("flushed", events[i][1]) for i in named)
