"""``diffalign score`` and ``diffalign reward check``: rewards on images and texts that exist already."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign import images, parquet, preferences
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.preferences import Broken
from diffalign.preferences.reading import opened
from diffalign.prompts import of_images
from diffalign.runs import new_file
from diffalign.types import Prompt, Reward, Sample
from rewards.check import check as check_reward
from rewards.registry import load

BATCH = 64
HOW_TO_PROMPT = 'write it into a text file of the same name, or into prompts.jsonl ({"file": ..., "prompt": ...})'


def run(spec: str, folder: Path | None, dataset: Path | None, out: Path | None) -> None:
    """Scores every image or text and prints the summary; a broken one is named, counted, and left without a score."""
    if (folder is None) == (dataset is None):
        raise ConfigError("say what to score: either --images DIR or --dataset FILE.parquet")
    reward = load(spec)
    _refuse_other_modality(reward, dataset)
    if out is not None and out.suffix != ".parquet":
        raise ConfigError(f"output {out}: scores are written as Parquet, so name it {out.with_suffix('.parquet')}")
    if out is not None and out.exists():
        raise ConfigError(f"output {out} exists already: choose another --out")
    if folder is not None:
        source = from_folder(folder)
    else:
        assert dataset is not None
        source = FROM_FILE[reward.modality](dataset)
    table = Table(reward)
    broken = 0
    batch: list[tuple[str, Sample]] = []

    for name, item in source:
        if isinstance(item, str):
            broken += 1
            click.echo(f"warning: {item}", err=True)
            continue
        batch.append((name, item))
        if len(batch) == BATCH:
            table.add(batch)
            batch.clear()
    table.add(batch)
    if not table.names:
        raise InputError(f"none of the {broken} {reward.modality}s could be read")
    if all(map(math.isnan, table.columns["score"])):
        raise InputError(_nothing_scored(spec, table))
    if out is not None:
        with new_file(out) as temporary:
            pq.write_table(pa.table({reward.modality: table.names, **table.columns}), temporary)
    _summarise(spec, table, broken)


def _refuse_other_modality(reward: Reward, dataset: Path | None) -> None:
    if reward.modality == "image" and dataset is not None and _holds_texts(dataset):
        raise ConfigError(
            f"reward {reward.name} judges images, and {dataset} holds texts (a function of your own says by its"
            " attribute 'modality' which of them it judges)"
        )
    if reward.modality != "image" and dataset is None:
        raise ConfigError(f"reward {reward.name} judges {reward.modality}s, not images; give them by --dataset FILE")


class Table:
    """The scores so far, a column for the total and for each part; all columns are as long as there are names."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.names: list[str] = []
        self.prompted = 0
        """Images that came with a prompt."""
        self.columns: dict[str, list[float]] = {}

    def add(self, batch: Sequence[tuple[str, Sample]]) -> None:
        """Scores a batch; a part that the reward does not give in every batch is NaN where it does not."""
        if not batch:
            return
        scores = self.reward([sample for _, sample in batch])
        for name, values in {"score": scores.total, **scores.parts}.items():
            self.columns.setdefault(name, [math.nan] * len(self.names)).extend(values.tolist())
        self.names.extend(name for name, _ in batch)
        self.prompted += sum(bool(sample.prompt.text) for _, sample in batch)
        for column in self.columns.values():
            column.extend([math.nan] * (len(self.names) - len(column)))


def _holds_texts(dataset: Path) -> bool:
    """Whether a file has a column of texts and none of images."""
    try:
        _, columns = opened(dataset)
    except InputError:
        return False  # what reads it says what is wrong with it
    return "image" not in columns and "prompt" in columns and bool(columns & {"completion", "text"})


def _why(reward: Reward) -> str:
    """What a reward itself says of scores that it did not give; empty where it says nothing."""
    return str(getattr(reward, "why_nothing", ""))


def _nothing_scored(spec: str, table: Table) -> str:
    count, prompted, modality = len(table.names), table.prompted, table.reward.modality
    text = f"{spec} gave none of the {count} {modality}s a score"
    if why := _why(table.reward):
        return f"{text}: {why}"
    if prompted < count and modality == "image":
        return f"{text}, and {count - prompted} of them have no prompt: {HOW_TO_PROMPT}"
    return text + ": it may not know prompts like these"


def _summarise(spec: str, table: Table, broken: int) -> None:
    reward, columns = table.reward, table.columns
    for name, values in columns.items():
        known = [value for value in values if not math.isnan(value)]
        if not known:
            click.echo(f"{name:<24} no value")
            continue
        mean = sum(known) / len(known)
        spread = math.sqrt(sum((value - mean) ** 2 for value in known) / len(known))
        click.echo(
            f"{name:<24} mean {mean:.4g}"
            + (f"  sd {spread:.3g}" if len(known) > 1 else "")
            + f"  min {min(known):.4g}  max {max(known):.4g}  n {len(known)}"
            + (f"  {reward.unit}" if name == "score" else "")
        )
    failed = sum(math.isnan(value) for value in columns["score"])
    if failed or broken:
        click.echo(f"{failed} {reward.modality}s got no score from {spec}, {broken} could not be read")
        if failed and (why := _why(reward)):
            click.echo(f"{reward.name}: {why}")
    missing = len(table.names) - table.prompted
    if failed and missing and reward.modality == "image":
        click.echo(f"{missing} images have no prompt, and {spec} may need one: {HOW_TO_PROMPT}")


def from_folder(folder: Path) -> Iterator[tuple[str, Sample | str]]:
    """Every image of a folder by name, with its prompt; a reason in place of a sample that cannot be read."""
    if not folder.is_dir():
        raise NotFoundError(f"no image folder {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in images.SUFFIXES)
    if not paths:
        raise InputError(f"{folder} has no image in it ({', '.join(sorted(images.SUFFIXES))})")
    prompts = of_images(folder)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        beside = path.with_suffix(".txt")
        try:
            yield name, Sample(prompts.get(name) or _caption(beside), image=images.load(path))
        except InputError as error:
            yield name, str(error)


def _caption(path: Path) -> Prompt:
    try:
        return Prompt(path.read_text(encoding="utf-8").strip() if path.is_file() else "")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def from_parquet(path: Path) -> Iterator[tuple[str, Sample | str]]:
    """Every row of a Parquet file with an ``image`` (bytes, or a struct with bytes) and a ``prompt`` column."""
    if missing := {"image", "prompt"} - set(parquet.open_file(path).schema_arrow.names):
        raise InputError(f"{path} has no column {', '.join(sorted(missing))}")
    for number, row in parquet.rows(path, ("image", "prompt")):
        name = f"row {number}"
        if isinstance(row, str):
            yield name, f"{name} of {path}: {row}"
            continue
        data = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
        try:
            if not isinstance(data, bytes):
                raise InputError(f"{name} of {path} holds no image")
            yield name, Sample(Prompt(row["prompt"] or ""), image=images.decode(data, f"{name} of {path}"))
        except InputError as error:
            yield name, str(error)


def from_texts(path: Path) -> Iterator[tuple[str, Sample | str]]:
    """Every row of a file with the columns ``prompt``, and ``completion`` or ``text``."""
    for place, item in preferences.read_texts(path):
        yield place, f"{path}: {item}" if isinstance(item, Broken) else item


FROM_FILE = {"image": from_parquet, "text": from_texts}


def check(spec: str, folder: Path | None) -> int:
    """Prints what ``reward check`` finds; 0 if the reward is fit to train on, else 1."""
    reward = load(spec)
    samples = None if folder is None else [item for _, item in from_folder(folder) if isinstance(item, Sample)]
    report = check_reward(reward, samples)
    click.echo(str(report))
    return 0 if report.fit else 1
