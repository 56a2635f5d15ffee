"""The configuration of a run: every field, its default and its limits. Unknown fields are refused.

A recipe or a file is YAML; ``--set a.b=c`` reaches every field. ``load`` turns both into a ``RunConfig``, and an error
into one sentence with the file, the line and the nearest field.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from diffalign import idle
from diffalign.errors import ConfigError
from diffalign.fields import as_mapping, fields_of, standing_at
from diffalign.methods import (
    POLICY_GRADIENT,
    RECORDED,
    CreditConfig,
    ExperienceConfig,
    ObjectiveConfig,
    RewardModelConfig,
    combination_fault,
    with_defaults,
)
from diffalign.sampling import REDUCTIONS, SAMPLED_BY, GenerationConfig, SamplerConfig
from diffalign.section import Section
from diffalign.types import Modality

__all__ = [
    "FITTED",
    "AdapterConfig",
    "CreditConfig",
    "EvaluationConfig",
    "ExperienceConfig",
    "GenerationConfig",
    "ObjectiveConfig",
    "PromptsConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RunConfig",
    "SamplerConfig",
    "Section",
    "TrainerConfig",
    "WarmUpConfig",
    "dump",
    "fields_of",
    "is_fitted",
    "load",
    "parse",
    "standing_at",
]


MADE = "made"
"""The validation context of a run that was begun before: a field without effect did it no harm, and does none now."""
FITTED = "folder=fitted"
"""How a reward names the reward model that the run itself fits first."""


def is_fitted(reward: str) -> bool:
    """Whether this name of a reward is that of the reward model that the run fits first."""
    return FITTED in reward.partition("?")[2].split("&")


class RewardConfig(Section):
    """One reward of the combination that is optimised."""

    reward: str
    """Name, ``NAME?arg=value``, or ``path.py:attr``."""
    weight: float = 1.0
    """Weight in the sum; negative to make less of it."""
    center: float = 0.0
    """Subtracted from the raw score before weighting (calibration)."""
    scale: float = Field(1.0, gt=0)
    """What the centred score is divided by (calibration)."""


RewardEntry = Annotated[RewardConfig, BeforeValidator(as_mapping)]


class PromptsConfig(Section):
    """Where prompts come from, and which are kept for evaluation only."""

    source: str
    """``emoji``, ``brain-mr`` or ``findings`` (worlds), ``animals``, ``explanations`` or ``stories`` (lists), a
    ``.txt`` (a prompt a line) or ``.jsonl`` file, or preferences in the native form (``.parquet``)."""
    task: str = "all"
    """Kind of prompt, for worlds that have several."""
    train: int = Field(64, ge=1)
    """Number of training prompts. Recorded pairs, labels and demonstrations of a file bring their own; these are then
    the ones that ``diffalign label init --split train`` asks about."""
    held_out: int = Field(64, ge=1)
    """Number of evaluation prompts. They never appear in training."""


class AdapterConfig(Section):
    """The LoRA that is trained (Hu et al. 2021)."""

    rank: int = Field(4, ge=1)
    """Its inner dimension."""
    alpha: float = Field(4.0, gt=0)
    """Scale of the adapter is ``alpha / rank``."""
    targets: Literal["attention", "all"] | list[str] = "attention"
    """``attention`` (to_q, to_k, to_v, to_out.0, as in DDPO), ``all`` (also convolutions, feed-forward), or names."""


class TrainerConfig(Section):
    """The training loop."""

    epochs: int = Field(10, ge=0)
    """Rounds of sampling and updating."""
    samples_per_epoch: int = Field(64, ge=1)
    """Samples that are made, or recorded examples that are gone through, in an epoch."""
    samples_per_prompt: int = Field(1, ge=1)
    """Samples of each prompt in an epoch; group credit needs at least 2."""
    batch_size: int = Field(32, ge=1)
    """Samples behind one optimiser update; divides ``samples_per_epoch``."""
    micro_batch_size: int = Field(64, ge=1)
    """Denoising steps in one forward and backward pass; memory only."""
    inner_epochs: int = Field(1, ge=1)
    """Passes over the samples of an epoch."""
    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of each sample's steps that is trained on, drawn anew per sample."""
    optimiser: Literal["adamw", "adamw-8bit"] = "adamw"
    """``adamw-8bit`` keeps Adam's moments in 8 bits, a quarter of the memory; it is in the extra ``memory``."""
    learning_rate: float = Field(3e-4, gt=0)
    """AdamW's."""
    schedule: Literal["constant", "linear"] = "constant"
    """Whether the learning rate stays, or falls linearly over ``epochs`` to reach 0 after the last."""
    weight_decay: float = Field(1e-4, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm that an update's gradient is scaled down to, where it is larger."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the trained weights, over about ``1 / (1 - ema_decay)`` updates: it is
    what is measured and saved. Null keeps none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time. Applied when the policy is built, so in the
    library give it to ``load_policy`` too."""
    shard: bool = False
    """Divide the frozen weights of a denoiser among the processes of the run, where they do not fit on one device. For
    a LoRA; applied when the policy is built, like ``gradient_checkpointing``."""
    checkpoint_every: int = Field(1, ge=1)
    """Epochs between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept; older ones are removed."""

    @model_validator(mode="after")
    def _divides(self) -> TrainerConfig:
        if self.samples_per_epoch % self.batch_size:
            raise ValueError(
                f"samples_per_epoch {self.samples_per_epoch} does not divide into batches of batch_size"
                f" {self.batch_size}; nearest batch sizes that do: {_divisors(self.samples_per_epoch, self.batch_size)}"
            )
        if self.samples_per_epoch % self.samples_per_prompt:
            raise ValueError(
                f"samples_per_epoch {self.samples_per_epoch} does not divide into groups of samples_per_prompt"
                f" {self.samples_per_prompt}; nearest group sizes that do:"
                f" {_divisors(self.samples_per_epoch, self.samples_per_prompt)}"
            )
        return self


class WarmUpConfig(Section):
    """A supervised stage before everything else: every weight of the model learns from demonstrations.

    What comes of it is what the run begins with: its reference, what its adapter belongs to, and, of a language model,
    what its reward model is fitted from (InstructGPT's first step; Ouyang et al. 2022, section 3.1).
    """

    demonstrations: str
    """Images with their prompts, rows of texts, or the name of a world, which shows an answer to each training
    prompt."""
    trainer: TrainerConfig = TrainerConfig()
    """The loop of this stage."""


class EvaluationConfig(Section):
    """Measuring before and after, on held-out prompts, paired by prompt and seed."""

    rewards: list[str] = Field(default_factory=list)
    """Rewards that are measured but not trained on."""
    seeds_per_prompt: int = Field(2, ge=1)
    """Samples of each held-out prompt, the same seeds before and after."""
    every: int = Field(0, ge=0)
    """Epochs between held-out measurements during training; 0 measures before and after only."""
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Denoising steps wherever the model is looked at and not trained: few will do to learn from (``sampler.steps``).
    Null is as many as in training. Images only."""
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    """Noise of those steps; null is that of ``sampler.eta``."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Files are those from before these fields were."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value is not None}


class RunConfig(Section):
    """Everything that determines a run."""

    name: str = "run"
    """Of the run, and of its folder in ``runs/``."""
    seed: int = Field(0, ge=0)
    """What every draw derives from: prompts, samples, noise, batches."""
    model: str
    """``embedded:NAME``, a local diffusers or transformers folder, or a hub id."""
    modality: Modality = "image"
    """What the model makes; known of embedded and local models."""
    rewards: list[RewardEntry] = Field(default_factory=list)
    """What is optimised; none where ``experience`` brings the judgements itself."""
    prompts: PromptsConfig
    adapter: AdapterConfig | None = AdapterConfig()
    """The LoRA to train; null trains every weight of the denoiser."""
    sampler: SamplerConfig = SamplerConfig()
    generation: GenerationConfig = GenerationConfig()
    experience: ExperienceConfig = ExperienceConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    credit: CreditConfig = CreditConfig()
    trainer: TrainerConfig = TrainerConfig()
    # What comes before: behind the loop's own fields, which are the ones that a misspelt name most likely means.
    warm_up: WarmUpConfig | None = None
    fit: RewardModelConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the denoiser; log-probabilities are always fp32."""
    compile: bool = False
    """Whether the denoiser's blocks go through ``torch.compile``, which takes minutes at first and less time a step
    then; for images."""

    @model_validator(mode="before")
    @classmethod
    def _of_its_modality(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("modality", "image") not in SAMPLED_BY:
            return data
        modality: Modality = data.get("modality", "image")
        own = SAMPLED_BY[modality]
        for section in SAMPLED_BY.values():
            if section != own and section in data:
                raise ValueError(f"{section}: {data.get('model')} makes {modality}s, and {own} says how")
        objective = data.get("objective", {})
        return {**data, "objective": with_defaults(objective, REDUCTIONS[modality])}

    @model_serializer(mode="wrap")
    def _without_foreign(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        own = SAMPLED_BY[self.modality]
        return {name: value for name, value in fields.items() if name == own or name not in SAMPLED_BY.values()}

    @property
    def looked_at(self) -> SamplerConfig:
        """How images are sampled to be measured and looked at: as in training, but for what ``evaluation`` says."""
        own = {"steps": self.evaluation.steps, "eta": self.evaluation.eta}
        return self.sampler.model_copy(update={name: value for name, value in own.items() if value is not None})

    @model_validator(mode="after")
    def _coherent(self) -> RunConfig:
        source, objective = self.experience.source, self.objective.name
        if fault := combination_fault(objective, source):
            raise ValueError(fault)
        if source == "best-of-n" and len(self.experience.keep) > self.trainer.inner_epochs:
            raise ValueError(
                f"experience.keep has {len(self.experience.keep)} passes, and trainer.inner_epochs is"
                f" {self.trainer.inner_epochs}: the later ones would never be made"
            )
        named = any(map(is_fitted, [*(entry.reward for entry in self.rewards), *self.evaluation.rewards]))
        if named != (self.fit is not None):
            raise ValueError(
                f"a reward names {FITTED}, but there is no section fit that says what to fit it to" if named else
                f"fit: no reward names what it fits; write one as clinician?{FITTED} or preference?{FITTED}, of texts"
                f" as language-reward?{FITTED}"
            )  # fmt: skip
        if not self.rewards and source not in RECORDED and self.experience.rater is None:
            raise ValueError(f"rewards: there is none, and source {source} learns from them; name one at least")
        if self.rewards and (source in RECORDED or self.experience.rater is not None):
            raise ValueError(
                f"rewards: source {source} brings its own judgements, so nothing would be learned from rewards; move"
                " them to evaluation.rewards, where they are measured"
            )
        if not self.rewards and not self.evaluation.rewards:
            raise ValueError("evaluation.rewards: name one at least, for nothing else would be measured")
        if self.objective.reduction != REDUCTIONS[self.modality]:
            raise ValueError(
                f"objective.reduction is {self.objective.reduction}, but log-likelihoods of {self.modality}s are a"
                f" {REDUCTIONS[self.modality]}; leave it out"
            )
        if self.sampler.eta == 0 and objective in POLICY_GRADIENT:
            raise ValueError(
                f"sampler.eta is 0: sampling without noise has no likelihood, which {objective} needs;"
                " set sampler.eta above 0 (1 is the DDPM noise)"
            )
        if (self.objective.backprop_steps or 0) > self.sampler.steps:
            raise ValueError(
                f"objective.backprop_steps is {self.objective.backprop_steps}, but sampling takes {self.sampler.steps}"
                " steps (sampler.steps)"
            )
        if source in ("best-of-n", "online-pairs") and self.trainer.samples_per_prompt < 2:
            raise ValueError(
                f"experience.source {source} compares the samples of one prompt: set trainer.samples_per_prompt to 2"
                " or more"
            )
        return self

    @model_validator(mode="after")
    def _comparable(self, info: ValidationInfo) -> RunConfig:
        source, objective = self.experience.source, self.objective.name
        if bool(self.objective.ptx_coefficient) != (self.experience.demonstrations is not None):
            raise ValueError(
                "objective.ptx_coefficient and experience.demonstrations go together: how much the supervised term"
                " counts, and what it is about"
            )
        if self.credit.critic is not None and objective not in POLICY_GRADIENT:
            raise ValueError(f"credit.rule gae is for {' and '.join(POLICY_GRADIENT)}, not for {objective}")
        grouped = source == "rollouts" and self.credit.rule in ("group", "group-mean", "leave-one-out")
        if grouped and self.trainer.samples_per_prompt < 2:
            raise ValueError(
                f"credit.rule {self.credit.rule} compares the samples of one prompt: set trainer.samples_per_prompt"
                " to 2 or more"
            )
        if fault := self._evaluation_fault():
            raise ValueError(fault)
        if self.trainer.shard and (self.modality != "image" or self.adapter is None):
            raise ValueError(
                "trainer.shard divides the frozen weights of a denoiser among processes, and "
                + (f"{self.model} makes texts" if self.modality != "image" else "without an adapter all are trained")
                + ": leave it out"
            )
        if self.compile and (self.modality != "image" or self.trainer.shard):
            why = (
                "compile and trainer.shard were never tried together: leave one of them out" if self.trainer.shard else
                f"compile is for the blocks of image models, and {self.model} makes texts: leave it out"
            )  # fmt: skip
            raise ValueError(why)
        if info.context != MADE and (unused := idle.fault(self)):
            raise ValueError(unused)
        return self

    def _evaluation_fault(self) -> str:
        """Why samples cannot be made as ``evaluation`` wants them; empty if they can."""
        steps, eta, window = self.evaluation.steps, self.evaluation.eta, self.sampler.window
        if self.modality != "image" and not steps == eta is None:
            return f"evaluation.{'eta' if steps is None else 'steps'} is for images, and {self.model} makes texts"
        if steps is not None and window is not None and window.start + window.steps > steps:
            return f"sampler.window ends at step {window.start + window.steps}, and evaluation.steps is {steps}"
        return ""


def _divisors(total: int, near: int) -> str:
    divisors = sorted((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - near))
    return ", ".join(str(d) for d in sorted(divisors[:3]))


def load(path: Path, overrides: Sequence[str] = (), *, made: bool = False) -> RunConfig:
    """The configuration in a YAML file, with ``a.b=c`` overrides on top. ``made``: see ``parse``.

    Raises NotFoundError if the file is missing, and ConfigError with file and line for anything wrong in it.
    """
    return parse(*fields_of(path, overrides, "model: embedded:emoji"), made=made)


def parse(data: Mapping[str, Any], origin: Mapping[str, str] | None = None, *, made: bool = False) -> RunConfig:
    """A configuration from plain data. ``origin`` says where each dotted field stands, for messages.

    ``made``: it is that of a run that was begun before, perhaps by an older version, so a field that its method has no
    use for is no reason to refuse it.
    """
    try:
        return RunConfig.model_validate(data, context=MADE if made else None)
    except ValidationError as error:
        raise ConfigError(_sentence(error, origin or {})) from None


def dump(config: RunConfig) -> str:
    """The fully resolved configuration as YAML."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _sentence(error: ValidationError, origin: Mapping[str, str]) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    dotted = ".".join(location)
    if first["type"] == "extra_forbidden":
        known, names = _fields(location[:-1]), _all_fields()
        here = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        anywhere = difflib.get_close_matches(location[-1], [name.rpartition(".")[2] for name in names], n=1)
        full = [".".join([*location[:-1], near]) for near in here] or [
            name for name in names if anywhere and name.rpartition(".")[2] == anywhere[0]
        ]
        stands = f" ({origin[full[0]]})" if full and full[0] in origin and not origin[full[0]].startswith("--") else ""
        hint = f"; did you mean {full[0]}{stands}?" if full else f"; fields here: {', '.join(known)}"
        return f"{standing_at(dotted, origin)}unknown field {dotted}{hint}"
    reason = str(first["msg"]).removeprefix("Value error, ")
    given = "" if first["type"] in ("value_error", "missing") else f" (given: {first['input']!r})"
    return f"{standing_at(dotted, origin)}{dotted + ': ' if dotted else ''}{reason[0].lower() + reason[1:]}{given}"


def _fields(path: Sequence[str], model: type[BaseModel] = RunConfig) -> list[str]:
    for part in path:
        if part.isdigit() or part not in model.model_fields:
            continue
        model = _section(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


def _all_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if section := _section(field.annotation):
            names += _all_fields(section, f"{prefix}{name}.")
    return names
