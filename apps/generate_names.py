"""Whether the names in a specification of a dataset stand for something; no model or reward is loaded for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apps.generate_origin import Origin
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.synthesis.journal import PARTS
from diffalign.synthesis.spec import MemorisedGate, Spec
from pipelines.naming import locate, modality_of
from rewards import registry


@contextmanager
def about(field: str) -> Iterator[None]:
    """Inside it errors begin with the field of the specification that they are about."""
    try:
        yield
    except (ConfigError, InputError, NotFoundError) as error:
        raise type(error)(f"{field}: {error}") from error.__cause__


def check(spec: Spec) -> None:
    """Raises ConfigError, InputError or NotFoundError for the first name that stands for nothing.

    What only a look into the weights, or at the hub, can tell is found out when the dataset is begun.
    """
    for part in PARTS:
        section = getattr(spec, part)
        if section is None:
            continue
        with about(f"{part}.model"):
            origin = Origin.of(section.model, section.adapter)
            place = locate(origin.model)
        if isinstance(place, Path) and modality_of(origin.model) != part:
            raise ConfigError(f"{part}.model: {section.model} makes no {part}s")
        if origin.adapter is not None and not origin.adapter.is_dir():
            raise NotFoundError(f"{part}.adapter: there is no adapter folder {origin.adapter}")
    for i, reward in enumerate(spec.rewards):
        with about(f"rewards.{i}"):
            registry.check(reward)
    for i, gate in enumerate(spec.gates):
        if isinstance(gate, MemorisedGate) and not Path(gate.images).expanduser().is_dir():
            raise NotFoundError(f"gates.{i}: memorised.images: there is no folder {gate.images}")
