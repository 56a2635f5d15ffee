"""What makes and judges the cases of a dataset: from the names in a specification to models, rewards and gates."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from peft import PeftModel
from PIL.Image import Image

from apps import build, hashes
from apps.generate_origin import Origin, aligned
from diffalign import images, processes, shares
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.runs import environment
from diffalign.sampling import OPTIONAL
from diffalign.synthesis import gates, rows
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.engine import Alone, Maker, Workers
from diffalign.synthesis.journal import PARTS, Part
from diffalign.synthesis.naming import without_places
from diffalign.synthesis.spec import BlankGate, DuplicateGate, MemorisedGate, RewardGate, Spec
from diffalign.types import Prompt, Reward, Sample
from pipelines.diffusion import DiffusionPolicy
from pipelines.language import LanguagePolicy
from pipelines.loading import load_policy, locate, modality_of
from rewards import registry
from rewards.registry import load as load_reward


class Launched:
    """The processes that ``torchrun`` or ``accelerate launch`` started on this machine."""

    def __init__(self) -> None:
        self.crew = processes.start()
        self.rank, self.count = self.crew.rank, self.crew.count
        if int(os.environ.get("LOCAL_WORLD_SIZE", self.count)) != self.count:
            raise ConfigError(
                "generate runs on one machine: its processes share a journal, which is not safe on a network share"
            )

    def meet(self) -> None:
        """Waits until all processes are here. Raises LostError where one of them has ended."""
        self.crew.exchange("meet")


def workers() -> Workers:
    """The processes that work together: those that were launched, or this one alone."""
    return Launched() if processes.launched() else Alone()


class Makers:
    """Everything that a specification names, loaded once; what cannot be loaded is told before anything is written."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.device = build.device(spec.device)
        if self.device.type == "cpu":
            torch.set_num_threads(spec.threads)
        self.policies: dict[Part, DiffusionPolicy | LanguagePolicy] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        for part in PARTS:
            if getattr(spec, part) is not None:
                self._load(part)
        self.rewards: dict[str, Reward] = {name: load_reward(name) for name in spec.rewards}
        for name, reward in self.rewards.items():
            if reward.modality not in self.policies:
                raise ConfigError(f"rewards: {name} judges {reward.modality}s, and none are made")
        known = [reward.name for reward in self.rewards.values()]
        if twice := [name for i, name in enumerate(known) if name in known[:i]]:
            raise ConfigError(f"rewards: two are called {twice[0]}; leave one out")
        self.gates = list(self._gates())

    def _load(self, part: Part) -> None:
        spec = self.spec
        section = spec.image if part == "image" else spec.text
        assert section is not None
        origin = Origin.of(section.model, section.adapter)
        if modality_of(origin.model) != part and isinstance(locate(origin.model), Path):
            raise ConfigError(f"{part}.model: {section.model} makes no {part}s")
        by_table = spec.image is not None and part == "image" and spec.image.condition == "table"
        if origin.run is not None:
            build.warn_whole(origin.run)
        policy = load_policy(
            origin.model, modality=part, device=self.device, precision=spec.precision, name=section.model,
            sampler=spec.image.sampler if spec.image and part == "image" else None,
            generation=spec.text.generation if spec.text and part == "text" else None,
            condition="table" if by_table else "text",
        )  # fmt: skip
        if origin.adapter is not None:
            attach(policy, origin.adapter)
        self.policies[part] = policy
        self.facts[part] = _facts(section.model, origin, policy)
        if spec.image is not None and part == "image":
            self.facts[part] |= {"condition": spec.image.condition, "negative": spec.image.negative}

    def _gates(self) -> list[gates.Gate]:
        found: list[gates.Gate] = []
        for i, gate in enumerate(self.spec.gates):
            if isinstance(gate, BlankGate):
                found.append(gates.Blank(gate.contrast))
            elif isinstance(gate, RewardGate):
                self._check_part(gate, f"gates.{i}.part")
                found.append(gates.Floor(self.rewards[gate.reward], gate.part, gate.at_least))
            elif isinstance(gate, MemorisedGate):
                found.append(gates.Memorised(_pictures(gate.images), gate.distance))
        return found

    def _check_part(self, gate: RewardGate, field: str) -> None:
        """Raises ConfigError for a part that the reward has not: no case would ever pass."""
        known = registry.parts(gate.reward, self.rewards[gate.reward])
        if gate.part is None or known is None or gate.part in known:
            return
        near = difflib.get_close_matches(gate.part, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        there = f"its parts are {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"{field}: the reward {gate.reward} has no part {gate.part!r}; {hint}{there}")

    @cached_property
    def duplicates(self) -> gates.Duplicates | None:
        """The gate that compares cases with each other, where there is one."""
        gate = next((gate for gate in self.spec.gates if isinstance(gate, DuplicateGate)), None)
        return None if gate is None else gates.Duplicates(gate.bits, gate.similarity, encoder())

    def makers(self) -> list[Maker]:
        """What makes and judges each part of a case."""
        return [
            Maker(
                part,
                _samples(policy),
                policy.batch_size,
                [reward for reward in self.rewards.values() if reward.modality == part],
                [gate for gate in self.gates if part in gate.parts],
            )
            for part, policy in self.policies.items()
        ]

    def manifest(self, found: rows.Survey) -> Manifest:
        """What is the same for all cases."""
        return Manifest(
            name=self.spec.name,
            spec_sha256=self.spec.sha256,
            columns=found.columns,
            strata=found.strata,
            splits=self.spec.splits,
            models=self.facts,
            rewards={reward.name: _judge(spec, reward) for spec, reward in self.rewards.items()},
            gates=tuple(self._gate_facts()),
            versions={name: v for name, v in environment(0, {})["versions"].items() if v != "not installed"},
            created=datetime.now(UTC).date().isoformat(),
            rows_from="axes" if self.spec.table is None else "table",
        )

    def _gate_facts(self) -> list[dict[str, Any]]:
        found = [dict(gate) for gate in self.spec.public()["gates"] if gate["gate"] != "decodable"]
        for gate, fields in zip(found, [g for g in self.spec.gates if g.gate != "decodable"], strict=True):
            if isinstance(fields, DuplicateGate):
                gate["encoder"] = {"name": "embedded:clip", "sha256": _encoder_hash()}
            if isinstance(fields, MemorisedGate):
                gate["sha256"] = hashes.of_folder(Path(fields.images).expanduser())
        return [{"gate": "decodable"}, *found]


def attach(policy: DiffusionPolicy | LanguagePolicy, folder: Path) -> None:
    """Puts a saved LoRA on a policy. Raises NotFoundError or InputError where there is none that fits."""
    if not folder.is_dir():
        raise NotFoundError(f"there is no adapter folder {folder}")
    try:
        if isinstance(policy, LanguagePolicy):
            policy.model = PeftModel.from_pretrained(policy.model, str(folder)).eval()
        else:
            with _quiet():
                policy.family.pipeline.load_lora_weights(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"adapter {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what diffusers says of every LoRA of a denoiser alone: that it has nothing for the text encoder."""
    log = logging.getLogger("diffusers.loaders.lora_base")

    def known(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    log.addFilter(known)
    try:
        yield
    finally:
        log.removeFilter(known)


def _samples(policy: DiffusionPolicy | LanguagePolicy) -> Callable[[Sequence[Prompt], Sequence[int]], Sequence[Sample]]:
    def made(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Sequence[Sample]:
        with shares.samples_alone(policy):
            return policy.rollout(prompts, seeds).samples

    return made


def _facts(name: str, origin: Origin, policy: DiffusionPolicy | LanguagePolicy) -> dict[str, Any]:
    """What the manifest says of a model."""
    where = locate(origin.model)
    local = isinstance(where, Path)
    found: dict[str, Any] = {
        "name": without_places(name),
        "base": without_places(origin.model),
        "sha256": hashes.of_folder(where) if isinstance(where, Path) else hashes.snapshot(where),
        "parts": {path.name: hashes.of_folder(path) for path in sorted(Path(where).iterdir()) if path.is_dir()}
        if local
        else {},
        "adapter": {"name": origin.adapter.name, "sha256": hashes.of_folder(origin.adapter)}
        if origin.adapter is not None
        else None,
        "licence": _licence(origin.model, Path(where) if local else None),
    }
    if origin.run is not None:
        found["aligned"] = aligned(origin.run)
    if trained := _training_data(Path(where) / "README.md"):
        found["training_data"] = trained
    if isinstance(policy, DiffusionPolicy):
        sampler = policy.sampler
        scheduler = type(policy.family.pipeline.scheduler).__name__
        more: dict[str, Any] = {
            "scheduler": scheduler, "steps": sampler.steps, "eta": policy.schedule.eta,
            "guidance_scale": sampler.guidance_scale,
        }  # fmt: skip
        more |= sampler.model_dump(include=set(OPTIONAL))
    else:
        generation = policy.generation
        more = {"temperature": generation.temperature, "max_new_tokens": generation.max_new_tokens}
    return found | more | {"precision": str(policy.precision).removeprefix("torch.")}


def _licence(model: str, folder: Path | None) -> str:
    """As the model's card says it."""
    if model.startswith("embedded:"):
        return "Apache-2.0, with the notices of diffalign"
    card = folder / "README.md" if folder is not None else None
    if card is None or not card.is_file():
        return "not stated"
    head = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    try:
        fields = yaml.safe_load(head[1]) if len(head) > 2 and not head[0].strip() else None
    except yaml.YAMLError:
        fields = None
    return str(fields.get("license", "not stated")) if isinstance(fields, dict) else "not stated"


def _training_data(card: Path) -> str:
    """What the card of an embedded model says that it was trained on; empty where it says nothing."""
    if not card.is_file():
        return ""
    said = re.search(r"\*\*Trained on\*\* (.+?\.)\s", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return " ".join(said[1].split()) if said else ""


def _judge(spec: str, reward: Reward) -> dict[str, Any]:
    return {
        "spec": without_places(spec),
        "sha256": hashes.of_reward(spec),
        "modality": reward.modality,
        "unit": reward.unit,
        "range": [end if math.isfinite(end) else None for end in reward.range],
        "higher_is_better": reward.higher_is_better,
    }


@cache
def encoder() -> gates.Encoder:
    """The encoder by which images are compared: ``embedded:clip``."""
    from rewards.clip import ClipReward

    clip = ClipReward()

    def encode(pictures: Sequence[Image]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = clip.encode_images(pictures).numpy()
        return found

    return encode


def _encoder_hash() -> str:
    from rewards.clip import EMBEDDED

    return hashes.of_folder(EMBEDDED)


def _pictures(folder: str) -> Iterator[Image]:
    """The images of a folder, in the order of their names; each is decoded when it is asked for."""
    place = Path(folder).expanduser()
    found = sorted(path for path in place.rglob("*") if path.suffix.lower() in images.SUFFIXES)
    if not found:
        raise NotFoundError(f"gates: memorised.images: there is no image in {folder}")
    return (images.load(path) for path in found)
