"""``diffalign generate``: from a specification to a dataset of images, texts and rows."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from apps import generate_again, generate_names
from apps.catalogue import dataset_recipes, find
from apps.progress import Status
from diffalign.errors import ConfigError, RefusedError, UserError
from diffalign.fields import fields_of
from diffalign.runs import disk_errors, require_empty, unused_folder
from diffalign.synthesis import beginning, rows, store
from diffalign.synthesis import spec as specification
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.engine import Engine
from diffalign.synthesis.spec import Spec
from diffalign.synthesis.store import Acceptance, Generated

GRACE = 20.0
"""Seconds after which another process than the first says why it cannot go on. Where the first one cannot either it has
said so by then, and the launcher has ended this one.
"""
WORST = 5
"""Strata that are named at the end."""


def run(
    recipe: str,
    overrides: Sequence[str],
    out: Path | None,
    *,
    resume: bool = False,
    exports: Sequence[str] = (),
    allow_unsafe: bool = False,
) -> int:
    """Makes the dataset, or goes on with it; returns the exit status."""
    folder = out
    rank, count = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    try:
        if resume and out is None:
            raise ConfigError("--resume needs --out: the folder of the dataset to continue")
        if exports and not resume and not allow_unsafe:
            raise ConfigError(
                "--export: nothing is known yet of the privacy of a dataset that is still to be made, so add"
                " --allow-unsafe, or assess it with 'diffalign evaluate' and hand it out with 'diffalign export'"
            )
        if count > 1 and out is None:
            raise ConfigError("several processes need --out, so that all of them write to the same folder")
        named = _begun(recipe, out) if resume and out else recipe
        # Whatever is wrong in the specification is told before models are loaded, and before their libraries are.
        spec, origin = load(named, overrides), _origin(named, overrides)
        folder = out or unused_folder(Path("runs") / spec.name)
        if not resume:
            with disk_errors(f"cannot write {folder}", folder):
                require_empty(folder)
        with specification.placed(origin):
            generate_names.check(spec)
        source = None if resume else generate_again.folder_of(_path(named))
        seconds = _make(spec, origin, folder, source, resume=resume, speaks=rank == 0)
    except UserError:
        if rank:
            time.sleep(GRACE)
        raise
    except KeyboardInterrupt:
        if not rank:
            _interrupted(recipe, overrides, folder)
        return 130
    if not rank:
        _show(folder, None if resume else seconds)
        _export(folder, exports, allow_unsafe=allow_unsafe)
    return 0


def _make(
    spec: Spec, origin: Mapping[str, str], folder: Path, source: Path | None, *, resume: bool, speaks: bool
) -> float:
    """Makes the cases, and returns in how many seconds, without what was loaded before and written about them at last.

    ``origin`` says where each field of the specification stands, and ``source`` is the dataset that it lies in, if it
    lies in one. One process of several speaks.
    """
    from apps import dataset_report, generate_models

    found = rows.survey(spec)
    if speaks:
        _warn(found)
    workers = generate_models.workers()
    with specification.placed(origin):
        made = generate_models.Makers(spec)
    manifest = made.manifest(found)
    if source is not None and speaks:
        generate_again.compare(spec, manifest, source)
    workers.meet()
    if speaks:
        _begin(spec, folder, manifest, resume=resume)
    workers.meet()
    began, ended = time.monotonic(), list[float]()

    def at_end() -> None:
        ended.append(time.monotonic())
        dataset_report.write(folder)

    with Status() as status:
        Engine(
            spec, folder, made.makers(), duplicates=made.duplicates, workers=workers,
            on_progress=status if speaks else (lambda *_: None), say=status.say if speaks else (lambda _: None),
            at_end=at_end,
        ).run()  # fmt: skip
    return (ended or [time.monotonic()])[0] - began


def load(recipe: str, overrides: Sequence[str]) -> Spec:
    """The specification of a recipe's name, a YAML file, or the folder of a dataset."""
    path = _path(recipe)
    generate_again.check_places(path, overrides)
    return specification.load(path, overrides)


def _origin(recipe: str, overrides: Sequence[str]) -> Mapping[str, str]:
    """Where each field of the specification stands."""
    return fields_of(_path(recipe), overrides, "cases: 100")[1]


def _path(recipe: str) -> Path:
    folder = Path(recipe).expanduser()
    return folder / store.SPEC if (folder / store.SPEC).is_file() else find(recipe, dataset_recipes())


def _begun(recipe: str, folder: Path) -> str:
    """What to continue by: the folder's own specification, where the recipe that is named is the one it was made from.

    The folder has no places of models, so that is for the recipes that ship with diffalign, whose models do too.
    """
    path, known = folder / store.SPEC, dataset_recipes()
    if recipe not in known or not path.is_file():
        return recipe
    begun, named = (fields_of(one, (), "cases: 100")[0] for one in (path, known[recipe]))
    if begun.get("name") != named.get("name"):
        return recipe
    click.echo(f"specification: {path}")
    return str(path)


def _warn(found: rows.Survey) -> None:
    for line in found.warnings():
        click.echo(f"warning: {line}", err=True)


def _begin(spec: Spec, folder: Path, manifest: Manifest, *, resume: bool) -> None:
    if not resume:
        beginning.begin(spec, folder, manifest)
        click.echo(f"writing to {folder}")
        return
    if changed := beginning.versions_that_changed(folder, manifest.versions):
        listed = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changed.items())
        click.echo(f"warning: the dataset was begun with other versions, which may round otherwise: {listed}", err=True)
    try:
        done = beginning.resume(spec, folder, manifest)
    except RefusedError as error:
        again = store.command_to_continue(folder)
        raise RefusedError(f"{error} (by its own specification: '{again}')") from None
    click.echo(f"{folder} is complete already" if done else f"continuing {folder}")


def _interrupted(recipe: str, overrides: Sequence[str], folder: Path | None) -> None:
    if folder is None or not (folder / store.SPEC).is_file():
        click.echo("interrupted: nothing was written", err=True)
        return
    changed = "".join(f" --set '{override}'" for override in overrides)
    click.echo(
        f"interrupted: what was made is kept; continue with 'diffalign generate {recipe}{changed} --resume --out"
        f" {folder}'",
        err=True,
    )


def _show(folder: Path, seconds: float | None) -> None:
    """What came of it: how many cases, and the strata that were hardest to fill. ``seconds`` are those of all attempts,
    where they are known.
    """
    dataset = Generated.open(folder)
    strata = dataset.acceptance()
    dataset.close()
    cases, attempts = (sum(getattr(one, name) for one in strata.values()) for name in ("accepted", "attempts"))
    took = "" if seconds is None else f" in {seconds:.1f} s, {seconds / max(1, attempts):.3g} s an attempt"
    click.echo(f"{cases} cases by {attempts} attempts{took}")
    for line in lines(strata)[:WORST]:
        click.echo(f"  {line}")
    click.echo(f"dataset: {folder}")
    if (report := folder / "report.html").is_file():
        click.echo(f"report: {report}")


def lines(strata: Mapping[str, Acceptance]) -> list[str]:
    """A line for each stratum, the hardest first: how many attempts its cases took, and which gates rejected."""
    hardest = sorted(strata.items(), key=lambda item: item[1].accepted / max(1, item[1].attempts))
    return [
        f"{name}: {one.accepted} of {one.wanted} cases, {one.attempts} attempts"
        + "".join(f", {gate} rejected {count}" for gate, count in one.rejected.items())
        for name, one in hardest
    ]


def _export(folder: Path, formats: Sequence[str], *, allow_unsafe: bool) -> None:
    """Hands the dataset out in these formats, below its own folder."""
    if not formats:
        return
    from apps import dataset

    for form in formats:
        dataset.export(folder, form, None, allow_unsafe=allow_unsafe)


def plan(recipe: str, overrides: Sequence[str]) -> None:
    """Prints what would be made, and loads no model; raises UserError where a name in it stands for nothing."""
    from apps import generate_plan

    spec = load(recipe, overrides)
    with specification.placed(_origin(recipe, overrides)):
        generate_names.check(spec)
    found = rows.survey(spec)
    _warn(found)
    source = generate_again.folder_of(_path(recipe))
    generate_plan.show(spec, found, source if source and not beginning.changes(spec, source) else None)
