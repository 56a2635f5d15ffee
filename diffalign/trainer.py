"""The training loop: gather experience, learn from it, again. There is one loop.

An algorithm is a source of experience, a rule of credit, and an objective: see ``experience``, ``credit``, ``lessons``.

Shape legend: ``N`` samples of an epoch, ``S`` steps of a sample; a *row* is one (sample, step) or one (sample, draw).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import checks, lessons, optimisers, shares
from diffalign.config import CreditConfig, ObjectiveConfig, TrainerConfig
from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.experience import Each, Epoch, Experience, Gathered, Rollouts, Scored, Shown, Source
from diffalign.forward_lessons import Forward
from diffalign.interruption import Interrupted, interruptible
from diffalign.lessons import Lesson, Rows
from diffalign.methods import NEEDS_STEPS, POLICY_GRADIENT
from diffalign.processes import Processes, checksum
from diffalign.runs import Run
from diffalign.seeds import derive, permutation
from diffalign.shadow import Shadow
from diffalign.teaching import Teacher
from diffalign.types import Policy, Prompt, Rollout


class Trainer:
    """Aligns a policy by what a source gathers.

    Every random draw is derived from ``seed``, the epoch and the sample's number, so the state between two epochs is
    the weights, the optimiser and the credit statistics: that is all a bit-exact resume needs.
    """

    def __init__(
        self,
        policy: Policy,
        source: Source,
        *,
        beside: Source | None = None,
        settings: TrainerConfig | None = None,
        objective: ObjectiveConfig | None = None,
        credit: CreditConfig | None = None,
        seed: int = 0,
        precision: str = "fp32",
        run: Run | None = None,
        on_epoch: Callable[[Trainer, int, Mapping[str, float]], None] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """``on_epoch`` gets the trainer, the number of epochs done, and the metrics of the last one.

        ``beside`` brings the demonstrations of a supervised term, where the objective has one (``ptx_coefficient``).
        """
        self.accelerator = checks.accelerator(cpu=policy.device.type == "cpu")
        self.processes = Processes(self.accelerator)
        if isinstance(source, Rollouts) and not source.prompts:
            raise ConfigError("there is no prompt to train on")
        if policy.modality != source.modality:
            whose = f"reward {source.reward.name}" if isinstance(source, Rollouts) else f"source {source.name}"
            raise ConfigError(
                f"{whose} judges {source.modality}s, but the model makes {policy.modality}s (a function of your own"
                " says by its attribute 'modality' which of them it judges)"
            )
        self.policy, self.source, self.beside = policy, source, beside
        self.settings = settings or TrainerConfig()
        self.objective = (objective or ObjectiveConfig()).suited_to(policy.reduction)
        self.credit = credit or CreditConfig()
        self._check_capabilities()
        if bool(self.objective.ptx_coefficient) != (beside is not None):
            raise ConfigError("objective.ptx_coefficient needs demonstrations beside the source, and they need it")
        self.seed, self.precision, self.run = seed, precision, run
        self.on_epoch, self.on_progress = on_epoch, on_progress or (lambda stage, done, total: None)
        self.parameters = dict(policy.trainable())
        self.optimiser = optimisers.make(self.settings, self.parameters.values())
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=precision == "fp16")
        self.teacher = Teacher(policy, source, self.objective, self.credit, self.settings, seed, self.processes)
        self.average = Shadow(self.parameters) if self.settings.ema_decay is not None else None
        self.epoch = 0
        self.updates = 0
        self.denoiser_calls = 0
        self._interrupted = threading.Event()

    def _check_capabilities(self) -> None:
        needed = lessons.needed(self.objective)
        if self.credit.critic is not None:
            needed |= {"values", "reference"}
        if missing := needed - self.policy.capabilities:
            what = self.objective.name + (" with credit.rule gae" if self.credit.critic else "")
            raise ConfigError(
                f"{what} needs {', '.join(sorted(missing))}, which {self.policy.name} does not offer; it offers"
                f" {', '.join(sorted(self.policy.capabilities))}"
            )
        if self.objective.reduction != self.policy.reduction:
            raise ConfigError(
                f"objective.reduction is {self.objective.reduction}, but {self.policy.name} answers with a"
                f" {self.policy.reduction}: set it to that, and beta or clip_range to what it needs"
            )
        for setting in ("gradient_checkpointing", "shard"):
            if getattr(self.settings, setting) and not getattr(self.policy, setting, False):
                raise ConfigError(
                    f"trainer.{setting} is on, but {self.policy.name} was built without it; build the policy with"
                    f" {setting}=True"
                )

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, epochs: int | None = None) -> None:
        """Runs until ``epochs`` epochs are done, counted from the very first.

        Raises Interrupted after Ctrl-C, in the last epoch too, and RefusedError for a run that diverged.
        """
        total = self.settings.epochs if epochs is None else epochs
        with interruptible(self._interrupted), self.processes.telling():
            self._meet("start")
            while self.epoch < total:
                called = self._calls()
                with self._own_schedule():
                    gathered = self._gathered()
                    started = time.perf_counter()
                    lesson = self.lesson(gathered.experience)
                    metrics = {**gathered.metrics, **self.notes, **self.update(lesson)}
                metrics["time/update"] = time.perf_counter() - started
                metrics["count/samples"] = (self.epoch + 1) * self.settings.samples_per_epoch
                metrics["count/updates"] = self.updates
                if hasattr(self.policy, "denoiser_calls"):
                    self.denoiser_calls += sum(self.processes.exchange("calls", self._calls() - called))
                    metrics["count/denoiser_calls"] = self.denoiser_calls
                self.teacher.end_epoch(self.epoch)
                self.epoch += 1
                self._finish_epoch(lesson, metrics, last=self.epoch == total)

    def _own_schedule(self) -> AbstractContextManager[None]:
        """Inside it the policy samples, and replays, as this epoch has it, where that changes from epoch to epoch."""
        at_epoch: Callable[[int], AbstractContextManager[None]] | None = getattr(self.policy, "at_epoch", None)
        return nullcontext() if at_epoch is None else at_epoch(self.epoch)

    def _calls(self) -> int:
        """Latents that the policy has sent through its denoiser, for whatever it was asked."""
        return int(getattr(self.policy, "denoiser_calls", 0))

    def _finish_epoch(self, lesson: Lesson, metrics: Mapping[str, float], *, last: bool) -> None:
        if self.run and self.processes.first:
            self.run.log(self.epoch, metrics)
        if self.updates:
            self._refuse(checks.parameters_fault(self.parameters))
            self._refuse(self._lesson_fault(lesson))
        if self.on_epoch:
            self.on_epoch(self, self.epoch, metrics)
        interrupted = self._meet("end of epoch")
        if last or interrupted or self.epoch % self.settings.checkpoint_every == 0:
            self.save()
            self.processes.exchange("saved")
            if interrupted:
                raise Interrupted

    def _meet(self, moment: str) -> bool:
        """Whether Ctrl-C was pressed, in any process. Raises RefusedError where they have not the same weights."""
        stopped = self._interrupted.is_set()
        if self.processes.count == 1:
            return stopped
        state = [self.epoch, self.updates, checksum(self.parameters.values())]
        found = self.processes.exchange(moment, [stopped, state])
        if any(theirs != state for _, theirs in found):
            raise RefusedError(f"the processes came apart: at the {moment} they have not the same weights")
        return any(theirs for theirs, _ in found)

    def _gathered(self) -> Gathered:
        """One epoch's experience. Where a reward or judge fails for good, the epochs before are saved first."""
        try:
            return self.gather()
        except (checks.Diverged, Interrupted):
            raise
        except BaseException:
            if self.epoch:
                self.save()
            raise

    def moment(self) -> Epoch:
        """What a source may use of the loop, at this epoch."""
        score, together = partial(shares.scores, self.processes), partial(shares.scores_of_batches, self.processes)
        return Epoch(self.epoch, self.seed, self.settings, self.sample, self.updates == 0, score, together)

    def gather(self) -> Gathered:
        """One epoch's experience."""
        return self.source.gather(self.moment())

    def sample(self, prompts: Sequence[Prompt], each: Each | None = None) -> Rollout:
        """One sample of each prompt under the current policy, each from a seed of its own. See Sampler for ``each``.

        The processes deal out the batches that one would sample, or smaller ones where there are too few.
        """
        count = len(prompts)
        seeds = [derive(self.seed, "sample", self.epoch, i) for i in range(count)]
        size = min(self.policy.batch_size, -(-count // self.processes.count))
        batches, own = shares.divided(prompts, seeds, size), dict[int, Rollout]()
        for number in self.processes.own(len(batches)).tolist():
            if self._interrupted.is_set():
                break
            own[number] = self._sampled(*batches[number])
            if each is not None:
                each(number, own[number].samples)
            if self.updates == 0 and len(own) == 1 and self.objective.name in POLICY_GRADIENT:
                checks.rollout_has_likelihood(own[number])
                checks.ratio_is_one(
                    self.policy, own[number], self.precision, self.objective.clip_range, self.settings.micro_batch_size
                )
            self.on_progress("sampling", min((number + 1) * size, count), count)
        found = self.processes.exchange(
            "samples", [self._interrupted.is_set(), shares.sendable(self.processes, self.policy, own)]
        )
        if any(stopped for stopped, _ in found):
            self.save()
            self.processes.exchange("saved")
            raise Interrupted
        return shares.joined(shares.together(self.processes, self.policy, own, batches, [sent for _, sent in found]))

    def _sampled(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
        """One batch of samples. Where they broke after an update, the updates are to blame."""
        replayed = self.objective.name in NEEDS_STEPS
        try:
            with self.teacher.behaviour(), nullcontext() if replayed else shares.samples_alone(self.policy):
                rollout = self.policy.rollout(prompts, seeds)
        except InputError as error:
            if self.updates:
                raise self._diverged(f"the model's samples are broken, {error}") from error
            raise
        if self.updates:
            self._refuse(checks.rollout_fault(rollout))
        return rollout if replayed else replace(rollout, state={})

    # -- learning ---------------------------------------------------------------------------------------------------

    def lesson(self, gathered: Experience) -> Lesson:
        """What the objective makes of the experience. Raises ConfigError for one that it cannot learn from."""
        return self.teacher.lesson(gathered, self.epoch)

    def advantages(self, scored: Scored) -> Tensor:
        """See Teacher."""
        return self.teacher.advantages(scored)

    @property
    def notes(self) -> Mapping[str, float]:
        """What the last lesson says about itself, to be logged."""
        return self.teacher.notes

    def update(self, lesson: Lesson) -> dict[str, float]:
        """All optimiser updates of one epoch; returns the mean metrics of those that were made.

        A batch in which no sample was better than another makes none.
        """
        made: list[dict[str, float]] = []
        shown = self._shown()
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        batches = list(self._batches(lesson))
        for number, (inner, items) in enumerate(batches):
            if metrics := self._step(lesson, lesson.rows(items, inner), shown):
                made.append(metrics)
            self.on_progress("updating", number + 1, len(batches))
        totals = {name: sum(metrics[name] for metrics in made) / len(made) for name in (made[0] if made else ())}
        totals["policy/learning_rate"] = self.learning_rate()
        if isinstance(lesson, Forward) or (isinstance(lesson, lessons.Steps) and not lesson.passes):
            totals["advantage/mean"] = float(lesson.advantages.mean())
            totals["advantage/zero_fraction"] = float((lesson.advantages == 0).float().mean())
        return totals

    def learning_rate(self) -> float:
        """The rate of this epoch; a function of the epoch alone, so a resumed run follows the same schedule."""
        share = 1 - self.epoch / self.settings.epochs if self.settings.schedule == "linear" else 1.0
        return self.settings.learning_rate * share

    def _batches(self, lesson: Lesson) -> Iterator[tuple[int, Tensor]]:
        for inner in range(self.settings.inner_epochs):
            items = lesson.items(inner)
            order = permutation(len(items), derive(self.seed, "order", self.epoch, inner))
            for i in range(0, len(items), self.settings.batch_size):
                yield inner, items[order[i : i + self.settings.batch_size]]

    def _shown(self) -> lessons.Examples | None:
        """This epoch's demonstrations for the supervised term."""
        if self.beside is None:
            return None
        found = self.beside.gather(self.moment()).experience
        assert isinstance(found, Shown)
        return lessons.Examples(self.policy, self.objective, self.seed, self.epoch, found.samples)

    def _supervise(self, shown: lessons.Examples) -> float:
        """Adds the gradient of the supervised term on this process's share of a batch of demonstrations; returns its
        part of their mean loss.
        """
        size = self.settings.batch_size
        order = permutation(len(shown), derive(self.seed, "shown", self.updates))
        rows, total = shown.rows(torch.tensor(order[:size]), self.updates), 0.0
        for chunk in self._own(rows, self.settings.micro_batch_size):
            loss, _ = shown.loss(shown.inputs(rows.take(chunk)))
            weighted = (self.objective.ptx_coefficient or 0.0) * loss.sum() / rows.count
            self.accelerator.backward(self.scaler.scale(weighted))
            total += float(loss.detach().sum()) / rows.count
        return total

    def _own(self, rows: Rows, size: int) -> Iterator[Tensor]:
        """int64: this process's share of the rows, as many at a time as one pass takes."""
        own = self.processes.own(len(rows))
        return iter(own.split(size)) if len(own) else iter(())

    def _step(self, lesson: Lesson, rows: Rows, shown: lessons.Examples | None = None) -> dict[str, float]:
        """One optimiser update: the mean loss over all rows, accumulated over micro-batches and processes."""
        if len(rows) == 0:
            return {}
        reference = self._reference(lesson)
        self.optimiser.zero_grad(set_to_none=True)
        size = max(1, self.settings.micro_batch_size // lesson.samples_per_row)
        answers: list[lessons.Inputs] = []
        for chunk in self._own(rows, size):
            inputs = lesson.inputs(rows.take(chunk))
            answers.append({name: values.detach() for name, values in inputs.items()})
            loss, _ = lesson.loss(inputs)
            self.accelerator.backward(self.scaler.scale(loss.sum() / rows.count))
        beside = None if shown is None else self._supervise(shown)
        inputs, beside = shares.answers(self.processes, answers, len(rows), self.policy.device, beside)
        loss, metrics = lesson.loss(inputs)
        metrics = {**metrics, "loss": loss.sum() / rows.count}
        found = {f"policy/{name}": float(value) for name, value in metrics.items()}
        if beside is not None:
            found["policy/ptx_loss"] = beside
        self.processes.sum_gradients(self.parameters.values())
        if self.updates == 0:
            checks.gradients_reach(self.parameters)
        self.scaler.unscale_(self.optimiser)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm) or 0.0)
        self._refuse(checks.update_fault(found["policy/loss"], norm, self.scaler.get_scale()))
        self.scaler.step(self.optimiser)  # with fp16, leaves the update out where a gradient overflowed,
        self.scaler.update()  # and scales the loss less from there on
        self.updates += 1
        if self.average is not None:
            # Young averages are short: otherwise one of 1000 updates would be mostly the start after the first 100.
            self.average.update(min(self.settings.ema_decay or 0.0, self.updates / (self.updates + 9)))
        if reference is not None:
            checks.reference_stays(self.policy, lesson.fingerprint, reference)
        return found | {"policy/grad_norm": norm}

    # -- checks -----------------------------------------------------------------------------------------------------

    def _reference(self, lesson: Lesson) -> Tensor | None:
        """Before the first update, what the reference says; it must be what the policy says."""
        if self.updates or "reference" not in self.policy.capabilities:
            return None
        checks.reference_is_base(self.policy, lesson.fingerprint, checks.rounding(self.policy, self.precision))
        return checks.reference_fingerprint(self.policy, lesson.fingerprint)

    @torch.no_grad()
    def _lesson_fault(self, lesson: Lesson) -> str:
        """Why the updated policy makes nothing of use: what it says of a few samples is not finite. Empty if it is."""
        finite = len(lesson) == 0 or bool(lesson.fingerprint().isfinite().all())
        return "" if finite else "after the update the log-probabilities of a sample are not finite"

    def _refuse(self, fault: str) -> None:
        if fault:
            raise self._diverged(fault)

    def _diverged(self, what: str) -> checks.Diverged:
        kept: list[Path] = self.run.checkpoints() if self.run else []
        return checks.diverged(what, self.settings.learning_rate, kept[-1] if kept else None)

    # -- the average ------------------------------------------------------------------------------------------------

    def averaged(self) -> AbstractContextManager[None]:
        """Inside it the policy has the averaged weights, which are the ones to measure; its own where none are kept."""
        return self.average() if self.average is not None else nullcontext()

    def adopt_average(self) -> None:
        """After the last epoch, and the last checkpoint: gives the policy the averaged weights for good."""
        if self.average is not None:
            self.average.exchange()
            self.average = None

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues the run bit for bit from the end of an epoch."""
        return {
            "epoch": self.epoch,
            "updates": self.updates,
            "seed": self.seed,
            "parameters": {name: parameter.detach().cpu() for name, parameter in self.parameters.items()},
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "credit": self.teacher.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "denoiser_calls": self.denoiser_calls,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state of ``state_dict``. Raises ConfigError if it belongs to another seed, model or adapter."""
        if state["seed"] != self.seed:
            raise ConfigError(
                f"the checkpoint is of a run with seed {state['seed']}, and this one has seed {self.seed}: set seed to"
                f" {state['seed']}, or start a new run"
            )
        saved = state["parameters"]
        if saved.keys() != self.parameters.keys() or any(
            saved[name].shape != parameter.shape for name, parameter in self.parameters.items()
        ):
            raise ConfigError("the checkpoint belongs to another model or adapter than the configuration names")
        for name, parameter in self.parameters.items():
            parameter.copy_(saved[name])
        self.optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.teacher.load_state_dict(state["credit"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.denoiser_calls = state.get("denoiser_calls", 0)
        self.epoch, self.updates = state["epoch"], state["updates"]

    def save(self) -> None:
        """Writes a checkpoint of the run, if there is a run. Raises RefusedError if a weight is not finite."""
        if self.run:
            self._refuse(checks.parameters_fault(self.parameters))
        if self.run and self.processes.first:
            self.run.save_checkpoint(self.epoch, self.state_dict(), self.settings.keep_checkpoints)

    def resume(self) -> bool:
        """Continues from the run's last checkpoint; False, and the run starts anew, if it has none."""
        if self.run is None:
            return False
        state = self.run.load_checkpoint()
        if state is not None:
            self.load_state_dict(state)
        if self.processes.first and (state is not None or self.run.metrics()):
            self.run.rewind(self.epoch)
        return state is not None
