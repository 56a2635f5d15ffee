"""``diffalign evaluate``: a run, or any model against another, on held-out prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import click
from torch import Tensor
from torch.nn import Parameter

from apps import build, configured, samples
from apps.outcome import show
from apps.progress import Status
from diffalign import prompts as prompt_sources
from diffalign import shares
from diffalign.config import AdapterConfig, RunConfig
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.evaluation import evaluate
from diffalign.runs import Run, require_empty, unused_folder, write_text
from diffalign.types import Capability, Policy, Prompt, Rollout, StepLikelihood
from pipelines.diffusion import DiffusionPolicy
from pipelines.language import LanguagePolicy
from pipelines.loading import load_adapter, load_policy


def run(model: str, against: str | None, overrides: Sequence[str], out: Path | None) -> None:
    """Evaluates and writes evaluation.json and samples; prints the table."""
    config = configuration(model, against, overrides)
    _know_words([name for name in (model, against) if name], config)
    specs = [entry.reward for entry in config.rewards] + config.evaluation.rewards
    if all(build.is_of_another_world(spec, config) for spec in specs):
        raise _nothing_judged(specs, config)
    folder = out or unused_folder(Path("runs") / f"evaluate-{Path(model).name.replace(':', '-')}")
    require_empty(folder, "choose another --out")
    first = sampler(against, config) if against else None
    second = sampler(model, config)
    if first is None and not second.adapter and not _full_run(model):
        raise ConfigError(f"{model} is a base model: say what to compare it with, --against MODEL or RUN")
    judges = build.judges(config)
    _, held_out = prompt_sources.load(config.prompts, config.seed, training=False)
    base = first or sampler(config.model, config)
    with Status() as status:
        build.say_compiled(second, status.say)
        outcome = evaluate(
            Pair(second, base),
            held_out,
            judges.main,
            [*judges.others, *build.standing(base)],
            trained_on=trained_on(model, config, judges),
            wanted=judges.wanted,
            seeds_per_prompt=config.evaluation.seeds_per_prompt,
            seed=config.seed,
            features=build.features(config),
            spreads=build.spreads(config),
            on_progress=status,
        )
    if not any(measure.known().any() for measure in outcome.measures.values()):
        raise _nothing_judged([name for name in outcome.measures if "/" not in name], config)
    write_text(folder / "evaluation.json", outcome.dumps())
    samples.write_pairs(folder / "samples", outcome)
    show(outcome)
    click.echo(f"written to {folder}")


def _nothing_judged(rewards: Sequence[str], config: RunConfig) -> InputError:
    return InputError(
        f"{' and '.join(rewards)} can judge none of the samples, so there is nothing to compare: name a reward that"
        f" knows the prompts of {config.prompts.source}, in rewards or evaluation.rewards"
    )


def _know_words(names: Sequence[str], config: RunConfig) -> None:
    """Refuses prompts of a world that a model has no words for: neither its own nor that of the run that made it."""
    own = {name: configured.configuration(name, made=True) for name in names if is_run(name)}
    bases = {name: own[name].model if name in own else name for name in names}
    worlds = {name: build.WORLD_OF[base] for name, base in bases.items() if base in build.WORLD_OF}
    asked = config.prompts.source
    for name, world in worlds.items():
        seen = name in own and own[name].prompts.source == asked
        if asked in prompt_sources.WORLDS and asked != world and not seen:
            alike = {*worlds.values()} == {world}
            instead = f"take {world}, or" if alike else f"compare it with a model of {world}, or by"
            raise ConfigError(
                f"prompts.source: {asked}, but {bases[name]} knows the words of {world} alone, so nothing that {name}"
                f" makes of them means anything; {instead} a file of your own"
            )


def trained_on(model: str, config: RunConfig, judges: build.Judges) -> Collection[str]:
    """Names of the rewards that training saw: by the run's own configuration, and none where there was no training."""
    if not is_run(model):
        return ()
    own = build.resolved(configured.configuration(model, made=True), Path(model).expanduser())
    return judges.trained_on if own.rewards == config.rewards else build.judges(own).trained_on


def is_run(name: str) -> bool:
    """Whether a name is a run directory."""
    return (Path(name).expanduser() / "config.yaml").is_file()


def _full_run(name: str) -> bool:
    return is_run(name) and (Path(name).expanduser() / "model").is_dir()


def configuration(model: str, against: str | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration of the run that is evaluated, or that it is compared with, or a default for two models."""
    for name in (model, against):
        if name and is_run(name):
            return build.resolved(of_run(name, overrides), Path(name).expanduser())
    config = build.standard(model, overrides)
    if config is None:
        raise ConfigError(
            f"{model} is not a run, so there is no configuration with prompts and rewards to evaluate it by; evaluate a"
            " run directory, or an embedded model"
        )
    return config


def of_run(name: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run that is looked at. ConfigError where an override would change training alone."""
    config = configured.configuration(name, overrides, made=True)
    asked = {override.partition("=")[0].strip() for override in overrides}
    for field in ("steps", "eta"):
        own = getattr(config.evaluation, field)
        if own is not None and f"sampler.{field}" in asked and f"evaluation.{field}" not in asked:
            raise ConfigError(
                f"--set sampler.{field}: {name} was trained with that, and is looked at with evaluation.{field} {own};"
                f" set evaluation.{field}"
            )
    return config


def sampler(name: str, config: RunConfig) -> DiffusionPolicy | LanguagePolicy:
    """A policy that samples from a model, or from what a run produced."""

    def load(model: str, adapter: AdapterConfig | None = None) -> DiffusionPolicy | LanguagePolicy:
        return load_policy(
            model, modality=config.modality, adapter=adapter, device=build.device(config.device),
            precision=config.precision, compiled=config.compile, name=name, **build.sampling(config),
        )  # fmt: skip

    if not is_run(name):
        return load(name)
    folder = Path(name).expanduser()
    own = build.resolved(configured.configuration(name, made=True), folder)
    Run.open(folder)
    build.warn_whole(name)
    if (folder / "model").is_dir():
        return load(str(folder / "model"))
    if not (folder / "adapter").is_dir():
        raise NotFoundError(f"run {name} has no adapter/ or model/: it did not finish; continue it with --resume")
    policy = load(own.model, adapter=own.adapter)
    load_adapter(policy, folder / "adapter")
    return policy


class Pair:
    """Two models as one policy: the second is the reference of the first."""

    capabilities: frozenset[Capability] = frozenset()

    def __init__(self, aligned: Policy, base: Policy) -> None:
        self.aligned, self.base, self.now = aligned, base, aligned
        self.name, self.modality = aligned.name, aligned.modality
        self.device, self.batch_size = aligned.device, aligned.batch_size
        self.steps_at_once, self.reduction = aligned.steps_at_once, aligned.reduction

    def rollout(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
        """See Policy."""
        return self.now.rollout(prompts, seeds)

    def merged(self) -> AbstractContextManager[None]:
        """As the model that is asked now samples where nothing is replayed."""
        return shares.samples_alone(self.now)

    def step_log_probs(self, rollout: Rollout, steps: Tensor, *, kl: bool = False) -> StepLikelihood:
        """See Policy."""
        return self.now.step_log_probs(rollout, steps, kl=kl)

    def trainable(self) -> Mapping[str, Parameter]:
        """Nothing: a pair is for looking, not for training."""
        return {}

    def save(self, run: Path) -> Path:
        """See Policy."""
        return self.aligned.save(run)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it the base model is asked."""
        self.now = self.base
        try:
            yield
        finally:
            self.now = self.aligned
