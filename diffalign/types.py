"""The vocabulary of diffalign: read this file first.

Shape legend: ``B`` samples in a batch, ``S`` steps of one sample (denoising transitions of an image, tokens of a
text), ``R`` rewards in a combination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from diffalign.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, device
    from torch.nn import Parameter

Modality = Literal["image", "text"]
Capability = Literal[
    "step_log_probs", "step_kl", "log_likelihood", "denoising_residual", "reference", "values",
    "differentiable_sampling",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a generator is asked for."""

    text: str
    id: str = ""
    """Stable name of the prompt; statistics are kept per id. Empty means: the text is the id."""
    attributes: Mapping[str, object] = field(default_factory=dict)
    """The table row behind the text (what a checker verifies), if there is one."""
    negative: str = ""
    """Text for the unconditional branch of classifier-free guidance."""

    @property
    def key(self) -> str:
        """The id, or the text where no id was given."""
        return self.id or self.text


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated thing and where it came from. Exactly one of ``image`` and ``text`` is set."""

    prompt: Prompt
    image: Image | None = None
    """8-bit RGB. Rewards see the same pixels that a file on disk would hold."""
    text: str | None = None
    seed: int = 0
    evidence: Mapping[str, object] = field(default_factory=dict)
    """Facts that only the reward may see, never the policy."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One judgement between two samples of the same prompt."""

    prompt: Prompt
    first: Sample
    second: Sample
    label: float
    """Probability that ``first`` is preferred: 1 is the first, 0 the second, 0.5 a tie, which has no winner."""
    strength: float = 1.0
    """How strong the judgement is, 0 or more, where 1 is an ordinary one. Margins and weights are made of it."""
    criterion: str = "overall"
    """What was judged, such as ``overall`` or ``anatomy plausible``."""
    rater: str = ""
    """Who judged, by a pseudonym. Empty: not known."""
    provenance: Mapping[str, object] = field(default_factory=dict)
    """Where the pair came from: models, file names, study, time."""

    def __post_init__(self) -> None:
        if not 0 <= self.label <= 1:
            raise InputError(
                f"label out of range: {self.label:g} is no probability, in [0, 1], that the first is preferred"
            )
        if not (self.strength >= 0 and isfinite(self.strength)):
            raise InputError(f"strength out of range: {self.strength:g}; it is a finite number, 0 or more")


@dataclass(frozen=True, slots=True)
class Scores:
    """What a reward says of ``B`` samples. A NaN is a failed judgement of that one sample, never a zero."""

    total: Tensor
    """float32 ``(B,)``, the number that is optimised."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """The breakdown, each float32 ``(B,)``: per reward of a combination, or per attribute of a checker."""


@runtime_checkable
class Reward(Protocol):
    """Judges samples. The score of a sample depends on that sample alone, never on its batch."""

    name: str
    modality: Modality
    unit: str
    """Unit of ``Scores.total``, such as ``kB``, ``fraction`` or ``cosine``."""
    range: tuple[float, float]
    """Lowest and highest value the score can take; infinities where it has no bound."""
    higher_is_better: bool
    # A reward may also have ``directions`` (by the name of a part, whether more of it is better, None for neither) and
    # ``tolerance`` (how far its total may fall, where it was not trained on, before an evaluation raises the alarm),
    # or ``waits`` (True where it waits for a server rather than computes: it is asked while the next samples are made).

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores of the samples, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Rollout:
    """A batch of samples with what is needed to recompute how likely each of their steps was."""

    samples: tuple[Sample, ...]
    log_probs: Tensor
    """float32 ``(B, S)``: log-probability of each recorded step under the policy that sampled it."""
    mask: Tensor
    """bool ``(B, S)``: False where a step has no likelihood (a deterministic last step, padding)."""
    state: Mapping[str, Tensor]
    """Batch-first tensors that the policy recorded (latents, timesteps, tokens); opaque to the engine."""

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, index: Tensor) -> Rollout:
        """The sub-batch at ``index``, an int64 ``(B',)`` tensor."""
        return replace(
            self,
            samples=tuple(self.samples[i] for i in index.tolist()),
            log_probs=self.log_probs[index],
            mask=self.mask[index],
            state={name: tensor[index.to(tensor.device)] for name, tensor in self.state.items()},
        )


@dataclass(frozen=True, slots=True)
class StepLikelihood:
    """A policy's answer about recorded steps."""

    log_probs: Tensor
    """float32 ``(B, K)`` with gradient."""
    kl: Tensor | None = None
    """float32 ``(B, K)`` with gradient: closed-form KL of each step to the reference, where it was asked for."""
    values: Tensor | None = None
    """float32 ``(B, K)`` with gradient: what a critic expects of the sample before each step, where it was asked."""


@dataclass(frozen=True, slots=True)
class Draw:
    """The randomness that a question of ``log_likelihood`` shares.

    The policy and its reference, or the two samples of a pair, are compared at the same draw, or not at all. Where the
    likelihood is exact (text) it plays no part.
    """

    time: Tensor
    """float32 ``(B,)`` in [0, 1): how noisy the sample is made; 0 is hardly noisy."""
    seeds: tuple[int, ...]
    """``B`` seeds, one for the noise of each sample."""


class Policy(Protocol):
    """A generator that can be aligned."""

    name: str
    modality: Modality
    capabilities: frozenset[Capability]
    device: device
    batch_size: int
    """Samples that fit into one rollout."""
    steps_at_once: int | None
    """Steps of a sample that one pass of the model answers for: 1 for a denoiser, None (all) for tokens."""
    reduction: Literal["mean", "sum"]
    """Whether its log-likelihoods are means over latent elements or sums over tokens: beta depends on it."""

    def rollout(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
        """Samples one thing per prompt; sample ``i`` depends on ``prompts[i]`` and ``seeds[i]`` alone."""
        ...

    def step_log_probs(self, rollout: Rollout, steps: Tensor, *, kl: bool = False) -> StepLikelihood:
        """Log-probabilities of steps ``(B, K)`` (indices into ``S``, int64) of a rollout under the current weights."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside it the policy is the model that training started from."""
        ...

    def trainable(self) -> Mapping[str, Parameter]:
        """The parameters that training changes, by stable name."""
        ...

    def save(self, run: Path) -> Path:
        """Writes what was trained below ``run`` (``adapter/`` or ``model/``), whole or not at all, and returns it."""
        ...


class CriticPolicy(Policy, Protocol):
    """A policy with the capability ``values``: one with a value head."""

    def step_log_probs(
        self, rollout: Rollout, steps: Tensor, *, kl: bool = False, values: bool = False
    ) -> StepLikelihood:
        """See Policy; with ``values`` also what the critic expects before each step."""
        ...


class LikelihoodPolicy(Policy, Protocol):
    """A policy with the capability ``log_likelihood``."""

    def log_likelihood(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        """How likely whole samples are, float32 ``(B,)`` with gradient; the same question for all at one draw.

        For text the sum over tokens. For images minus the denoising error at ``draw``: a surrogate.
        """
        ...


class DenoisingPolicy(LikelihoodPolicy, Protocol):
    """A policy with the capability ``denoising_residual``: images only."""

    def denoising_residual(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        """What the denoiser got wrong at ``draw``, float32 ``(B, ...)`` with gradient.

        Minus its mean square is the log-likelihood.
        """
        ...

    def clean_error(self, residual: Tensor, draw: Draw) -> Tensor:
        """A residual at a draw as an error of the clean latents that the denoiser believes in, ``(B, ...)``.

        Linear in the residual: a factor for each sample, up to its sign.
        """
        ...


@dataclass(frozen=True, slots=True)
class Redrawn:
    """The images of a rollout, made once more with gradient."""

    images: Tensor
    """float32 ``(B, 3, H, W)`` in [0, 1] with gradient; rounded to 8 bits they are the rollout's."""
    drift: Tensor | None = None
    """float32 ``(B,)`` with gradient, where it was asked for: the mean squared difference of the denoiser's output from
    the reference's, over the steps with gradient and the elements of the output."""


class DifferentiablePolicy(Policy, Protocol):
    """A policy with the capability ``differentiable_sampling``: images only."""

    def redraw(self, rollout: Rollout, start: int, *, jump: bool = False, drift: bool = False) -> Redrawn:
        """Goes on from the recorded step ``start`` (0 is the first) to the image, with gradient from there on.

        With ``jump`` it makes that one step, and takes what it believes the image to be.
        """
        ...


class DifferentiableReward(Reward, Protocol):
    """A reward with a second form that has a gradient: of images only."""

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores ``(B,)`` with gradient of images ``(B, 3, H, W)`` in [0, 1], as near as can be to those of the same
        images in 8 bits; NaN for a failed judgement.
        """
        ...
