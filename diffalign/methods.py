"""What an algorithm is: where its batches come from, how scores become credit, and what is minimised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from diffalign.errors import ConfigError
from diffalign.section import Section

Source = Literal["rollouts", "best-of-n", "online-pairs", "pairs", "labels", "demonstrations"]
ObjectiveName = Literal[
    "ppo-clip", "reinforce", "reward-weighted", "dpo", "robust-dpo", "ipo", "hinge", "kto", "sft",
    "elbo-reinforce", "elbo-ppo-clip", "nft", "draft", "align-prop", "refl",
]  # fmt: skip

_STEPWISE: Mapping[str, object] = {
    "kl_coefficient": 0.0, "kl_estimator": "exact", "ptx_coefficient": 0.0, "aggregation": "step-mean",
    "reduction": "mean",
}  # fmt: skip
_EVERYWHERE: Mapping[str, object] = {"noise_range": [0.0, 1.0]}
_DRAWS: Mapping[str, object] = {"draws": 1, **_EVERYWHERE, "reduction": "mean"}
_PAIRWISE: Mapping[str, object] = {"beta": 2500.0, "sft_weight": 0.0, "loser_safety": None, **_DRAWS}
_FORWARD: Mapping[str, object] = {"kl_coefficient": 0.0, "draws": 2, **_EVERYWHERE, "reduction": "mean"}
_BACKPROP: Mapping[str, object] = {"backprop_steps": None, "kl_coefficient": 0.0, "reduction": "mean"}
FIELDS: Mapping[str, Mapping[str, object]] = {
    "ppo-clip": {"clip_range": 1e-4, "clip_range_high": None, **_STEPWISE},
    "reinforce": _STEPWISE,
    "reward-weighted": {"temperature": 1.0, **_DRAWS},
    "dpo": {"label_smoothing": 0.0, **_PAIRWISE},
    "robust-dpo": {"flip_probability": 0.1, **_PAIRWISE},
    "ipo": {name: value for name, value in _PAIRWISE.items() if name != "sft_weight"},
    "hinge": _PAIRWISE,
    "kto": {"desirable_weight": 1.0, "undesirable_weight": 1.0, "baseline": "mismatched", **_DRAWS, "beta": 1000.0},
    "sft": _DRAWS,
    "elbo-reinforce": _FORWARD,
    "elbo-ppo-clip": {"clip_range": 1e-2, "clip_range_high": None, **_FORWARD},
    "nft": {"beta": 0.1, "old_decay_rate": 1e-3, "old_decay_limit": 0.5, **_FORWARD},
    "draft": {**_BACKPROP, "backprop_steps": 1},
    "align-prop": _BACKPROP,
    "refl": _BACKPROP,
}
"""The fields that each objective has, with its own defaults; what it has not is null."""
_OF_SUMS: Mapping[str, object] = {"beta": 0.1, "clip_range": 0.2, "reduction": "sum"}
"""Defaults where log-likelihoods are sums over tokens: neither scale carries over from one modality to the other."""
_OF_MEANS = ("draws", "noise_range", "loser_safety")
"""Fields that ask about denoising; an exact log-likelihood has none of them."""


def fields_of_objective(name: str, reduction: str = "mean") -> Mapping[str, object]:
    """The fields and defaults of an objective for log-likelihoods of that reduction."""
    if reduction == "mean":
        return FIELDS[name]
    own = {field: value for field, value in FIELDS[name].items() if field not in _OF_MEANS}
    return {field: _OF_SUMS.get(field, value) for field, value in own.items()}


def with_defaults(objective: Any, reduction: str) -> Any:
    """The plain data of an objective with the reduction that it has where none is given."""
    if not isinstance(objective, Mapping) or objective.get("reduction") is not None:
        return objective
    return {**objective, "reduction": reduction}


LEARNS_FROM: Mapping[str, tuple[Source, ...]] = {
    "ppo-clip": ("rollouts", "best-of-n"),
    "reinforce": ("rollouts", "best-of-n"),
    "reward-weighted": ("rollouts",),
    "dpo": ("pairs", "online-pairs"),
    "robust-dpo": ("pairs", "online-pairs"),
    "ipo": ("pairs", "online-pairs"),
    "hinge": ("pairs", "online-pairs"),
    "kto": ("labels", "pairs", "online-pairs"),
    "sft": ("demonstrations", "best-of-n", "pairs"),
    "elbo-reinforce": ("rollouts",),
    "elbo-ppo-clip": ("rollouts",),
    "nft": ("rollouts",),
    "draft": ("rollouts",),
    "align-prop": ("rollouts",),
    "refl": ("rollouts",),
}
"""The experience that each objective can be given. KTO takes both sides of a pair, SFT its winner. Of the best of n SFT
imitates what came out, and policy gradients imitate each step that led there."""

RECORDED: tuple[Source, ...] = ("pairs", "labels", "demonstrations")
"""Sources that do not sample: their samples were made, and judged, before the run."""

POLICY_GRADIENT = ("ppo-clip", "reinforce")
"""Objectives that ask how likely each recorded step was; the others ask how likely a whole sample is."""

FORWARD_PROCESS = ("elbo-reinforce", "elbo-ppo-clip", "nft")
"""Objectives that noise fresh samples anew and ask how well the model denoises them: any solver may have sampled."""
OF_OLD_WEIGHTS = ("elbo-ppo-clip", "nft")
"""Those of them that compare the policy with the weights that sampled."""

BACKPROP = ("draft", "align-prop", "refl")
"""Objectives that ask how likely nothing is: they follow the reward's own gradient through the recorded steps."""

NEEDS_STEPS = (*POLICY_GRADIENT, *BACKPROP)
"""Objectives that need the recorded steps of a rollout; the others need what came of it."""


class ObjectiveConfig(Section):
    """What is minimised. Each objective has its own fields and defaults; those of others stay null."""

    name: ObjectiveName = "ppo-clip"
    """The method."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] | None = None
    """PPO's clip of the per-step ratio. Image log-probabilities are means over latent elements, so it is small."""
    clip_range_high: Annotated[float, Field(gt=0)] | None = None
    """How far the ratio may rise above 1, where that is more than it may fall (DAPO's clip-higher)."""
    kl_coefficient: Annotated[float, Field(ge=0)] | None = None
    """Weight of the KL to the reference model in the loss, per step; 0 does not compute it. Of ``draft``,
    ``align-prop`` and ``refl``, and per draw of ``elbo-*`` and ``nft``, that of the mean squared difference of the
    denoiser's output from the reference's."""
    backprop_steps: Annotated[int, Field(ge=1)] | None = None
    """Last steps that the reward's gradient goes through (``draft``; 1 is DRaFT-1), or the most of them, of which each
    update draws a number (``align-prop``; null is all), or among which it draws the one that it jumps to the image
    from (``refl``; null is the last quarter)."""
    kl_estimator: Literal["exact", "k2", "k3"] | None = None
    """``exact`` is the closed form (of Gaussians, or over the whole vocabulary); k2 and k3 estimate it from the steps
    that were sampled, which costs less memory."""
    ptx_coefficient: Annotated[float, Field(ge=0)] | None = None
    """Weight of a supervised term beside the policy gradient: the likelihood of ``experience.demonstrations`` (PPO-ptx,
    Ouyang et al. 2022, eq. 2); 0 leaves it out."""
    aggregation: Literal["step-mean", "sample-mean", "constant"] | None = None
    """What the steps' losses are a mean over: all steps of the update (DAPO), each sample's own first and then the
    samples (GRPO), or as if every sample had the most steps it can have (Dr. GRPO). It matters where samples differ in
    length."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Of ``reward-weighted``: how much better a sample must be, in standardised advantages, to count e times as
    much."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """How strongly a preference objective holds on to the reference; its scale belongs to ``reduction``. Of ``nft``:
    how far its positive policy is from the one that sampled, in units of how far the policy is; less is bolder."""
    old_decay_rate: Annotated[float, Field(ge=0)] | None = None
    """Of ``nft``: after epoch n the policy that samples keeps a share ``old_decay_rate * n`` of itself, and takes the
    rest from the trained one. 0: it is the trained one."""
    old_decay_limit: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of ``nft``: the most of itself that it keeps."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Of ``dpo``: share of labels taken to be wrong (conservative DPO)."""
    flip_probability: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Of ``robust-dpo``: share of labels known to be flipped, whose effect is undone in the mean."""
    sft_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the winner's own likelihood, times ``beta``: a guard against winners that fall; 0 leaves it out.
    Not for ``ipo``, whose slope does not grow with ``beta``."""
    loser_safety: Annotated[float, Field(ge=0, le=1)] | None = None
    """Diffusion-SDPO's guard: the loser's gradient is scaled down where it would raise the winner's error, by this
    share of the winner's own gradient; null leaves it out."""
    desirable_weight: Annotated[float, Field(gt=0)] | None = None
    """Of ``kto``: weight of what was judged good."""
    undesirable_weight: Annotated[float, Field(gt=0)] | None = None
    """Of ``kto``: weight of what was judged bad."""
    baseline: Literal["mismatched", "batch"] | None = None
    """Of ``kto``: what a drift is compared with: that of samples under another's prompt, or of the batch itself."""
    draws: Annotated[int, Field(ge=1)] | None = None
    """(timestep, noise) draws at which a sample's likelihood is asked, in each update."""
    noise_range: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)] | None = None
    """Where the timesteps of these draws lie, evenly, as shares of those that the model was trained on: 0 is no noise
    and 1 all of it. The upper half decides what is in an image, the lower how fine its detail is."""
    reduction: Literal["mean", "sum"] | None = None
    """How a log-likelihood is reduced: the mean over an image's latent elements, or the sum over a text's tokens.
    ``beta`` and ``clip_range`` depend on it, so their defaults do, too. Where it is not given, it is the model's."""

    @field_validator("noise_range", mode="after")
    @classmethod
    def _from_less_to_more(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError(f"it goes from less noise to more, such as [0.45, 1.0]; {value} does not")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _remembers_what_was_given(cls, data: Any, handler: ModelWrapValidatorHandler[ObjectiveConfig]) -> Any:
        made = handler(data)
        if isinstance(data, Mapping):
            made.model_fields_set.intersection_update(name for name, value in data.items() if value is not None)
        return made

    def suited_to(self, reduction: Literal["mean", "sum"]) -> ObjectiveConfig:
        """The same with the defaults of that reduction; one whose reduction was given stays as it is.

        Raises ConfigError for a given field that the reduction has no use for.
        """
        given = self.model_dump(include=self.model_fields_set)
        if "reduction" in given:
            return self
        try:
            return ObjectiveConfig.model_validate({**given, "reduction": reduction})
        except ValidationError as error:
            raise ConfigError(f"objective: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None

    @model_validator(mode="before")
    @classmethod
    def _own_fields(cls, data: Any) -> Any:
        name = data.get("name", "ppo-clip") if isinstance(data, Mapping) else None
        if not isinstance(name, str) or name not in FIELDS:
            return data
        reduction = data.get("reduction") or "mean"
        if name in FORWARD_PROCESS and reduction == "sum":
            raise ValueError(
                f"{name} asks how well noised images are denoised; the likelihood of a text is exact, and"
                f" {' and '.join(POLICY_GRADIENT)} go by it"
            )
        own = fields_of_objective(name, reduction) if isinstance(reduction, str) else FIELDS[name]
        foreign = [field for field in data if field in cls.model_fields and field != "name" and field not in own]
        if given := [field for field in foreign if data[field] is not None]:
            whose = f"{name} of sums over tokens" if reduction == "sum" and given[0] in FIELDS[name] else name
            raise ValueError(f"{whose} has no {given[0]}; it has {', '.join(own)}")
        return {**own, **{field: value for field, value in data.items() if value is not None or field not in own}}


class CriticConfig(Section):
    """PPO with a critic: what each token is worth, and the KL to the reference as a part of the reward.

    Defaults are those of the reproductions of Ziegler et al. 2019 and of InstructGPT (Ouyang et al. 2022).
    """

    discount: float = Field(1.0, gt=0, le=1)
    """GAE's gamma."""
    trace: float = Field(0.95, ge=0, le=1)
    """GAE's lambda: 1 trusts what was scored, 0 what the critic expects."""
    kl_coefficient: float = Field(0.05, ge=0)
    """What a nat of drift from the reference costs, in units of the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How a token's drift is estimated: k1 is unbiased in a reward, k3 never negative."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """Nats per sample that the coefficient is steered towards (Ziegler et al. 2019, section 2.2); null keeps it."""
    horizon: int = Field(10_000, ge=1)
    """Samples over which the steered coefficient changes by a fifth at most."""
    whiten_rewards: bool = False
    """Divide the rewards of all tokens by their standard deviation."""
    whiten_advantages: bool = True
    """Take their mean off the advantages of all tokens, and divide by their standard deviation."""
    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the critic's error beside the policy's loss."""
    value_clip: float = Field(0.2, gt=0)
    """How far a value may move from the rollout's before its error counts no less."""
    missing_end_penalty: float = Field(0.0, ge=0)
    """Taken from the reward of a sample that was cut off before it ended."""


class CreditConfig(Section):
    """From scores to advantages, for objectives that learn from scores."""

    rule: Literal["batch", "per-prompt", "group", "group-mean", "leave-one-out", "gae"] = "per-prompt"
    """``batch`` and ``group`` standardise within the epoch, or the samples of a prompt (GRPO); ``group-mean`` takes off
    the mean alone (Dr. GRPO); ``per-prompt`` standardises by a prompt's last scores (DDPO); ``leave-one-out`` takes off
    the mean of a prompt's other samples (RLOO); ``gae`` credits each step by what a critic expected (Schulman et al.
    2016), and needs a model that can have one."""
    critic: CriticConfig | None = None
    """Of ``gae``, and null for the others."""
    clip: float = Field(5.0, gt=0)
    """Advantages are clipped to ± this."""
    buffer_size: int = Field(32, ge=2)
    """Scores that ``per-prompt`` remembers of each prompt."""
    min_count: int = Field(16, ge=1)
    """Scores of a prompt below which ``per-prompt`` falls back on the epoch's statistics; at most ``buffer_size``."""

    @model_validator(mode="before")
    @classmethod
    def _own_critic(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        gae = data.get("rule") == "gae"
        if not gae and data.get("critic") is not None:
            raise ValueError(f"critic belongs to rule gae, and rule is {data.get('rule', 'per-prompt')}")
        return {**data, "critic": data.get("critic") or {}} if gae else data

    @model_validator(mode="after")
    def _fills(self) -> CreditConfig:
        if self.rule == "per-prompt" and self.buffer_size < self.min_count:
            raise ValueError(
                f"buffer_size {self.buffer_size} is below min_count {self.min_count}, so per-prompt would never have"
                " the scores to use a prompt's own statistics; set min_count to buffer_size or less"
            )
        return self


class ExperienceConfig(Section):
    """Where training batches come from."""

    source: Source = "rollouts"
    """``rollouts`` (fresh samples and their scores), ``best-of-n`` (the best fresh samples of each prompt),
    ``online-pairs`` (fresh samples, paired and judged), or what was recorded: ``pairs``, ``labels`` (good or bad, one
    sample each), ``demonstrations``."""
    path: str | None = None
    """The recorded file: pairs in the native form (``diffalign preferences convert``), labels as rows, or a folder of
    images with their prompts. Of ``demonstrations`` also the name of a world, which shows its own."""
    demonstrations: str | None = None
    """What ``objective.ptx_coefficient`` keeps likely: images with their prompts, rows of texts, or the name of a
    world."""
    criterion: str | None = None
    """Of recorded ``pairs``: which judgements to learn from, where the file has several criteria."""
    rater: str | None = None
    """Simulated raters, by name or YAML file: they judge samples of the base model before training (``pairs``,
    ``labels``), or fresh samples (``online-pairs``), where nobody recorded what people think."""
    collect: int = Field(512, ge=2)
    """Pairs or labels that the simulated raters give before training."""
    keep: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.5], min_length=1)
    """Of ``best-of-n``: share of each prompt's samples that is kept, one at least and never the worst. A number for
    each pass over the epoch's samples (further ``trainer.inner_epochs`` repeat the last): ReST's rising threshold, or
    RAFT's with one."""

    @model_validator(mode="after")
    def _has_data(self) -> ExperienceConfig:
        if self.source in RECORDED:
            judged = self.rater is not None and self.source != "demonstrations"
            if (self.path is None) == (not judged):
                wanted = "" if self.source == "demonstrations" else ", or experience.rater,"
                raise ValueError(f"source {self.source} needs experience.path{wanted} and not both")
        elif self.path is not None:
            raise ValueError(f"source {self.source} makes its own samples; it has no use for experience.path")
        if self.criterion is not None and self.source != "pairs":
            raise ValueError(f"experience.criterion chooses among recorded pairs, and source is {self.source}")
        if self.rater is not None and self.source in ("rollouts", "best-of-n"):
            raise ValueError(f"source {self.source} goes by rewards; experience.rater is for pairs and labels")
        return self


class RewardModelConfig(Section):
    """A reward model that the run fits before it trains; rewards name it by ``folder=fitted``."""

    preferences: str | None = None
    """The pairs that people judged: a file or folder of any known format."""
    rater: str | None = None
    """Simulated raters in their place, by name or YAML file: they judge samples of the base model."""
    collect: int = Field(512, ge=2)
    """Pairs that the simulated raters judge."""
    criteria: list[str] | None = None
    """What the reward model learns, each criterion by heads of its own; null is every criterion there is."""
    ensemble: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of a reward model of images: heads for each criterion; what they disagree on is what it does not know."""
    encoder: str | None = None
    """What it is fitted from; null is ``embedded:clip`` for images, and for texts the model that the run begins
    with."""
    length: Literal["free", "controlled"] | None = None
    """Of a reward model of texts: whether what length explains is taken out of the scores."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Of the fit; null is the default of ``diffalign reward fit``."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the fit; null is the default of ``diffalign reward fit``."""

    @model_validator(mode="after")
    def _has_data(self) -> RewardModelConfig:
        if (self.preferences is None) == (self.rater is None):
            raise ValueError("it needs fit.preferences or fit.rater, and not both")
        return self


def combination_fault(objective: str, source: Source) -> str:
    """Why an objective cannot learn from a source, with the combinations that exist; empty if it can."""
    if source in LEARNS_FROM[objective]:
        return ""
    fitting = ", ".join(name for name, sources in LEARNS_FROM.items() if source in sources)
    return (
        f"objective {objective} learns from {' or '.join(LEARNS_FROM[objective])}, not from {source}: change"
        f" experience.source, or objective.name to one that does ({fitting})"
    )
