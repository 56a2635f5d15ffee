"""The loop that makes a dataset: rounds of attempts, cut into chunks by the specification, and written down by chunk.

A round takes the rows that still lack an image or a text, in order, and cuts them into chunks. An attempt makes what
the row lacks, and only that: an image that was accepted stays while the text is tried again, and the other way round.
The seed of each follows from the specification, the row and the attempt. Who makes a chunk does not matter: process
``p`` of ``n`` takes the chunks p, p + n, p + 2n, …, and all of them meet at the end of the round. Then the gate that
compares cases with each other speaks, in the order of the rows, and the round is closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from diffalign.errors import InputError, RefusedError
from diffalign.seeds import derive
from diffalign.synthesis import quotas, rows, store, sums
from diffalign.synthesis.gates import Candidate, Decodable, Duplicates, Gate
from diffalign.synthesis.journal import PARTS, Attempt, Journal, Part, Row
from diffalign.synthesis.prompting import Prompting
from diffalign.synthesis.spec import Spec
from diffalign.types import Prompt, Reward, Sample

PAGE = 4096
"""Rows that are asked of the journal at a time."""
Progress = Callable[[str, int, int | None], None]


Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of ``size``; the last one may be shorter."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


class Workers(Protocol):
    """The processes that make a dataset together."""

    rank: int
    count: int

    def meet(self) -> None:
        """Waits until all processes are here."""
        ...


class Alone:
    """One process."""

    rank, count = 0, 1

    def meet(self) -> None:
        """Nobody to wait for."""


@dataclass(frozen=True)
class Maker:
    """What makes the images, or the texts, and judges each by itself."""

    part: Part
    sample: Callable[[Sequence[Prompt], Sequence[int]], Sequence[Sample]]
    """One sample for each prompt and seed; it depends on these two alone, but for the rounding of floats."""
    batch_size: int
    rewards: Sequence[Reward] = ()
    gates: Sequence[Gate] = ()

    def make(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Candidate]:
        """What came of each prompt, with its scores."""
        batches = batched(zip(prompts, seeds, strict=True), self.batch_size)
        found = [candidate for batch in batches for candidate in self._batch(batch)]
        whole = [i for i, candidate in enumerate(found) if not candidate.fault]
        scores: list[dict[str, float]] = [{} for _ in whole]
        for reward in self.rewards if whole else ():
            given = reward([sample for i in whole if (sample := found[i].sample) is not None])
            columns = {reward.name: given.total} | {f"{reward.name}/{name}": p for name, p in given.parts.items()}
            for name, column in columns.items():
                for own, value in zip(scores, column.tolist(), strict=True):
                    if math.isfinite(value):
                        own[name] = value
        for i, own in zip(whole, scores, strict=True):
            found[i] = Candidate(found[i].sample, found[i].png, own)
        return found

    def _batch(self, asked: Sequence[tuple[Prompt, int]]) -> list[Candidate]:
        """A batch; where one of it cannot be made, each by itself, so that the others do not suffer."""
        try:
            made = self.sample([prompt for prompt, _ in asked], [seed for _, seed in asked])
            return [_candidate(sample) for sample in made]
        except InputError as error:
            if len(asked) == 1:
                return [Candidate(None, fault=f"it could not be made: {error}")]
            return [candidate for one in asked for candidate in self._batch([one])]

    def judge(self, candidates: Sequence[Candidate]) -> list[tuple[str | None, str]]:
        """For each the first gate that rejects it, and why; ``(None, "")`` where all let it pass."""
        verdicts: list[tuple[str | None, str]] = [(None, "")] * len(candidates)
        for gate in (Decodable(), *self.gates):
            left = [i for i, (rejected, _) in enumerate(verdicts) if rejected is None]
            for i, reason in zip(left, gate([candidates[i] for i in left]), strict=True):
                if reason:
                    verdicts[i] = (gate.name, reason)
        return verdicts


def _candidate(sample: Sample) -> Candidate:
    """What is whole in a sample: the PNG of an image has its pixels, a text came to its end."""
    if sample.image is not None:
        if not all(sample.image.size):
            return Candidate(sample, fault="the image has no pixels")
        png = store.png(sample.image)
        return Candidate(sample, png, fault=store.fault_of(png, sample.image))
    text = sample.text or ""
    if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text):
        return Candidate(sample, fault="the text has characters that no file can hold")
    if not sample.evidence.get("finished", True):
        return Candidate(sample, fault=f"the text was cut after {sample.evidence.get('tokens')} tokens")
    return Candidate(sample)


class Engine:
    """Makes the cases of a specification in a folder that was begun (``beginning.begin``)."""

    def __init__(
        self,
        spec: Spec,
        folder: Path,
        makers: Sequence[Maker],
        *,
        duplicates: Duplicates | None = None,
        workers: Workers | None = None,
        on_progress: Progress = lambda stage, done, total: None,
        say: Callable[[str], None] = lambda line: None,
        at_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.spec, self.folder, self.makers = spec, folder, makers
        self.duplicates, self.workers = duplicates, workers or Alone()
        self.on_progress, self.say, self.at_end = on_progress, say, at_end
        self.files = store.Files(folder / store.FILES)
        self.prompting = Prompting(spec)
        self.parts: tuple[Part, ...] = tuple(part for part in PARTS if any(part == maker.part for maker in makers))

    def run(self) -> None:
        """Makes what is missing. Raises RefusedError where a stratum cannot be filled; what is there stays."""
        manifest, complete = store.read_manifest(self.folder)
        if complete:
            self._sum_up()
            return
        journal = Journal(self.folder / store.JOURNAL, writable=True)
        try:
            self._rounds(journal, manifest.strata)
            if self.workers.rank:
                journal.close()  # it can be packed only when nobody else holds it
            self.workers.meet()
            if self.workers.rank == 0:
                journal.finish()
                store.write_manifest(self.folder, manifest, complete=True)
            self._sum_up()
            self.workers.meet()
        finally:
            journal.close()

    def _sum_up(self) -> None:
        """Adds what is made of the finished dataset (``at_end``), and hashes every file, unless that was done."""
        if self.workers.rank == 0 and not (self.folder / sums.NAME).is_file():
            # A half list, which a killed process left, would be listed too.
            (self.folder / f".{sums.NAME}.tmp").unlink(missing_ok=True)
            self.at_end()
            sums.write(self.folder)

    def _rounds(self, journal: Journal, wanted: Mapping[str, int]) -> None:
        if self.duplicates is not None and self.workers.rank == 0:
            for row, look in self._looks(journal, 0, journal.rounds()):
                self.duplicates.add(row, look)
        total = sum(wanted.values())
        while True:
            number = journal.rounds()
            missing = total - self._whole(journal, number)
            if not missing:
                break
            if number and (fault := quotas.shortfall(journal, wanted, self.parts, self.spec.attempts)):
                raise RefusedError(f"{fault}; what was made is kept in {self.folder}")
            self._round(journal, number, missing)
            self.workers.meet()
            if self.workers.rank == 0:
                journal.close_round(number, self._alike(journal, number))
                self.say(f"round {number + 1}: {self._whole(journal, number + 1)} of {total} cases are whole")
            self.workers.meet()

    def _round(self, journal: Journal, number: int, missing: int) -> None:
        """This process's chunks of a round, but for those that are written down already."""
        done = 0
        for i, chunk in enumerate(batched(self._lacking(journal, number), self.spec.chunk)):
            if i % self.workers.count == self.workers.rank and not journal.has(chunk[0][0].index, number):
                self._chunk(journal, number, chunk)
            done += len(chunk)
            self.on_progress(f"round {number + 1}", done, missing)

    def _lacking(self, journal: Journal, number: int) -> Iterator[tuple[Row, frozenset[Part]]]:
        """The rows that lack something at the start of a round, in order, and what they lack."""
        having = {part: _Pages(journal, part, number) for part in self.parts}
        for row in rows.rows(self.spec):
            lacks = frozenset(part for part in self.parts if not having[part].has(row.index))
            if lacks:
                yield row, lacks

    def _chunk(self, journal: Journal, number: int, chunk: Sequence[tuple[Row, frozenset[Part]]]) -> None:
        """Makes what the rows of a chunk lack: first the files are on the disk, then the journal tells of them."""
        attempts = []
        for maker in self.makers:
            asked = [row for row, lacks in chunk if maker.part in lacks]
            seeds = [self.seed(row.index, number, maker.part) for row in asked]
            candidates = maker.make([self.prompting.prompt(maker.part, row) for row in asked], seeds)
            verdicts = maker.judge(candidates)
            looks = self._seen(maker.part, candidates, [gate is None for gate, _ in verdicts])
            for row, seed, candidate, (gate, reason), look in zip(
                asked, seeds, candidates, verdicts, looks, strict=True
            ):
                image = None
                if candidate.png:
                    image = store.sha256_of(candidate.png)
                    if gate is None:
                        self.files.put(candidate.png, f"-{row.index}")
                text = candidate.sample.text if candidate.sample is not None else None
                attempts.append(
                    Attempt(row.index, maker.part, number, seed, image, text, candidate.scores, gate, reason, look)
                )
        journal.record([self._described(row) for row, _ in chunk] if number == 0 else [], attempts)

    def seed(self, row: int, attempt: int, part: Part) -> int:
        """The seed of an attempt: it follows from the specification, the row, the attempt, and what is made."""
        return derive(int(self.spec.identity[:15], 16), part, row, attempt)

    def _described(self, row: Row) -> tuple[Row, str, str]:
        image, text = (self.prompting.prompt(p, row).text if p in self.parts else "" for p in PARTS)
        return row, image, text

    def _seen(self, part: Part, candidates: Sequence[Candidate], passed: Sequence[bool]) -> list[bytes | None]:
        if self.duplicates is None or part != "image":
            return [None] * len(candidates)
        kept = [candidate.picture for candidate, good in zip(candidates, passed, strict=True) if good]
        found = iter(self.duplicates.looks(kept))
        return [next(found) if good else None for good in passed]

    # -- the end of a round -------------------------------------------------------------------------------------------

    def _alike(self, journal: Journal, number: int) -> Iterator[tuple[int, str, str]]:
        """The rows of a round whose images are those of other cases."""
        if self.duplicates is None:
            return
        for row, look in self._looks(journal, number, number + 1):
            if reason := self.duplicates.reason(look, lambda other: _look(journal, other)):
                yield row, self.duplicates.name, reason
            else:
                self.duplicates.add(row, look)

    def _looks(self, journal: Journal, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Rows whose image passed in one of these rounds, in order, and what the image is known by."""
        query = (
            "SELECT row, looks FROM attempt WHERE part = 'image' AND gate IS NULL AND looks IS NOT NULL"
            f" AND attempt >= ? AND attempt < ? AND row > ? ORDER BY row LIMIT {PAGE}"
        )
        after = -1
        while page := list(journal.read(query, (first, last, after))):
            yield from page
            after = page[-1][0]

    def _whole(self, journal: Journal, number: int) -> int:
        """Cases that lack nothing at the start of a round."""
        having = " INTERSECT ".join(
            f"SELECT row FROM attempt WHERE part = '{part}' AND gate IS NULL AND attempt < {number}"
            for part in self.parts
        )
        return int(next(journal.read(f"SELECT count(*) FROM ({having})"))[0])


def _look(journal: Journal, row: int) -> bytes:
    query = "SELECT looks FROM attempt WHERE row = ? AND part = 'image' AND gate IS NULL AND looks IS NOT NULL"
    ((look,),) = list(journal.read(query, (row,)))
    return bytes(look)


class _Pages:
    """Which rows have a part, asked in their order: a page of them is in memory."""

    def __init__(self, journal: Journal, part: Part, before: int) -> None:
        self.journal, self.part, self.before = journal, part, before
        self.page: set[int] = set()
        self.last = -1

    def has(self, row: int) -> bool:
        """Whether this row has it; rows are asked in order."""
        while row > self.last:
            first, self.last = self.last + 1, self.last + PAGE
            self.page = set(self.journal.accepted(self.part, self.before, first, self.last))
        return row in self.page
