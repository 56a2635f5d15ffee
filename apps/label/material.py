"""``diffalign label init``: what a study is made of. It appears whole, or not at all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import click

from apps.label import dataset_cases, image_folders, pair_files, pictures
from apps.progress import Status
from apps.reported import printable
from diffalign.errors import ConfigError, InputError, NotFoundError, RefusedError
from diffalign.runs import recover
from diffalign.seeds import derive
from diffalign.study import Protocol, Study, StudyPair
from diffalign.types import Sample

Kind = Literal["model", "dataset", "arms", "pairs"]
EMBEDDED = "embedded:"
OF_MODELS = ("config.yaml", "model_index.json", "config.json")
"""What a run, an image model and a language model have in their folders."""
OTHER: Mapping[str | None, Literal["first", "second"]] = {"first": "second", "second": "first"}


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    sources: Sequence[str]
    against: str | None = None
    gold: Path | None = None
    prompts: str | None = None
    """A number of prompts, or a file of them; for models."""
    split: Literal["train", "held-out"] | None = None
    count: int | None = None
    """Pairs wanted, gold aside."""
    overrides: Sequence[str] = ()
    seed: int = 0


@dataclass
class Counts:
    """What went in."""

    ordinary: int = 0
    gold: int = 0
    equal: int = 0
    """Pairs of two equal samples, which nobody can tell apart: left out."""
    arms: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def counted(self, pairs: Iterator[StudyPair]) -> Iterator[StudyPair]:
        """The same pairs, counted on their way, without those of two equal samples."""
        for pair in pairs:
            if pair.expected != "tie" and _same(pair.first, pair.second):
                self.equal += 1
                continue
            if pair.expected is None:
                self.ordinary += 1
                # Once where a model is compared with itself.
                self.arms.update({pair.first_arm, pair.second_arm})
            else:
                self.gold += 1
            self.kinds["text" if pair.first.image is None else "image"] += 1
            yield pair


def run(folder: Path, protocol: str, title: str, database: str | None, request: Request) -> None:
    """Makes the study and says what is in it."""
    recover(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RefusedError(f"{folder} is there already, and not empty; a study starts in a folder of its own")
    rules = Protocol.load(protocol)
    counts = Counts()
    with Status() as status:
        pairs = in_random_order(gather(request, counts, status), request.seed)
        made = Study.create(folder, rules, pairs, title, request.seed, database)
        made.close()
    _tell(folder, rules, counts, database)


def in_random_order(pairs: Iterator[StudyPair], seed: int) -> Iterator[StudyPair]:
    """The same pairs, half of them turned round: who learns from the votes finds nothing in which one is the first."""
    chance = random.Random(derive(seed, "label-order"))
    for pair in pairs:
        yield turned(pair) if chance.random() < 0.5 else pair


def turned(pair: StudyPair) -> StudyPair:
    """The pair with its samples exchanged."""
    names = {"first": "second", "second": "first"}
    return StudyPair(
        pair.prompt, pair.second, pair.first, pair.second_arm, pair.first_arm, OTHER.get(pair.expected, pair.expected),
        {names.get(name, name): value for name, value in pair.provenance.items()},
    )  # fmt: skip


def gather(request: Request, counts: Counts, status: Status) -> Iterator[StudyPair]:
    """All pairs of all sources, images and texts mixed. Whatever can be known to be wrong is told at once."""
    kinds = {source: kind_of(source) for source in request.sources}
    if len(kinds) < len(request.sources):
        raise ConfigError("a source is given twice; more pairs of a model are had by --pairs")
    models = [source for source, kind in kinds.items() if kind == "model"]
    for name in (*models, *([request.against] if request.against else [])):
        _check_embedded(name)
    if not models and (request.against or request.prompts or request.overrides or request.split):
        raise ConfigError("--against, --prompts, --split and --set are about models and runs, and none was given")
    ready = [_ready(Path(source).expanduser(), kind, counts) for source, kind in kinds.items() if kind != "model"]
    # Where models make pairs, --pairs says how many they make.
    chosen = _chosen(ready, None if models else request.count, request.seed)
    sampled = _sampled(request, models, counts, status) if models else iter(())
    # First what is quickly seen to be wrong; models take their time.
    if request.gold is not None:
        yield from counts.counted(map(_seedless, pair_files.pairs(request.gold, gold=True)))
    for source, numbers in zip(ready, chosen, strict=True):
        yield from counts.counted(_shown(source.some(numbers), status, counts))
    yield from counts.counted(sampled)
    if not counts.ordinary:
        reason = f": both samples of all {counts.equal} are equal" if counts.equal else ""
        raise InputError(f"there are no pairs to judge{reason}")


def kind_of(source: str) -> Kind:
    """What a source is: a model or run, a dataset, a folder of arms, or pairs in a file or folder."""
    path = Path(source).expanduser()
    if source.startswith(EMBEDDED) or any((path / name).is_file() for name in OF_MODELS):
        return "model"
    if path.is_file():
        return "pairs"
    if dataset_cases.is_dataset(path):
        return "dataset"
    if path.is_dir():
        return _kind_of_folder(path)
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise NotFoundError(
            f"there is no {source}; pairs come from a run, a model (embedded:NAME, a folder, a hub id), a folder with"
            " a subfolder of images per arm, or a file of pairs"
        )
    return "model"


def _check_embedded(name: str) -> None:
    """Raises NotFoundError for an embedded model that there is none of."""
    if not name.startswith(EMBEDDED):
        return
    from pipelines.loading import embedded_models

    known = embedded_models()
    if name.removeprefix(EMBEDDED) not in known:
        raise NotFoundError(f"there is no {name}; there are {', '.join(f'{EMBEDDED}{one}' for one in known)}")


def _kind_of_folder(path: Path) -> Kind:
    if any(path.glob("*.parquet")):
        return "pairs"
    if any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir()):
        return "arms"
    if next(pictures.listed(path), None) is not None:
        raise InputError(
            f"the images of {path} are all in one folder, so it is not known what made which: give each arm a subfolder"
            f" of its own, such as {path.name}/base/7.png and {path.name}/tuned/7.png (one name: one prompt)"
        )
    return "pairs"


@dataclass(frozen=True)
class Ready:
    """Pairs that are there already."""

    size: Callable[[], int]
    some: Callable[[Collection[int] | None], Iterator[StudyPair]]
    """The pairs of these numbers, or all."""


def _ready(path: Path, kind: Kind, counts: Counts) -> Ready:
    if kind == "dataset":
        cases = dataset_cases.Cases(path)
        return Ready(lambda: cases.size, cases.pairs)  # their seeds are known
    if kind == "arms":
        found = image_folders.Arms(path)
        plan = found.plan()
        if found.lone:
            counts.notes.append(f"{found.lone} file names of {path.name} are in one arm only, and left out")
        return Ready(
            lambda: len(plan),
            lambda numbers: map(
                _seedless, found.pairs([row for i, row in enumerate(plan) if numbers is None or i in numbers])
            ),
        )
    return Ready(
        lambda: sum(1 for _ in pair_files.pairs(path)),
        lambda numbers: (
            _seedless(pair) for i, pair in enumerate(pair_files.pairs(path)) if numbers is None or i in numbers
        ),
    )  # fmt: skip


def _chosen(ready: Sequence[Ready], count: int | None, seed: int) -> list[Collection[int] | None]:
    """Which pairs of each source are taken, where fewer are wanted than there are: a random part of all together."""
    if count is None:
        return [None] * len(ready)
    sizes = [source.size() for source in ready]
    total = sum(sizes)
    if count > total:
        raise ConfigError(f"--pairs asks for {count} pairs, but the sources have {total}")
    taken = set(random.Random(derive(seed, "label-part")).sample(range(total), count))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [{i for i in range(size) if start + i in taken} for start, size in zip(starts, sizes, strict=True)]


def _shown(pairs: Iterator[StudyPair], status: Status, counts: Counts) -> Iterator[StudyPair]:
    for pair in pairs:
        yield pair
        status("reading pairs", counts.ordinary + counts.gold, None)


def _seedless(pair: StudyPair) -> StudyPair:
    """The pair with a note that no seed is known: neither folders of images nor forms of pairs have one."""
    return replace(pair, provenance={side: {"seed": None} for side in ("first", "second")})


def _sampled(request: Request, models: Sequence[str], counts: Counts, status: Status) -> Iterator[StudyPair]:
    from apps.label import generated

    plan = generated.plan(
        models, request.against, request.overrides, request.prompts, request.split, request.count, request.seed
    )
    counts.notes.append(f"sampled on {len(plan.prompts)} {plan.split}")
    return generated.pairs(plan, status)


def _same(first: Sample, second: Sample) -> bool:
    if first.image is None or second.image is None:
        return first.text == second.text
    one, other = first.image, second.image
    return (one.size, one.mode) == (other.size, other.mode) and one.tobytes() == other.tobytes()


def _tell(folder: Path, protocol: Protocol, counts: Counts, database: str | None) -> None:
    rules = protocol.rules
    raters = f"{rules.overlap} {'rater' if rules.overlap == 1 else 'raters'}"
    kinds = ", ".join(f"{count} of {kind}s" for kind, count in sorted(counts.kinds.items()))
    click.echo(f"study     {folder}")
    click.echo(f"pairs     {counts.ordinary} to judge, {counts.gold} gold ({kinds})")
    arms = ", ".join(f"{printable(arm)} ({count})" for arm, count in sorted(counts.arms.items()))
    click.echo(f"arms      {arms}")
    click.echo(f"protocol  {printable(rules.name)} version {rules.version}, {raters} a pair")
    if rules.gold_share and not counts.gold:
        click.echo(
            f"note      the protocol has gold_share {rules.gold_share:g}, but there are no gold pairs: none is asked"
        )
    for note in counts.notes:
        click.echo(f"note      {note}")
    if counts.equal:
        click.echo(f"note      {counts.equal} pairs of two equal samples are left out")
    where = " --database URL" if database else ""
    click.echo(f"next      diffalign label users add {folder} NAME && diffalign label serve {folder}{where}")
