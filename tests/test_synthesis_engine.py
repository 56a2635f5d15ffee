"""The loop that makes datasets: the same bytes however it is run, killed at any moment, or cut into batches."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pathlib
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.errors import InputError, NotFoundError, RefusedError
from diffalign.seeds import derive
from diffalign.synthesis import beginning, engine, rows, store
from diffalign.synthesis.gates import Duplicates
from diffalign.synthesis.journal import Attempt, Journal
from diffalign.synthesis.store import Generated
from diffalign.types import Prompt, Sample
from tests import synthesis_stubs as stubs
from tests.synthesis_stubs import begun, contents, makers, run, spec_of

ROOT = Path(__file__).resolve().parent.parent
NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that is left alone: some images in a pool of 30 are another case's, some unlucky."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    begun(folder, spec_of())
    run(folder, spec_of(), 30)
    return contents(folder)


def opened(folder: Path) -> tuple[Generated, list[Attempt]]:
    dataset = Generated.open(folder)
    return dataset, list(dataset.attempts())


def test_a_dataset_is_whole_and_tells_how_it_came_to_be(tmp_path: Path) -> None:
    """Every case follows from the seeds; what a gate rejected was tried again, and what had passed was left alone."""
    wanted = spec_of()
    begun(tmp_path / "out", wanted)
    run(tmp_path / "out", wanted, 30)
    dataset, attempts = opened(tmp_path / "out")
    cases = list(dataset.cases())
    assert dataset.complete and [case.index for case in cases] == list(range(12))
    assert Counter(case.stratum for case in cases) == Counter(rows.survey(wanted).strata)
    assert Counter(case.split for case in cases) == {"train": 9, "test": 3}
    for case in cases:
        image, text = (case.provenance[name] for name in ("seed", "text_seed"))
        assert image == derive(int(wanted.identity[:15], 16), "image", case.index, case.provenance["attempt"])
        assert dataset.image(case.image or "") == store.png(stubs.picture(image, 30))
        assert case.text == f"row: {case.row['plane']} {case.row['lesion']}: text {text}" and text % 4
        assert case.prompt == f"{case.row['plane']} slice, lesion {case.row['lesion']}, age {case.row['age']}"
        assert case.scores["luck"] >= 0.4 and case.scores["luck/half"] == case.scores["luck"] / 2
    gates = Counter(attempt.gate for attempt in attempts)
    assert {"luck", "duplicate", "decodable", None} == set(gates), "the test needs one of each"
    assert gates[None] == 24
    for part in ("image", "text"):
        for case in cases:
            own = [a for a in attempts if a.row == case.index and a.part == part]
            assert [a.attempt for a in own] == list(range(len(own)))
            assert [a.gate is None for a in own] == [False] * (len(own) - 1) + [True]
    assert len({case.image for case in cases}) == 12
    kept = {a.image for a in attempts if a.part == "image" and a.gate in (None, "duplicate")}
    assert {path.stem for path in (tmp_path / "out" / "files").rglob("*.png")} == kept
    tally = dataset.acceptance()
    assert sum(one.rejected.get("duplicate", 0) for one in tally.values()) == gates["duplicate"]
    assert all(one.wanted == one.accepted for one in tally.values())
    assert sum(one.attempts for one in tally.values()) == len({(a.row, a.attempt) for a in attempts})
    dataset.close()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_another_batch_size_makes_the_same(tmp_path: Path, uninterrupted: dict[str, bytes], batch_size: int) -> None:
    begun(tmp_path / "out", spec_of())
    run(tmp_path / "out", spec_of(), 30, batch_size=batch_size)
    assert contents(tmp_path / "out") == uninterrupted


def test_another_chunk_makes_the_same_cases(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """How the work is cut is no part of what seeds derive from."""
    for chunk in (1, 12):
        begun(tmp_path / str(chunk), spec_of(chunk=chunk))
        run(tmp_path / str(chunk), spec_of(chunk=chunk), 30)
        found = contents(tmp_path / str(chunk))
        same = {name for name in uninterrupted if name.startswith("files/") or name == store.JOURNAL}
        assert {name: found[name] for name in same} == {name: uninterrupted[name] for name in same}


# -- several processes ------------------------------------------------------------------------------------------------


class Together:
    def __init__(self, rank: int, size: int, barrier: Any) -> None:
        self.rank, self.count, self.barrier = rank, size, barrier

    def meet(self) -> None:
        self.barrier.wait(60)


@pytest.mark.parametrize("size", [2, 3])
def test_more_processes_make_the_same_bytes(tmp_path: Path, uninterrupted: dict[str, bytes], size: int) -> None:
    folder, barrier = tmp_path / "out", FORK.Barrier(size)
    begun(folder, spec_of())
    team = [
        FORK.Process(target=run, args=(folder, spec_of(), 30, Together(rank, size, barrier))) for rank in range(size)
    ]
    for process in team:
        process.start()
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [0] * size
    assert contents(folder) == uninterrupted


# -- killed -----------------------------------------------------------------------------------------------------------


class Ticks:
    """Counts the moments at which something reaches the disk; kills the process at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int) -> None:
        self.now, self.last = 0, last
        for owner, name in ((os, "fsync"), (pathlib.Path, "replace"), (pathlib.Path, "mkdir")):
            patch.setattr(owner, name, self.before(getattr(owner, name)))
        begin = Journal.__init__

        def traced(journal: Journal, path: Path, *, writable: bool = False) -> None:
            begin(journal, path, writable=writable)
            journal.connection.set_trace_callback(lambda _: self.tick())

        patch.setattr(Journal, "__init__", traced)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            self.tick()
            return function(*args, **options)

        return called

    def tick(self) -> None:
        self.now += 1
        if self.now == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def made_until(folder: Path, tick: int, *, resume: bool) -> int | None:
    """Runs in a process of its own, which is killed at this moment; the exit status, None where it was killed."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with pytest.MonkeyPatch.context() as patch:
                ticks = Ticks(patch, tick)
                if resume:
                    beginning.resume(spec_of(), folder, stubs.manifest(spec_of()))
                else:
                    begun(folder, spec_of())
                run(folder, spec_of(), 30)
                code = 0 if ticks.now else 4
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def ticks_of(folder: Path) -> int:
    """How many moments an uninterrupted run has."""
    with pytest.MonkeyPatch.context() as patch:
        ticks = Ticks(patch, 0)
        begun(folder, spec_of())
        run(folder, spec_of(), 30)
        return ticks.now


def killed_at(folder: Path, moments: Iterable[int], whole: dict[str, bytes]) -> int:
    """Kills a run at each of the moments and goes on with it; how many moments there were before its end."""
    for kills, tick in enumerate(moments):
        out = folder / str(tick)
        if made_until(out, tick, resume=False) is not None:
            return kills
        if out.exists():
            beginning.resume(spec_of(), out, stubs.manifest(spec_of()))
            run(out, spec_of(), 30)
            assert contents(out) == whole, f"killed at moment {tick}"
            shutil.rmtree(out)
    raise AssertionError("the run came to no end")


@NEEDS_FORK
def test_killed_and_resumed_it_ends_in_the_same_bytes(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """At every 17th moment that something reaches the disk or the journal, and at the last 12, when all is packed."""
    killed_at(tmp_path, count(1, 17), uninterrupted)
    last = ticks_of(tmp_path / "counted")
    assert killed_at(tmp_path, range(last - 11, last + 2), uninterrupted) == 12


@NEEDS_FORK
@pytest.mark.slow
@pytest.mark.timeout(3600)  # hundreds of processes, one after the other
def test_killed_at_any_moment_and_resumed_it_ends_in_the_same_bytes(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    assert killed_at(tmp_path, count(1), uninterrupted) > 200


@NEEDS_FORK
def test_killed_again_and_again(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """Each process gets twelve moments further than what it finds."""
    folder, status = tmp_path / "out", made_until(tmp_path / "out", 12, resume=False)
    for _ in range(200):
        if status is not None:
            break
        status = made_until(folder, 40, resume=True)
    assert status == 0
    assert contents(folder) == uninterrupted


def test_the_moments_do_kill(tmp_path: Path) -> None:
    """The two tests above would pass if nothing were ever killed."""
    assert made_until(tmp_path / "first", 1, resume=False) is None
    assert made_until(tmp_path / "none", 10**9, resume=False) == 0


# -- what cannot be continued, and what cannot be written -------------------------------------------------------------


def test_a_dataset_continues_with_its_own_specification_only(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    begun(folder, spec_of())
    before = contents(folder)
    with pytest.raises(RefusedError, match=r"another specification: cases was 12, and is 13"):
        beginning.resume(spec_of(cases=13), folder, stubs.manifest(spec_of(cases=13)))
    with pytest.raises(RefusedError, match=r"attempts was 20, and is 3"):
        beginning.resume(spec_of(attempts=3), folder, stubs.manifest(spec_of(attempts=3)))
    other = stubs.manifest(spec_of())
    other.models["image"]["name"] = "embedded:other"  # type: ignore[index]
    with pytest.raises(RefusedError, match=r'other models: image.name was "embedded:stub", and is "embedded:other"'):
        beginning.resume(spec_of(), folder, other)
    assert contents(folder) == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Exception, match=r"not empty: choose another --out, or continue it with --resume"):
        begun(tmp_path, spec_of())
    with pytest.raises(NotFoundError, match=r"is no dataset to continue: it has no spec.yaml"):
        beginning.resume(spec_of(), tmp_path, stubs.manifest(spec_of()))
    with pytest.raises(NotFoundError, match=r"is no dataset to continue"):
        beginning.resume(spec_of(), tmp_path / "none", stubs.manifest(spec_of()))
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_more_attempts_are_more_of_the_same(tmp_path: Path) -> None:
    """A run that could not fill its strata in two attempts goes on with more, and ends as if it had them at first."""
    few, many = spec_of(attempts=2), spec_of(attempts=20)
    begun(tmp_path / "few", few)
    with pytest.raises(RefusedError, match=r"come short.*all attempts are used up; gate .* rejected"):
        run(tmp_path / "few", few, 30)
    assert not Generated.open(tmp_path / "few").complete
    beginning.resume(many, tmp_path / "few", stubs.manifest(many))
    run(tmp_path / "few", many, 30)
    begun(tmp_path / "many", many)
    run(tmp_path / "many", many, 30)
    assert contents(tmp_path / "few") == contents(tmp_path / "many")


def test_a_complete_dataset_is_not_touched(tmp_path: Path) -> None:
    begun(tmp_path / "out", spec_of())
    run(tmp_path / "out", spec_of())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert beginning.resume(spec_of(), tmp_path / "out", stubs.manifest(spec_of()))
    run(tmp_path / "out", spec_of())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int,
                                   uninterrupted: dict[str, bytes]) -> None:  # fmt: skip
    """The third image cannot be written: one sentence, no half file, and the run goes on once there is room."""
    folder, calls, fsync = tmp_path / "out", count(), os.fsync
    begun(folder, spec_of())

    def full(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode) and next(calls) == 2:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RefusedError, match=rf"cannot write .*: {os.strerror(number).lower()}; what was written .* intact"
    ):
        run(folder, spec_of(), 30)
    monkeypatch.undo()
    assert not list(folder.rglob("*.part"))
    beginning.resume(spec_of(), folder, stubs.manifest(spec_of()))
    run(folder, spec_of(), 30)
    assert contents(folder) == uninterrupted


def test_a_full_journal_and_a_damaged_one(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    folder = tmp_path / "out"
    begun(folder, spec_of())
    journal = Journal(folder / store.JOURNAL, writable=True)
    ((pages,),) = journal.read("PRAGMA page_count")
    journal.connection.execute(f"PRAGMA max_page_count = {pages}")
    long = Attempt(0, "text", 0, 1, text="x" * 100_000)
    with pytest.raises(RefusedError, match=r"cannot write .*journal.sqlite: .*full; what was written before is intact"):
        journal.record([], [long])
    journal.close()
    run(folder, spec_of(), 30)
    assert contents(folder) == uninterrupted
    (folder / store.JOURNAL).write_bytes(b"no journal" * 1000)
    with pytest.raises(InputError, match=r"is no journal of a dataset, or it is damaged"):
        Generated.open(folder)


def test_two_runs_at_once_are_told_apart(tmp_path: Path) -> None:
    begun(tmp_path / "out", spec_of())
    with Journal(tmp_path / "out" / store.JOURNAL, writable=True).connection as _:
        journal = Journal(tmp_path / "out" / store.JOURNAL, writable=True)
        journal.record([], [Attempt(0, "image", 0, 1)])
        with pytest.raises(RefusedError, match=r"another run works on this dataset"):
            journal.record([], [Attempt(0, "image", 0, 1)])


# -- quotas -----------------------------------------------------------------------------------------------------------


def only(plane: str) -> Callable[..., list[Sample]]:
    """A model that cannot do a plane: its images of it are grey."""
    made = stubs.images()

    def sample(prompts: list[Prompt], seeds: list[int]) -> list[Sample]:
        return [
            s if p.text.startswith(plane) else Sample(p, image=s.image.point(lambda _: 128) if s.image else None)
            for p, s in zip(prompts, made(prompts, seeds), strict=True)
        ]

    return sample


def test_a_stratum_that_would_vanish_stops_the_run(tmp_path: Path) -> None:
    """Of 80 cases 40 are coronal, all blank. After one attempt at each none of 20 images of a stratum passed: by
    Wilson's interval at most 16.1 % do, so that of 20 rows 20 * 0.839**19 = 0.7 would be missing: go on. After two none
    of 40 did: at most 8.8 %, and 20 * 0.912**18 = 3.8 are missing: stop.
    """
    wanted = spec_of(cases=80, attempts=20, gates=["blank"])
    begun(tmp_path / "out", wanted)
    made = makers(at_least=0)
    made[0] = engine.Maker("image", only("axial"), 8, (), made[0].gates[:1])
    with pytest.raises(RefusedError) as caught:
        engine.Engine(wanted, tmp_path / "out", made).run()
    said = str(caught.value)
    assert "stratum coronal / " in said and "would vanish: of its 20 images none passed" in said
    assert "gate blank rejected 100% of the 40 images" in said and "the 18 attempts that are left" in said
    dataset, attempts = opened(tmp_path / "out")
    assert max(attempt.attempt for attempt in attempts) == 1
    assert {case.row["plane"] for case in dataset.cases()} == {"axial"}
    assert all(a.reason == "its contrast is 0.0000, below 0.02" for a in attempts if a.gate == "blank")
    dataset.close()


def test_an_image_that_cannot_be_made_costs_the_others_nothing(tmp_path: Path) -> None:
    """A model that fails on one row of a batch; the row is tried again with another seed."""
    made, wanted, failed = stubs.images(), spec_of(cases=5, gates=[]), list[int]()

    def sample(prompts: list[Prompt], seeds: list[int]) -> list[Sample]:
        for prompt, seed in zip(prompts, seeds, strict=True):
            if prompt.id.endswith("3") and (not failed or failed[0] == seed):
                failed.append(seed)
                raise InputError("image 0 of 1 has pixels that are NaN or infinite")
        return made(prompts, seeds)

    begun(tmp_path / "out", wanted)
    engine.Engine(wanted, tmp_path / "out", [engine.Maker("image", sample, 5), makers()[1]]).run()  # type: ignore[arg-type]
    _, attempts = opened(tmp_path / "out")
    bad = [a for a in attempts if a.part == "image" and a.gate]
    assert [(a.row, a.attempt, a.gate, a.reason) for a in bad] == [
        (3, 0, "decodable", "it could not be made: image 0 of 1 has pixels that are NaN or infinite")
    ]


def test_looks_of_many_cases() -> None:
    """More than fit at first; only hashes within the bits count, and only where the embeddings agree."""
    found = Duplicates(2, 0.9, encode=lambda images: np.ones((len(images), 2), np.float32))
    alike, other = (np.array(v, dtype="<f2").tobytes() for v in ([1, 0], [0, 1]))
    for row in range(3000):
        found.add(row, (row << 20).to_bytes(8, "big"))
    found.add(5000, (0b1011).to_bytes(8, "big") + alike)
    asked = lambda bits, look: found.reason(bits.to_bytes(8, "big") + look, lambda row: bytes(8) + alike)  # noqa: E731
    assert asked(0b1000, alike) == "like case 0: 1 of 64 bits differ, embeddings alike by 1.0000"
    assert asked((0xFFF << 40) | 0b1010, alike) == ""
    assert asked(0b1011, alike) == "like case 5000: 0 of 64 bits differ, embeddings alike by 1.0000"
    assert asked(0b1011, other) == ""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """From 1 000 to 10 000 rows, made by a stub: less than 4 KiB for each row more."""
    peaks = []
    for number in (1000, 10_000):
        command = [sys.executable, "-m", "tests.synthesis_stubs", str(number), str(tmp_path / str(number))]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        peaks.append(float(said.split(": ")[1].split()[0]))
    assert peaks[1] - peaks[0] < 9000 * 4 / 1024


def test_the_packed_journal_is_one_sound_file(tmp_path: Path) -> None:
    begun(tmp_path / "out", spec_of())
    run(tmp_path / "out", spec_of())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS", "files", "journal.sqlite", "manifest.json", "report.html", "spec.yaml"
    ]  # fmt: skip
    with sqlite3.connect(tmp_path / "out" / store.JOURNAL) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()
