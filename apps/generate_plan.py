"""``diffalign generate --dry-run``: what would be made of a specification. Nothing is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import click

from apps.generate_origin import Origin
from diffalign import assets
from diffalign.synthesis.journal import PARTS
from diffalign.synthesis.rows import Survey
from diffalign.synthesis.spec import GateConfig, RewardGate, Spec
from diffalign.synthesis.store import Generated
from pipelines.naming import FETCHED, locate
from rewards.arguments import split

FEW = 20
"""Cases by which a specification can be tried."""
HUB = "hf-hub:"
PARTS_OF_A_CASE = {"image": "an image", "text": "a text"}


def show(spec: Spec, found: Survey, again: Path | None) -> None:
    """Prints first what matters, then each stratum, the work in numbers, and every field.

    ``again`` is a dataset of the same rows, models and gates, which tells how many attempts they took.
    """
    made = [PARTS_OF_A_CASE[part] for part in PARTS if getattr(spec, part) is not None]
    _line("cases", f"{found.count:,}, each of {', '.join(made)} and a table row")
    _line("splits", ", ".join(f"{name} {count:,}" for name, count in found.splits.items()))
    _line("strata", _strata(found))
    _line("attempts", _attempts(spec, found.count, again))
    _line("gates", ", ".join(map(_gate, spec.gates)) or "none but decodable: nothing is judged")
    _line("time", _time(spec, found.count))
    _line("not looked up", ", ".join(_remote(spec)) or "nothing: all that is named is here")
    click.echo("\nwork")
    for label, value in _work(spec, found.count):
        _line(f"  {label}", value)
    click.echo("\ncases by stratum")
    for name, count in found.strata.items():
        click.echo(f"  {count:>7}  {name}")
    click.echo(f"\nevery field\n{spec.dump()}", nl=False)


def _line(label: str, value: str) -> None:
    click.echo(f"{label + ':':<20} {value}")


def _gate(gate: GateConfig) -> str:
    if not isinstance(gate, RewardGate):
        return gate.gate
    return f"{gate.reward}{f'/{gate.part}' if gate.part else ''} >= {gate.at_least:g}"


def _time(spec: Spec, count: int) -> str:
    """How to find out how long it takes: it depends on the machine, and on what the gates reject."""
    if count <= FEW:
        return "not known, but these are few"
    if spec.cases is None:
        return "not known; each chunk is kept, so begin it, watch the progress, and stop and --resume it as you like"
    return f"not known; --set cases={FEW} --out FOLDER makes few, and says how many seconds an attempt took"


def _strata(found: Survey) -> str:
    fewest, most = min(found.strata.values()), max(found.strata.values())
    each = f"{fewest:,} cases" if fewest == most else f"{fewest:,} to {most:,} cases"
    return f"{len(found.strata):,}, of {each} each"


def _attempts(spec: Spec, count: int, again: Path | None) -> str:
    most = f"at most {spec.attempts} a case"
    if again is None:
        return f"{_range(count, spec)}, {most}; how many depends on what the gates reject"
    dataset = Generated.open(again)
    try:
        strata = dataset.acceptance().values()
    finally:
        dataset.close()
    cases, attempts = (sum(getattr(one, name) for one in strata) for name in ("accepted", "attempts"))
    return f"about {attempts:,}, as {again} took for {cases:,} cases; {most}"


def _remote(spec: Spec) -> Iterator[str]:
    """What a name stands for that is not on this machine, or may not be."""
    for part in PARTS:
        section = getattr(spec, part)
        if section is None:
            continue
        model = Origin.of(section.model, section.adapter).model
        if isinstance(locate(model), str):
            yield f"{model}, a hub id"
    for reward in spec.rewards:
        if "://" in unquote(reward):
            yield f"the server of {reward}"
        if not reward.startswith(("http://", "https://")):
            yield from _absent(reward)
    if spec.rewards:
        yield "what rewards load by themselves"


def _absent(reward: str) -> Iterator[str]:
    """What the arguments of a reward name at the hub, or among fetched assets, and is not on this machine."""
    for value in split(reward)[1].values():
        if value.startswith(HUB):
            from apps.hashes import NOT_HASHED, snapshot  # it imports torch

            if snapshot("/".join(value.removeprefix(HUB).split("/")[:2])) == NOT_HASHED:
                yield f"{value} of {reward}, which is not on this machine"
        elif value.startswith(FETCHED) and not assets.find(value.removeprefix(FETCHED)).present:
            yield f"{value} of {reward}, which is not on this machine"


def _work(spec: Spec, count: int) -> Iterator[tuple[str, str]]:
    yield "chunks", f"of {spec.chunk} rows; processes take them in turn"
    if spec.image is not None:
        sampler = spec.image.sampler
        calls = sampler.steps * (1 if sampler.guidance_scale == 1 else 2)
        yield "images to make", f"{_range(count, spec)}, {spec.image.model}"
        yield "denoiser calls", f"{_range(count * calls, spec)} (image x step x guidance branch)"
    if spec.text is not None:
        tokens = count * spec.text.generation.max_new_tokens
        yield "texts to make", f"{_range(count, spec)}, {spec.text.model}"
        yield "tokens to write", f"at most {tokens:,} in the first round, {tokens * spec.attempts:,} in all"
    yield "scores to give", _range(len(spec.rewards) * count, spec)


def _range(count: int, spec: Spec) -> str:
    return f"{count:,} to {count * spec.attempts:,}"
