"""``diffalign align``: from a configuration to an aligned model and the page that proves it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import click

from apps import (
    build,
    configured,
    hashes,
    report,
    report_diffusers,
    resumption,
    reward_stage,
    samples,
    sources,
    warm_up_stage,
)
from apps.outcome import show
from apps.progress import Status
from diffalign import processes, shares
from diffalign import prompts as prompt_sources
from diffalign.config import RunConfig
from diffalign.errors import ConfigError, DiffalignError, UserError
from diffalign.evaluation import Evaluation, evaluate, kl
from diffalign.experience import Source
from diffalign.held_out_pairs import HeldOutPairs
from diffalign.interruption import Interrupted
from diffalign.processes import LostError, Processes
from diffalign.runs import Run, require_empty, unused_folder, write_text
from diffalign.trainer import Trainer
from diffalign.types import Policy, Scores
from pipelines.diffusion import DiffusionPolicy
from pipelines.language import LanguagePolicy

_WATCH = (
    "the loss of DPO starts near ln 2 = 0.693 and hardly falls at first: watch the accuracy (policy/accuracy) and"
    " whether the winners' own likelihood falls (policy/winner_drift below 0)"
)


def run(recipe: str, overrides: Sequence[str], out: Path | None, *, resume: bool) -> int:
    """Aligns, evaluates and reports; returns the exit status.

    Where several processes were launched, all of them call it; the first writes the files and speaks for all.
    """
    crew = processes.start()
    try:
        with crew.telling():
            status = _run(recipe, overrides, out, crew, resume=resume)
            if status == 0:
                crew.leave()
    except (DiffalignError, KeyboardInterrupt) as error:
        if crew.first or isinstance(error, LostError):
            raise
        status = error.exit_status if isinstance(error, DiffalignError) else 130
    if status:
        crew.wait_for_first()  # a launcher ends all processes once one has ended, and the first may not have spoken yet
    return status


def _run(recipe: str, overrides: Sequence[str], out: Path | None, crew: Processes, *, resume: bool) -> int:
    job = _resumed(recipe, overrides, out, crew) if resume else _begun(recipe, overrides, out, crew)
    directory = job.directory
    if crew.first:
        click.echo(f"writing to {directory.path}")
    try:
        with Status(quiet=not crew.first) as status:
            job.train(status, resume=resume)
            outcome = job.evaluate(status)
    except UserError:
        if crew.first:
            directory.discard_unused()
        raise
    except (Interrupted, KeyboardInterrupt):
        saved = directory.checkpoints() or Run(directory.path / warm_up_stage.FOLDER).checkpoints()
        if not saved:
            raise
        if crew.first:
            report.write(directory)
            click.echo(
                f"interrupted: saved at epoch {saved[-1].name.removeprefix('step-')}; continue with"
                f" 'diffalign align {directory.path / 'config.yaml'} --resume --out {directory.path}'",
                err=True,
            )
        return 130
    if crew.first:
        page = report.write(directory)
        show(outcome)
        click.echo(f"model:  {job.saved}\nreport: {page}")
    return 0


def _begun(recipe: str, overrides: Sequence[str], out: Path | None, crew: Processes) -> Job:
    config = configured.configuration(recipe, overrides)
    name = config.name if config.name != "run" else Path(recipe).stem
    path = out or Path(crew.first_says("folder", lambda: str(unused_folder(Path("runs") / name))))
    if crew.first:
        require_empty(path)
    directory = Run(path)
    job = Job(config, directory, crew)
    if crew.first:
        with Status() as status:
            sources.require_whole(config, status)
        directory.begin(config)
    crew.exchange("begun")
    if not (path / "config.yaml").is_file():
        raise ConfigError(
            f"process {crew.rank} does not see {path}, which the first process has made: --out must be a folder on a"
            " file system that all machines share"
        )
    return job


def _resumed(recipe: str, overrides: Sequence[str], out: Path | None, crew: Processes) -> Job:
    directory = crew.first_then_all("open", lambda: resumption.opened(out))
    return Job(resumption.configuration(recipe, overrides, directory), directory, crew)


class Job:
    """One run: what is built from its configuration, and its stages."""

    def __init__(self, config: RunConfig, directory: Run, crew: Processes) -> None:
        self.config, self.directory, self.crew = config, directory, crew
        build.check(config)
        asked = sources.asks_prompts(config)
        self.train_prompts, self.held_out = prompt_sources.load(config.prompts, config.seed, training=asked)
        self.resolved = build.resolved(config, directory.path)
        if config.fit is not None:
            reward_stage.check(config.fit, config)
        if config.warm_up is None:
            self.policy  # noqa: B018 - a model that cannot be loaded is told before anything is written
        self.saved: Path | None = None

    @cached_property
    def policy(self) -> DiffusionPolicy | LanguagePolicy:
        """What is aligned; after a warm-up it is what that left."""
        return build.policy(self.resolved)

    @cached_property
    def judges(self) -> build.Judges:
        """The rewards; those that the run fits itself are there once it has."""
        return build.judges(self.resolved)

    def train(self, status: Status, *, resume: bool) -> None:
        """Trains to the end and writes the adapter or model."""
        config = self.config
        if config.warm_up is not None:
            self._warm_up(status)
        policy = self.policy  # made here, where all processes are: they may divide it among them
        build.say_compiled(policy, status.say)
        self._fit(policy, status, resume=resume)
        source = self.crew.first_then_all("source", lambda: self._source(status))
        trainer = Trainer(
            policy,
            source,
            beside=sources.beside(config, self.train_prompts, self.held_out, status.say),
            settings=config.trainer,
            objective=config.objective,
            credit=config.credit,
            seed=config.seed,
            precision=config.precision,
            run=self.directory,
        )
        if trainer.processes.count != self.crew.count:
            raise ConfigError("start several processes with 'accelerate launch' or torchrun, and not with mpirun")
        if resume and trainer.resume():
            status.say(f"resumed after epoch {trainer.epoch}")
        if self.crew.first:
            if resume:
                self.directory.write_config(config)
            own = {"pipeline": report_diffusers.facts(policy.family)} if isinstance(policy, DiffusionPolicy) else {}
            self.directory.write_environment(config.seed, hashes.of(self.resolved), **own)
        if config.objective.name in ("dpo", "robust-dpo") and not config.objective.sft_weight and trainer.epoch == 0:
            status.say(_WATCH)
        total = config.trainer.epochs
        pairs = sources.held_out_pairs(config, source, self.held_out)

        def on_epoch(trainer: Trainer, epoch: int, metrics: Mapping[str, float]) -> None:
            status.prefix = f"epoch {epoch + 1}/{total}: "
            status("epochs", epoch, total)
            status.say(f"epoch {epoch}/{total}: {self._headline(metrics)}")
            self._measure_on_the_way(trainer, epoch, pairs, status)

        trainer.on_epoch, trainer.on_progress = on_epoch, status
        trainer.train()
        status.prefix = ""
        trainer.adopt_average()
        if self.crew.first:
            self.saved = self.policy.save(self.directory.path)
        self.crew.exchange("model")

    def _source(self, status: Status) -> Source:
        return sources.source(
            self.config, self.policy, self.judges.main, self.train_prompts, self.held_out, self.directory,
            progress=status, say=status.say,
        )  # fmt: skip

    def _warm_up(self, status: Status) -> None:
        """The supervised stage, to its end; one that was interrupted goes on, and one that is done is left alone."""
        folder = self.directory.path
        if not self.crew.first_says("warm-up", lambda: warm_up_stage.stage(folder, self.config) is not None):
            return
        run = Run(folder / warm_up_stage.FOLDER)
        job = Job(warm_up_stage.configuration(self.config), run, self.crew)
        status.say(f"warm-up: {job.config.trainer.epochs} epochs over demonstrations")
        job.train(status, resume=True)
        outcome = job.evaluate(status)
        if self.crew.first:
            report.write(run)
        gain = outcome.difference(outcome.measures[outcome.main])["mean"]
        status.say(f"warm-up: {outcome.main} changed by {gain:+.4g} on held-out prompts")
        status.prefix = ""

    def _fit(self, policy: Policy, status: Status, *, resume: bool) -> None:
        """The stage that fits a reward model, where there is one: the first process's alone."""
        if self.config.fit is None:
            return
        if self.crew.first:
            if resume:
                self.directory.write_config(self.config)  # it may be fitted by other fields than the run began with
            reward_stage.run(
                self.config.fit, self.resolved, policy, self.train_prompts, self.held_out, self.directory, status
            )
        self.crew.exchange("fitted")

    def _headline(self, metrics: Mapping[str, float]) -> str:
        """What an epoch's metrics come down to."""
        if "reward/total" in metrics:
            return f"{self.judges.main.name} {metrics['reward/total']:.4g}"
        shown = {"loss": "policy/loss", "accuracy": "policy/accuracy", "winners": "policy/winner_drift"}
        return ", ".join(f"{name} {metrics[key]:.4g}" for name, key in shown.items() if key in metrics)

    def _measure_on_the_way(self, trainer: Trainer, epoch: int, pairs: HeldOutPairs | None, status: Status) -> None:
        """The rewards every so many epochs, and then, and at the end, what held-out pairs say."""
        every, last = self.config.evaluation.every, epoch == self.config.trainer.epochs
        due = every > 0 and epoch % every == 0
        if not due and not last:
            return
        with trainer.averaged():
            if due and not last:
                with build.looking(self.policy, self.config):
                    self._measure(epoch, status)
            if pairs is not None and (due or last):
                right = pairs.accuracy(self.policy, trainer.objective, self.config.seed, self.crew)
                if self.crew.first:
                    self.directory.log(epoch, {"policy/held_out_accuracy": right})

    def _measure(self, epoch: int, status: Status) -> None:
        """The rewards on held-out prompts during training, on one seed a prompt, and the distance from the base."""
        rollouts = samples.generate(self.policy, self.held_out, self.config.seed, status, self.crew)
        drawn = [sample for rollout in rollouts for sample in rollout.samples]
        rewards = (self.judges.main, *self.judges.others)
        found = {f"held_out/{reward.name}": _mean(shares.scores(self.crew, reward, drawn)) for reward in rewards}
        found |= {f"distance/{name}": value for name, value in kl(self.policy, rollouts[:2]).items()}
        if self.crew.first:
            self.directory.log(epoch, found)
            samples.write_moment(self.directory.path / "samples" / f"epoch-{epoch}", drawn)

    def evaluate(self, status: Status) -> Evaluation:
        """Before and after on held-out prompts; writes evaluation.json and samples/."""
        with build.looking(self.policy, self.config):
            outcome = evaluate(
                self.policy,
                self.held_out,
                self.judges.main,
                [*self.judges.others, *build.standing(self.policy)],
                trained_on=self.judges.trained_on,
                wanted=self.judges.wanted,
                seeds_per_prompt=self.config.evaluation.seeds_per_prompt,
                seed=self.config.seed,
                features=build.features(self.config),
                spreads=build.spreads(self.config),
                on_progress=status,
                processes=self.crew,
            )
        if self.crew.first:
            write_text(self.directory.path / "evaluation.json", outcome.dumps())
            samples.write_pairs(self.directory.path / "samples", outcome)
        return outcome


def _mean(scores: Scores) -> float:
    known = scores.total[scores.total.isfinite()]
    return float(known.mean()) if len(known) else math.nan
