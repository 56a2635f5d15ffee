"""Making a dataset again by the ``spec.yaml`` in its folder.

That file names tables, models, adapters, rewards and folders of images without their places. What was there is known by
its hash: of a table in the specification, of everything else in the manifest beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from diffalign.errors import NotFoundError, RefusedError
from diffalign.fields import fields_of
from diffalign.synthesis import beginning, store
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.journal import PARTS
from diffalign.synthesis.spec import Spec
from rewards.arguments import split

SHOWN = 16
"""Digits of a hash that a message shows."""
FIELDS = 3
"""Fields that are named where another dataset is made."""
LOCAL = "local-dir:"


def folder_of(spec: Path) -> Path | None:
    """The folder of the dataset that a specification lies in; None for one that lies anywhere else."""
    return spec.parent if spec.name == store.SPEC and (spec.parent / store.MANIFEST).is_file() else None


def check_places(spec: Path, overrides: Sequence[str]) -> None:
    """Raises NotFoundError where the specification of a dataset names what is not found by its name alone.

    The message has the hash of each such thing, and says how to give its place.
    """
    folder = folder_of(spec)
    if folder is None:
        return
    fields, _ = fields_of(spec, overrides, "cases: 100")
    missing = list(_missing(fields, store.read_manifest(folder)[0], folder))
    if not missing:
        return
    sets = " ".join(f"--set {field}=PLACE" for names, _ in missing for field in names)
    raise NotFoundError(
        f"{spec} does not say where these lie, of which its dataset was made: {'; '.join(what for _, what in missing)}."
        f" Add {sets}; whether they are the same is checked"
    )


def compare(spec: Spec, now: Manifest, source: Path) -> None:
    """Says whether the dataset in ``source`` is made again, or another one, and what is different.

    Raises RefusedError where the specification is the same, and a model, reward or gate that it names is not.
    """
    begun, _ = store.read_manifest(source)
    if changed := beginning.changes(spec, source):
        named = [f"{name} was {beginning.shown(a)}, and is {beginning.shown(b)}" for name, (a, b) in changed.items()]
        more = f", and {len(named) - FIELDS} more fields" if len(named) > FIELDS else ""
        click.echo(f"another dataset than {source}: {'; '.join(named[:FIELDS])}{more}")
        return
    if other := beginning.other_maker(begun, now):
        what, name, before, after = other
        raise RefusedError(
            f"{source} was made with other {what}: {name} was {before}, and is {after}; give what it was made with, or"
            " make another dataset by --set name=ANOTHER"
        )
    left = ", ".join(_unchecked(now))
    known = f", as far as they have hashes; not checked: {left}" if left else ""
    click.echo(f"making {source} again: specification, models, rewards and gates are the same{known}")
    if versions := beginning.versions_that_changed(source, now.versions):
        listed = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in versions.items())
        click.echo(f"warning: versions are others, which may round otherwise: {listed}", err=True)


def _unchecked(made: Manifest) -> Iterator[str]:
    """What makes or judges a case, and has no hash that would tell another of its name."""
    from apps.hashes import NOT_HASHED  # it imports torch

    for part, facts in made.models.items():
        if facts.get("sha256") == NOT_HASHED:
            yield f"{part}.model {facts.get('base')}"
    for name, facts in made.rewards.items():
        spec = str(facts.get("spec"))
        if NOT_HASHED in str(facts.get("sha256")) or "remote" in (spec, *split(spec)[1].values()):
            yield f"reward {name}" + (f" ({spec})" if spec != name else "")


def _missing(fields: Mapping[str, Any], made: Manifest, folder: Path) -> Iterator[tuple[list[str], str]]:
    """The fields to set, and what is missing."""
    table = _section(fields, "table")
    file = table.get("file")
    if isinstance(file, str) and not any((place / Path(file).expanduser()).is_file() for place in (folder, Path.cwd())):
        yield ["table.file"], f"the table {file} ({_short(table.get('sha256'))})"
    for part in PARTS:
        section, facts = _section(fields, part), _section(made.models, part)
        for key in ("model", "adapter"):
            if _gone(name := section.get(key)):
                yield [f"{part}.{key}"], f"{part}.{key} {name} ({_hashes(facts, key)})"
    yield from _missing_judges(fields, made)


def _missing_judges(fields: Mapping[str, Any], made: Manifest) -> Iterator[tuple[list[str], str]]:
    gates = [gate if isinstance(gate, Mapping) else {} for gate in fields.get("gates") or []]
    hashes = {facts.get("spec"): facts.get("sha256") for facts in made.rewards.values()}
    for i, entry in enumerate(fields.get("rewards") or []):
        if isinstance(entry, str) and _placeless(entry):
            by_gates = [f"gates.{j}.reward" for j, gate in enumerate(gates) if gate.get("reward") == entry]
            yield [f"rewards.{i}", *by_gates], f"the reward {entry} ({_short(hashes.get(entry))})"
    for j, gate in enumerate(gates):
        if _gone(images := gate.get("images")):
            known = [facts.get("sha256") for facts in made.gates if facts.get("images") == images]
            yield [f"gates.{j}.images"], f"the images {images} ({_short(known[0] if known else None)})"


def _section(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = fields.get(name)
    return found if isinstance(found, Mapping) else {}


def _gone(name: object) -> bool:
    """Whether this is the last component of a path, and leads nowhere from here; no shipped model, and no hub id."""
    return isinstance(name, str) and not {":", "/"} & set(name) and not Path(name).expanduser().exists()


def _placeless(reward: str) -> bool:
    """Whether a reward names a file, a folder or a server that cannot be found by its name alone."""
    if reward == "remote":
        return True
    name, arguments = split(reward)
    file = name.rpartition(":")[0]
    if file.endswith(".py"):
        return not Path(file).expanduser().is_file()
    return any(
        value == "remote"
        or ((key == "folder" or value.startswith(LOCAL) or key in ("weights", "tokenizer")) and _lost(value))
        for key, value in arguments.items()
    )


def _lost(value: str) -> bool:
    return _gone(value.removeprefix(LOCAL))


def _hashes(facts: Mapping[str, Any], key: str) -> str:
    """What a model, or the adapter on it, is known by."""
    adapter = _section(facts, "adapter")
    if key == "adapter":
        return _short(adapter.get("sha256"))
    if facts.get("name") == facts.get("base") or not adapter:
        return _short(facts.get("sha256"))
    return f"a run: adapter {_short(adapter.get('sha256'))}, on {facts.get('base')} {_short(facts.get('sha256'))}"


def _short(sha256: object) -> str:
    if not isinstance(sha256, str) or not sha256:
        return "its hash is not known"
    kind, mark, digits = sha256.rpartition(":")
    return f"{kind if mark else 'sha256'}:{digits[:SHOWN]}…" if len(digits) > SHOWN else sha256
