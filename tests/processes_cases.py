"""What tests/test_processes.py trains, in one process and in two: ``torchrun -m tests.processes_cases FOLDER``.

Every process leaves FOLDER/rank-R.pt: of each case its weights and metrics, or what it raised.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.config import (
    AdapterConfig,
    CreditConfig,
    GenerationConfig,
    ObjectiveConfig,
    SamplerConfig,
    TrainerConfig,
    parse,
)
from diffalign.errors import InputError
from diffalign.evaluation import evaluate
from diffalign.experience import BestOfN, OnlinePairs, Recorded, Rollouts, Source
from diffalign.processes import start
from diffalign.runs import Run
from diffalign.trainer import Trainer
from diffalign.types import Policy, Prompt, Sample, Scores
from pipelines.diffusion import DiffusionPolicy
from pipelines.families import StableDiffusion
from pipelines.language import LanguagePolicy
from tests.conftest import build_pipeline
from tests.test_trainer import CONFIG, PROMPTS, Brightness, Target, WalkPolicy
from tests.tiny_language import tiny_language_model

SCENES = [Prompt("a red ball"), Prompt("two blue cube"), Prompt("one cube")]
LETTERS = [Prompt("ab"), Prompt("c"), Prompt("ddd dddd")]


class Bright(Brightness):
    """Has a gradient, too."""

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        return (images * weights).sum(1).mean((1, 2))


class Letters:
    """How many of a text's letters are an a or a b."""

    name, modality, unit, range, higher_is_better = "letters", "text", "fraction", (0.0, 1.0), True
    waits = True
    """It is asked while the next texts are made."""

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        found = [sum(c in "ab" for c in s.text or "") / (1 + len(s.text or "")) for s in samples]
        return Scores(torch.tensor(found), {"length": torch.tensor([float(len(s.text or "")) for s in samples])})


class Counted(Brightness):
    """How many images it was asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        self.asked += len(samples)
        return super().__call__(samples)


class BrokenElsewhere(Target):
    """Fails in the second process alone."""

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        if os.environ.get("RANK") == "1":
            raise InputError("the judge does not answer")
        return super().__call__(samples)


def bright() -> Any:
    return Bright()


def letters() -> Any:
    return Letters()


def picture(folder: Path) -> DiffusionPolicy:
    family = StableDiffusion(build_pipeline(folder))
    return DiffusionPolicy(family, adapter=AdapterConfig(rank=2), sampler=SamplerConfig(steps=3, batch_size=4))


def text(critic: bool = False) -> LanguagePolicy:
    model, tokenizer = tiny_language_model()
    options = {"full": True, "critic": True} if critic else {"adapter": AdapterConfig(rank=2)}
    generation = GenerationConfig(max_new_tokens=6, batch_size=4)
    return LanguagePolicy(model, tokenizer, name="tiny", generation=generation, **options)  # type: ignore[arg-type]


def trainer(
    policy: Policy,
    source: Any,
    name: str,
    *,
    run: Run | None = None,
    beside: Source | None = None,
    credit: CreditConfig | None = None,
    own: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Trainer:
    """Batches of 3 samples: they do not divide by two."""
    settings: dict[str, Any] = {
        "epochs": 2, "samples_per_epoch": 12, "samples_per_prompt": 2, "batch_size": 3, "micro_batch_size": 2,
        "learning_rate": 1e-2,
    }  # fmt: skip
    return Trainer(
        policy, source, beside=beside, run=run, credit=credit, settings=TrainerConfig(**(settings | changes)),
        objective=ObjectiveConfig(name=name, **(own or {})),  # type: ignore[arg-type]
    )  # fmt: skip


def shown(folder: Path) -> Recorded:
    """Images that the base model made, read as recorded ones are."""
    rollout = picture(folder).rollout(SCENES * 3, range(9))
    return Recorded([Sample(s.prompt, image=s.image.copy() if s.image else None) for s in rollout.samples])


def labelled(folder: Path) -> Recorded:
    samples = shown(folder).samples
    scores = Brightness()(samples).total
    return Recorded(samples, [bool(score > scores.median()) for score in scores])


def walk(run: Run | None = None, **changes: Any) -> Trainer:
    target: Any = Target()
    return trainer(
        WalkPolicy(),
        Rollouts(target, PROMPTS),
        "ppo-clip",
        own={"clip_range": 0.2},
        run=run,
        **({"epochs": 3} | changes),
    )


SEVEN = {"samples_per_epoch": 7, "samples_per_prompt": 1, "batch_size": 7}
ONE = {"samples_per_epoch": 1, "samples_per_prompt": 1, "batch_size": 1}
CASES: dict[str, Callable[[Path], Trainer]] = {
    "walk ppo-clip": lambda folder: walk(credit=CreditConfig(rule="per-prompt", min_count=2)),
    "walk of one sample": lambda folder: trainer(
        WalkPolicy(), Recorded([Sample(PROMPTS[0], text="1.5")], modality="text"), "sft", **ONE
    ),
    "image ppo-clip": lambda folder: trainer(
        picture(folder), Rollouts(bright(), SCENES), "ppo-clip", beside=shown(folder), timestep_fraction=0.7,
        own={"kl_coefficient": 0.1, "ptx_coefficient": 0.5, "clip_range": 0.5},
    ),
    "image dpo": lambda folder: trainer(
        picture(folder), OnlinePairs(bright(), SCENES), "dpo", samples_per_prompt=4, epochs=3
    ),
    "image kto": lambda folder: trainer(picture(folder), labelled(folder), "kto", **SEVEN),
    "image sft": lambda folder: trainer(picture(folder), shown(folder), "sft", **SEVEN),
    "image best-of-n": lambda folder: trainer(
        picture(folder), BestOfN(bright(), SCENES, [0.5]), "sft", samples_per_prompt=4
    ),
    "image nft": lambda folder: trainer(picture(folder), Rollouts(bright(), SCENES), "nft"),
    "image draft": lambda folder: trainer(
        picture(folder), Rollouts(bright(), SCENES), "draft", own={"backprop_steps": 1}
    ),
    "text grpo": lambda folder: trainer(
        text(), Rollouts(letters(), LETTERS), "ppo-clip", samples_per_prompt=4, credit=CreditConfig(rule="group"),
        own={"kl_coefficient": 0.05},
    ),
    "text critic": lambda folder: trainer(
        text(critic=True), Rollouts(letters(), LETTERS), "ppo-clip", credit=CreditConfig(rule="gae"),
        learning_rate=1e-3,
    ),
}  # fmt: skip


def trained(job: Trainer) -> dict[str, Any]:
    """Trains to the end; what came of it."""
    seen: list[dict[str, float]] = []
    job.on_epoch = lambda _, epoch, metrics: seen.append(dict(metrics))
    before = {name: parameter.detach().clone() for name, parameter in job.parameters.items()}
    job.train()
    weights = {name: parameter.detach().clone() for name, parameter in job.parameters.items()}
    return {"weights": weights, "metrics": seen, "before": before, "updates": job.updates}


def raised(work: Callable[[], Any]) -> list[str]:
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def of_two_processes(folder: Path, own: Path) -> dict[str, Any]:
    """What only several processes can show."""
    rank = start().rank
    found: dict[str, Any] = {}
    counted = Counted()
    source: Any = Rollouts(counted, SCENES)
    trainer(picture(own), source, "ppo-clip").gather()
    found["scored"] = counted.asked
    broken: Any = Rollouts(BrokenElsewhere(), PROMPTS)
    found["broken"] = raised(trainer(WalkPolicy(), broken, "ppo-clip").train)
    apart = walk()
    if rank == 1:
        apart.parameters["mean"].data += 1
    found["apart"] = raised(apart.train)
    run = shared_run(folder / "interrupted")
    job = walk(run, checkpoint_every=100, epochs=9)

    def press(trainer: Trainer, epoch: int, metrics: object) -> None:
        if epoch == 2 and rank == 1:
            signal.raise_signal(signal.SIGINT)

    job.on_epoch = press
    found["interrupted"] = raised(job.train)
    found["checkpoints"] = [path.name for path in run.checkpoints()]
    run = shared_run(folder / "resumed")
    walk(run, epochs=2).train()
    again = walk(run)
    again.resume()
    found["resumed"], found["straight"] = trained(again), trained(walk())
    found["resumed metrics"] = run.metrics()
    found["evaluation"] = evaluated(own)
    run = shared_run(folder / "of-two")
    walk(run, epochs=2).train()
    run = Run(folder / "of-one")
    if run.path.is_dir():
        job = walk(run)
        job.resume()
        found["resumed from one"] = trained(job)
    return found


def evaluated(folder: Path) -> dict[str, Any]:
    """The evaluation of a policy that differs from its reference, on 6 samples in batches of 4."""
    policy = picture(folder)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.05)
    outcome = evaluate(policy, SCENES, bright(), seeds_per_prompt=2, processes=start())
    return {key: value for key, value in outcome.to_json().items() if key != "seconds"}


def shared_run(path: Path) -> Run:
    return start().first_then_all("run", lambda: Run(path) if path.exists() else Run.create(path, parse(CONFIG)))


def threads() -> list[str]:
    """The names of this process's threads, where the system tells them."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    crew = start()
    own = folder / f"pipeline-{crew.rank}"
    own.mkdir()
    found = {name: trained(case(own)) for name, case in CASES.items()} | of_two_processes(folder, own)
    found["threads"] = [threads()]
    crew.leave()
    found["threads"].append(threads())
    torch.save(found, folder / f"rank-{crew.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
