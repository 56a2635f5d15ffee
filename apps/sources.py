"""Where a run's experience comes from: what its configuration names, made ready for the training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign import images, preferences
from diffalign.config import RunConfig
from diffalign.errors import InputError, NotFoundError, UserError
from diffalign.experience import BestOfN, JudgedPairs, OnlinePairs, Recorded, RecordedPairs, Rollouts, Source
from diffalign.held_out_pairs import ASKED_OF, MOST, HeldOutPairs
from diffalign.methods import RECORDED
from diffalign.preferences import Broken
from diffalign.prompts import of_images, plain
from diffalign.runs import Run, new_file
from diffalign.seeds import derive, permutation
from diffalign.types import Modality, Policy, Preference, Prompt, Reward, Sample
from diffalign.worlds.shown import DEMONSTRATIONS
from rewards.rater import SimulatedRaters
from rewards.rater_file import OVERALL

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]


def source(
    config: RunConfig,
    policy: Policy,
    reward: Reward,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    directory: Run,
    *,
    progress: Progress,
    say: Say,
) -> Source:
    """The source that a configuration names. Recorded samples of a held-out prompt are left out.

    Where simulated raters stand in for people, they judge samples of the base model now, and what they say is kept in
    the run's directory.
    """
    wanted = config.experience
    own = wanted.path is not None and wanted.path not in DEMONSTRATIONS
    if own and "train" in config.prompts.model_fields_set:
        say(f"{wanted.path} brings its own prompts, so prompts.train ({config.prompts.train}) limits nothing here")
    match wanted.source:
        case "rollouts":
            return Rollouts(reward, prompts)
        case "best-of-n":
            return BestOfN(reward, prompts, wanted.keep)
        case "online-pairs" if wanted.rater is not None:
            raters = SimulatedRaters.load(wanted.rater)
            return JudgedPairs(partial(raters.judge, criteria=[OVERALL]), prompts, raters.modality)
        case "online-pairs":
            return OnlinePairs(reward, prompts)
        case "pairs":
            if (given := _file(config)) is not None:
                return own_pairs(given, wanted.criterion, held_out, directory, say)
            collected = collected_pairs(config, policy, prompts, directory, progress)
            return recorded_pairs(collected, wanted.criterion, held_out, say)
        case "labels":
            path = _file(config) or collected_labels(config, policy, prompts, directory, progress)
            return recorded_labels(path, held_out, say)
        case _:
            return demonstrations(wanted.path or "", prompts, held_out, config.seed, say)


def asks_prompts(config: RunConfig) -> bool:
    """Whether a run asks for anything of its training prompts: not where all that it learns from is in a file."""
    if config.fit is not None and config.fit.rater is not None:
        return True
    wanted, shown = config.experience, {config.experience.path, config.experience.demonstrations}
    if config.warm_up is not None:
        shown.add(config.warm_up.demonstrations)
    return wanted.source not in RECORDED or wanted.path is None or not shown.isdisjoint(DEMONSTRATIONS)


def _file(config: RunConfig) -> Path | None:
    if config.experience.path is None:
        return None
    path = Path(config.experience.path).expanduser()
    if not path.exists():
        raise NotFoundError(f"experience.path: there is no file {path}")
    return path


# -- recorded ---------------------------------------------------------------------------------------------------------


def modality(config: RunConfig) -> Modality | None:
    """What the recorded file of a configuration holds, by its first good row; None where it names none.

    Raises InputError where the file is in no form that can be read.
    """
    wanted = config.experience
    if wanted.path is None or wanted.path in DEMONSTRATIONS:
        return None
    path = Path(wanted.path).expanduser()
    if wanted.source == "pairs":
        return modality_of_pairs(path)
    if wanted.source != "labels":
        return "image" if path.is_dir() else "text"
    first = next((row[0] for row in preferences.read_unpaired(path) if not isinstance(row, Broken)), None)
    return None if first is None else _modality_of(first)


def modality_of_pairs(path: Path) -> Modality | None:
    """What the pairs of a file are, by the first good one; None where none is good. Raises InputError as ``read``."""
    found = preferences.read(path)
    if found.native:
        return preferences.Table(path).modality
    first = next((row for row in found if isinstance(row, Preference)), None)
    return None if first is None else _modality_of(first.first)


def criteria_of_pairs(path: Path) -> set[str]:
    """What the good pairs of a file judge."""
    found = preferences.read(path)
    if found.native:
        return set(preferences.Table(path).criteria())
    return {row.criterion for row in found if isinstance(row, Preference)}


def _modality_of(sample: Sample) -> Modality:
    return "image" if sample.text is None else "text"


def own_pairs(path: Path, criterion: str | None, held_out: Sequence[Prompt], directory: Run, say: Say) -> RecordedPairs:
    """The pairs of a file of any known form. Training draws pairs by number, so what is not in the native form is
    copied into it: ``preferences.parquet`` of the run. Raises InputError for a broken row.
    """
    found = preferences.read(path)
    if found.native:
        return recorded_pairs(path, criterion, held_out, say)
    copy = directory.path / "preferences.parquet"
    made = not copy.exists()
    if made:
        preferences.write(copy, _whole(found))
    try:
        return recorded_pairs(copy, criterion, held_out, say, path)
    except UserError:
        if made:
            copy.unlink()
        raise


def require_whole(config: RunConfig, progress: Progress) -> None:
    """Refuses a native file of pairs with a row that cannot be used, before any work: the loop would come upon it hours
    later, or never. A file of another form is copied, and refused then.
    """
    path = _file(config)
    if config.experience.source != "pairs" or path is None or not preferences.read(path).native:
        return
    table, broken = preferences.Table(path), preferences.Defects()
    for number, defect in enumerate(table.broken(), 1):
        if defect is not None:
            broken.add(defect)
        if number % 1000 == 0:
            progress("checking pairs", number, len(table))
    if broken:
        raise InputError(
            f"{path}: {len(broken)} of {len(table)} rows cannot be used, {broken.first[0]}; `diffalign preferences"
            f" convert {path.name} clean.parquet` lists them and leaves them out"
        )


def _whole(found: preferences.Pairs) -> Iterator[Preference]:
    for row in found:
        if isinstance(row, Broken):
            raise InputError(f"{found.path}: {row}; `diffalign preferences convert` leaves such rows out")
        yield row


def recorded_pairs(
    native: Path, criterion: str | None, held_out: Sequence[Prompt], say: Say, path: Path | None = None
) -> RecordedPairs:
    """The pairs of a native file that were judged by a criterion, and whose prompts are not held out.

    ``path`` is what the file is called in messages, where it is a copy.
    """
    table, path = preferences.Table(native), path or native
    kept = apart(table.prompts(), held_out)
    _say_left_out(say, path, "pairs", len(table), len(kept))
    criteria = table.criteria()
    there = sorted({criteria[i] for i in kept})
    if criterion is None and len(there) > 1:
        raise InputError(
            f"{path} has judgements by several criteria, {', '.join(there)}: say which to learn from"
            " (experience.criterion)"
        )
    if criterion is not None:
        kept = [i for i in kept if criteria[i] == criterion]
        if not kept:
            raise InputError(f"{path} has no judgement by {criterion!r}; it has {', '.join(there)}")
    labels = table.labels()
    if broken := [i for i in kept if not _probability(labels[i])]:
        raise InputError(f"{path}: the labels of {len(broken)} rows are no probabilities, of row {broken[0]} first")
    if all(labels[i] == 0.5 for i in kept):
        raise InputError(f"{path}: all {len(kept)} pairs are ties, so none says what is better")
    return RecordedPairs(table, kept, table.modality)


def held_out_pairs(config: RunConfig, source: Source, held_out: Sequence[Prompt]) -> HeldOutPairs | None:
    """The pairs of held-out prompts in what a run learns from; None where it has none, or compares no pairs."""
    if not isinstance(source, RecordedPairs) or config.objective.name not in ASKED_OF:
        return None
    table = source.table
    assert isinstance(table, preferences.Table)
    trained, labels, criteria = set(apart(table.prompts(), held_out)), table.labels(), table.criteria()
    judged = criteria[source.train[0]]
    kept = [
        i for i, label in enumerate(labels)
        if i not in trained and criteria[i] == judged and _probability(label) and label != 0.5
    ]  # fmt: skip
    picked = permutation(len(kept), derive(config.seed, "held-out pairs"))[:MOST]
    return HeldOutPairs(table, sorted(kept[i] for i in picked)) if kept else None


def _probability(label: float | None) -> bool:
    return label is not None and 0 <= label <= 1


def recorded_labels(path: Path, held_out: Sequence[Prompt], say: Say) -> Recorded:
    """The labelled samples of a file whose prompts are not held out. Raises InputError for a broken row."""
    found: list[tuple[Sample, bool]] = []
    for row in preferences.read_unpaired(path):
        if isinstance(row, Broken):
            raise InputError(f"{path}: {row}")
        found.append(row)
    kept = apart([sample.prompt for sample, _ in found], held_out)
    _say_left_out(say, path, "labels", len(found), len(kept))
    modality: Modality = "text" if any(sample.text is not None for sample, _ in found) else "image"
    return Recorded([found[i][0] for i in kept], [found[i][1] for i in kept], modality)


def beside(config: RunConfig, prompts: Sequence[Prompt], held_out: Sequence[Prompt], say: Say) -> Source | None:
    """The demonstrations of a supervised term beside the objective, where it has one."""
    if config.experience.demonstrations is None:
        return None
    return demonstrations(config.experience.demonstrations, prompts, held_out, config.seed, say)


def demonstrations(named: str, prompts: Sequence[Prompt], held_out: Sequence[Prompt], seed: int, say: Say) -> Recorded:
    """The images of a folder, with the prompts of its ``prompts.jsonl`` or ``prompts.csv``, or the texts of a file with
    the columns ``prompt`` and ``completion``; those of held-out prompts are left out. Or what a world shows of the
    training prompts, one of each. Raises NotFoundError where there is no such file.
    """
    if named in DEMONSTRATIONS:
        show = DEMONSTRATIONS[named]
        shown = [show(prompt, derive(seed, "demonstration", prompt.key)) for prompt in prompts]
        return Recorded(shown, modality="text" if shown and shown[0].text is not None else "image")
    path = Path(named).expanduser()
    if not path.exists():
        raise NotFoundError(f"demonstrations: there is no file {path}")
    return _demonstrated_images(path, held_out, say) if path.is_dir() else _demonstrated_texts(path, held_out, say)


def _demonstrated_texts(path: Path, held_out: Sequence[Prompt], say: Say) -> Recorded:
    found: list[Sample] = []
    for place, sample in preferences.read_texts(path):
        if isinstance(sample, Broken):
            raise InputError(f"{path}: {sample}")
        if not sample.text:
            raise InputError(f"{path}: {place}: the completion is empty")
        found.append(sample)
    kept = apart([sample.prompt for sample in found], held_out)
    _say_left_out(say, path, "texts", len(found), len(kept))
    return Recorded([found[i] for i in kept], modality="text")


def _demonstrated_images(folder: Path, held_out: Sequence[Prompt], say: Say) -> Recorded:
    asked = of_images(folder)
    if not asked:
        raise InputError(f"{folder} has no prompts.jsonl or prompts.csv that says what its images show")
    names = sorted(asked)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{folder} lacks {len(missing)} of {len(names)} images that it lists, {missing[0]} first")
    kept = [names[i] for i in apart([asked[name] for name in names], held_out)]
    _say_left_out(say, folder, "images", len(names), len(kept))
    return Recorded(Pictures(folder, [(name, asked[name]) for name in kept]))


class Pictures(Sequence[Sample]):
    """The images of a folder as samples; each is read when it is asked for."""

    def __init__(self, folder: Path, listed: Sequence[tuple[str, Prompt]]) -> None:
        self.folder, self.listed = folder, listed

    def __len__(self) -> int:
        return len(self.listed)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return Pictures(self.folder, self.listed[index])
        name, prompt = self.listed[index]
        return Sample(prompt, image=images.load(self.folder / name))


def apart(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[int]:
    """Numbers of the prompts that are not held out: neither by case, nor by text, nor by the id of one without text."""
    groups = {preferences.group(prompt) for prompt in held_out}
    texts = {plain(prompt.text) for prompt in held_out} - {""}
    return [i for i, p in enumerate(prompts) if preferences.group(p) not in groups and plain(p.text) not in texts]


def _say_left_out(say: Say, path: Path, what: str, there: int, kept: int) -> None:
    if not kept:
        raise InputError(f"{path}: all {there} {what} belong to held-out prompts, so none is left to train on")
    if kept < there:
        say(f"{there - kept} of {there} {what} are of held-out prompts, and left out of training")


# -- judged by simulated raters ---------------------------------------------------------------------------------------


def collected_pairs(
    config: RunConfig, policy: Policy, prompts: Sequence[Prompt], directory: Run, progress: Progress
) -> Path:
    """``preferences.parquet`` of the run: pairs of the base model's samples, judged overall by the simulated raters."""
    wanted = config.experience
    path = directory.path / "preferences.parquet"
    judge_pairs(path, wanted.rater or "", wanted.collect, [OVERALL], config.seed, policy, prompts, progress)
    return path


def judge_pairs(
    path: Path,
    rater: str,
    count: int,
    criteria: Sequence[str] | None,
    seed: int,
    policy: Policy,
    prompts: Sequence[Prompt],
    progress: Progress,
) -> None:
    """Writes what simulated raters say of pairs of the base model's samples, unless the file is there already."""
    if path.exists():
        return
    raters = SimulatedRaters.load(rater)

    def judged() -> Iterator[Preference]:
        for samples in _sampled(policy, prompts, 2, count, seed, progress):
            pairs = list(zip(samples[::2], samples[1::2], strict=True))
            yield from raters.judge(pairs, derive(seed, "judge"), criteria)

    preferences.write(path, judged())


def collected_labels(
    config: RunConfig, policy: Policy, prompts: Sequence[Prompt], directory: Run, progress: Progress
) -> Path:
    """``labels.parquet`` of the run: the base model's samples, and whether the simulated raters like each."""
    path = directory.path / "labels.parquet"
    if path.exists():
        return path
    raters = SimulatedRaters.load(config.experience.rater or "")
    rows = []
    for samples in _sampled(policy, prompts, 1, config.experience.collect, config.seed, progress):
        good = raters.good(samples, derive(config.seed, "judge"))
        for sample, label in zip(samples, good, strict=True):
            shown: dict[str, object] = {"text": sample.text}
            if sample.image is not None:
                shown = {"image": {"bytes": images.png_bytes(sample.image), "path": None}}
            rows.append(
                {
                    "prompt": sample.prompt.text, "prompt_id": sample.prompt.id,
                    "attributes": json.dumps(dict(sample.prompt.attributes)),
                    **shown, "label": label,
                }
            )  # fmt: skip
    with new_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
    return path


def _sampled(
    policy: Policy, prompts: Sequence[Prompt], each: int, count: int, seed: int, progress: Progress
) -> Iterator[Sequence[Sample]]:
    """Samples of the base model, ``each`` of a prompt at a time and ``count`` times, prompts in turn."""
    size = max(1, policy.batch_size // each)
    for i in range(0, count, size):
        numbers = range(i, min(i + size, count))
        asked = [prompts[number % len(prompts)] for number in numbers for _ in range(each)]
        seeds = [derive(seed, "collect", number, k) for number in numbers for k in range(each)]
        with policy.reference():
            samples = policy.rollout(asked, seeds).samples
        yield samples
        progress("collecting judgements", numbers.stop, count)
