"""Whether the names in a specification of a dataset stand for something; no model or reward is loaded for that."""

from __future__ import annotations

from pathlib import Path

from apps.generate_origin import Origin
from diffalign.errors import ConfigError, NotFoundError
from diffalign.synthesis.journal import PARTS
from diffalign.synthesis.spec import MemorisedGate, Spec
from pipelines.naming import locate, modality_of
from rewards import registry


def check(spec: Spec) -> None:
    """Raises ConfigError, InputError or NotFoundError for the first name that stands for nothing.

    What only a look into the weights, or at the hub, can tell is found out when the dataset is begun.
    """
    for part in PARTS:
        section = getattr(spec, part)
        if section is None:
            continue
        origin = Origin.of(section.model, section.adapter)
        if isinstance(locate(origin.model), Path) and modality_of(origin.model) != part:
            raise ConfigError(f"{part}.model: {section.model} makes no {part}s")
        if origin.adapter is not None and not origin.adapter.is_dir():
            raise NotFoundError(f"there is no adapter folder {origin.adapter}")
    for reward in spec.rewards:
        registry.check(reward)
    for gate in spec.gates:
        if isinstance(gate, MemorisedGate) and not Path(gate.images).expanduser().is_dir():
            raise NotFoundError(f"gates: memorised.images: there is no folder {gate.images}")
