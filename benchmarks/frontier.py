"""The reward-KL frontier: what DPO, PPO, GRPO and best-of-n gain, and how far from the base model they go for it.

``python -m benchmarks.frontier`` (or ``make bench-frontier``) judges pairs of the base model's texts by the gold reward
with Bradley-Terry noise, fits a reward model to them, trains every method of ``RUNS``, measures it along its run, and
writes ``benchmarks/results/frontier.json``, ``docs/images/frontier.png`` and the tables of ``benchmarks/frontier.md``.
What is complete in ``build/frontier`` is not done again.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks import frontier_page, frontier_proxy
from benchmarks.environment import ROOT, machine
from benchmarks.measuring import versions
from diffalign import preferences, prompts
from diffalign.config import (
    AdapterConfig,
    CreditConfig,
    GenerationConfig,
    ObjectiveConfig,
    PromptsConfig,
    TrainerConfig,
)  # fmt: skip
from diffalign.experience import RecordedPairs, Rollouts
from diffalign.runs import write_text
from diffalign.seeds import derive
from diffalign.trainer import Trainer
from diffalign.types import Preference, Prompt, Reward, Sample
from pipelines.language import LanguagePolicy
from pipelines.loading import load_policy
from rewards.registry import load as load_reward

MODEL = "embedded:findings-lm"
PROMPTS = PromptsConfig(source="findings", train=192, held_out=60)
EPOCHS = 16
AT = (1, 2, 4, 8, 12, 16)
"""Epochs after which a run is measured: 128 samples or pairs each."""
JUDGEMENTS, CHECKED, NOISE = 1024, 256, 0.05
"""Pairs to learn from, pairs that the fitted reward is checked on, and the judges' noise in units of the gold reward:
P(first) = sigmoid((gold of first - gold of second) / noise)."""
SEEDS = 4
"""Samples of each held-out prompt at each measurement."""
DRAWN = 64
"""Samples of each held-out prompt that best-of-n picks from."""

Report = dict[str, Any]
RUNS: Mapping[str, Mapping[str, Any]] = {
    "dpo-0.1": {"method": "DPO", "knob": 0.1},
    "ppo-0.02": {"method": "PPO on gold", "knob": 0.02},
    "ppo-fitted-0.005": {"method": "PPO on the fitted reward", "knob": 0.005},
    "dpo-0.03": {"method": "DPO", "knob": 0.03},
    "ppo-0.005": {"method": "PPO on gold", "knob": 0.005},
    "dpo-0.4": {"method": "DPO", "knob": 0.4},
    "ppo-fitted-0.02": {"method": "PPO on the fitted reward", "knob": 0.02},
    "ppo-0.08": {"method": "PPO on gold", "knob": 0.08},
    "grpo-0.02": {"method": "GRPO on gold", "knob": 0.02},
}
"""Knobs: DPO's beta, PPO's KL coefficient (nats, in the reward), GRPO's (in the loss). A beta of ``c / NOISE`` has the
optimum of PPO's coefficient ``c``: 0.1 and 0.005, 0.4 and 0.02."""


class Task:
    """What all methods share."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.train, self.held_out = prompts.load(PROMPTS, 0)
        self.gold: Reward = load_reward("findings-gold")
        self._known: dict[str, Any] = {}

    def policy(self, *, adapter: bool, critic: bool = False) -> LanguagePolicy:
        """The base model, with a LoRA to be trained or bare."""
        loaded = load_policy(
            MODEL, adapter=AdapterConfig(rank=16, alpha=16, targets="all") if adapter else None, critic=critic,
            generation=GenerationConfig(max_new_tokens=72, batch_size=128), device="cpu",
        )  # fmt: skip
        return cast(LanguagePolicy, loaded)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """``NAME.json``, made if it is missing."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            started, cpu = time.perf_counter(), time.process_time()
            made = make()
            spent = {"wall": time.perf_counter() - started, "processor": time.process_time() - cpu}
            write_text(path, json.dumps({"made": made, "seconds": spent}))
            print(f"{name}: {spent['wall']:.0f} s", flush=True)
        return json.loads(path.read_text())

    def pairs(self) -> list[Preference]:
        """Pairs of base samples of the training prompts, judged by gold with noise; the last are for checking."""
        path = self.folder / "pairs.parquet"
        if not path.is_file():
            count = JUDGEMENTS + CHECKED
            asked = [self.train[i % len(self.train)] for i in range(count) for _ in range(2)]
            samples = drawn(self.policy(adapter=False), asked, [derive(0, "pair", i) for i in range(2 * count)])
            gold = self.gold(samples).total.double().tolist()
            preferences.write(path, (judged(samples[i : i + 2], gold[i : i + 2], i) for i in range(0, 2 * count, 2)))
        if "pairs" not in self._known:
            table = preferences.Table(path)
            self._known["pairs"] = [table[i] for i in range(len(table))]
        found: list[Preference] = self._known["pairs"]
        return found

    def fitted(self) -> frontier_proxy.FittedReward:
        """The reward model that was fitted to the pairs."""
        if "fitted" in self._known:
            return cast(frontier_proxy.FittedReward, self._known["fitted"])
        base = self.policy(adapter=False)
        torch.manual_seed(0)
        trunk = copy.deepcopy(base.model.get_decoder()).requires_grad_(True)
        reward = frontier_proxy.FittedReward(trunk, base.tokenizer)
        path = self.folder / "fitted.safetensors"
        if not path.is_file():
            learned = self.pairs()[:JUDGEMENTS]
            frontier_proxy.fit(reward, learned)
            samples = [sample for pair in learned for sample in (pair.first, pair.second)]
            reward.calibrate(samples, self.gold(samples).total)
            frontier_proxy.save(reward, path)
        self._known["fitted"] = frontier_proxy.load(reward, path)
        return reward

    def proxy(self) -> Report:
        """How well the fitted reward orders pairs that it has not seen, and how well gold itself does."""
        unseen = self.pairs()[JUDGEMENTS:]
        ahead = self.gold([p.first for p in unseen]).total > self.gold([p.second for p in unseen]).total
        right = ahead == (torch.tensor([pair.label for pair in unseen]) > 0.5)
        return {"accuracy": frontier_proxy.accuracy(self.fitted(), unseen), "gold": float(right.float().mean())}

    def base(self) -> Report:
        """Rewards of ``DRAWN`` base samples of each held-out prompt, ``(prompts, DRAWN)`` each."""
        asked = [prompt for prompt in self.held_out for _ in range(DRAWN)]
        seeds = [derive(0, "base", prompt.key, k) for prompt in self.held_out for k in range(DRAWN)]
        samples = drawn(self.policy(adapter=False), asked, seeds)
        shape = (len(self.held_out), DRAWN)
        return {
            "gold": _rounded(self.gold(samples).total.reshape(shape)),
            "fitted": _rounded(self.fitted()(samples).total.reshape(shape)),
        }

    def trained(self, method: str, knob: float) -> list[Report]:
        """One run, measured after the epochs ``AT``."""
        policy = self.policy(adapter=True, critic=method.startswith("PPO"))
        trainer = self.trainer(policy, method, knob)
        points: list[Report] = []

        def measured(trainer: Trainer, epoch: int, metrics: Mapping[str, float]) -> None:
            if epoch in AT:
                points.append({"epoch": epoch} | self.point(policy))
                own = {name: float(np.mean(points[-1][name])) for name in ("gold", "kl", "fitted")}
                print(f"{method} {knob:g}, epoch {epoch}: {own}", flush=True)

        trainer.on_epoch = measured
        trainer.train()
        return points

    def trainer(self, policy: LanguagePolicy, method: str, knob: float) -> Trainer:
        """The training loop of a method; what is not said here is as in the recipes."""
        shared: dict[str, Any] = {"epochs": EPOCHS, "samples_per_epoch": 128, "schedule": "linear"}
        if method == "DPO":
            return Trainer(
                policy, RecordedPairs(self.pairs(), range(JUDGEMENTS), "text"),
                settings=TrainerConfig(**shared, batch_size=32, learning_rate=1e-3),
                objective=ObjectiveConfig(name="dpo", beta=knob, reduction="sum"),
            )  # fmt: skip
        reward = self.fitted() if method.endswith("fitted reward") else self.gold
        source = Rollouts(cast(Reward, reward), self.train)
        if method.startswith("GRPO"):
            return Trainer(
                policy, source,
                settings=TrainerConfig(**shared, samples_per_prompt=8, batch_size=64, learning_rate=2e-3),
                objective=ObjectiveConfig(
                    name="ppo-clip", aggregation="sample-mean", kl_coefficient=knob, reduction="sum"
                ),
                credit=CreditConfig(rule="group"),
            )  # fmt: skip
        critic = {"kl_coefficient": knob, "trace": 0.95, "missing_end_penalty": 1.0}
        return Trainer(
            policy, source,
            settings=TrainerConfig(**shared, batch_size=64, inner_epochs=2, learning_rate=2e-3),
            objective=ObjectiveConfig(name="ppo-clip", reduction="sum"),
            credit=CreditConfig.model_validate({"rule": "gae", "critic": critic}),
        )  # fmt: skip

    @torch.no_grad()
    def point(self, policy: LanguagePolicy) -> Report:
        """Means over the samples of each held-out prompt.

        ``kl`` is the KL to the base of a whole completion, in nats: the exact KL of the next token, over the whole
        vocabulary, summed along texts that the policy itself wrote. Its expectation is the KL of the two distributions
        over completions (the chain rule), so the mean is unbiased; its variance is below that of summed log-ratios.
        """
        asked = [prompt for prompt in self.held_out for _ in range(SEEDS)]
        seeds = [derive(0, "frontier", prompt.key, k) for prompt in self.held_out for k in range(SEEDS)]
        samples: list[Sample] = []
        drift: list[torch.Tensor] = []
        for i in range(0, len(asked), policy.batch_size):
            rollout = policy.rollout(asked[i : i + policy.batch_size], seeds[i : i + policy.batch_size])
            steps = torch.arange(rollout.mask.shape[1]).expand(len(rollout), -1)
            kl = policy.step_log_probs(rollout, steps, kl=True).kl
            assert kl is not None
            drift.append((kl * rollout.mask).sum(1))
            samples += rollout.samples
        found = {
            "gold": self.gold(samples).total,
            "fitted": self.fitted()(samples).total,
            "kl": torch.cat(drift),
            "tokens": torch.tensor([float(cast(int, sample.evidence["tokens"])) for sample in samples]),
        }
        return {name: _rounded(values.reshape(-1, SEEDS).mean(1)) for name, values in found.items()}


def judged(samples: Sequence[Sample], gold: Sequence[float], number: int) -> Preference:
    """A judgement with Bradley-Terry noise."""
    ahead = 1 / (1 + math.exp(-(gold[0] - gold[1]) / NOISE))
    label = float(np.random.default_rng(derive(0, "judgement", number)).random() < ahead)
    return Preference(samples[0].prompt, samples[0], samples[1], label, provenance={"judge": "findings-gold"})


def drawn(policy: LanguagePolicy, asked: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
    """One sample of each prompt."""
    size, found = policy.batch_size, list[Sample]()
    for i in range(0, len(asked), size):
        found += policy.rollout(asked[i : i + size], seeds[i : i + size]).samples
    return found


def _rounded(values: torch.Tensor) -> Any:
    return np.round(values.double().cpu().numpy(), 5).tolist()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=list(RUNS), metavar="RUN", default=list(RUNS), help="train only these")
    add("--threads", type=int, default=1)
    add("--folder", type=Path, default=ROOT / "build" / "frontier", help="where what is complete is kept")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "frontier.json")
    add("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    add("--picture", type=Path, default=ROOT / "docs" / "images" / "frontier.png")
    add("--page-only", action="store_true", help="tables and picture anew from the results in --out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, and writes results, picture and tables."""
    options = parse_arguments(arguments)
    if not options.page_only:
        torch.set_num_threads(options.threads)
        task = Task(options.folder)
        proxy, base = task.once("proxy", task.proxy), task.once("base", task.base)
        runs = []
        for name in options.only:
            run = RUNS[name]
            made = task.once(name, lambda run=run: task.trained(run["method"], run["knob"]))  # type: ignore[misc]
            runs.append({"name": name, **run, "points": made["made"], "seconds": made["seconds"]})
        results = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(options.threads),
            "versions": versions(),
            "judgements": {"pairs": JUDGEMENTS, "checked": CHECKED, "noise": NOISE},
            "proxy": proxy["made"],
            "base": base["made"],
            "runs": runs,
            "seconds": {
                clock: sum(piece["seconds"][clock] for piece in [proxy, base, *runs]) for clock in ("wall", "processor")
            },
        }
        write_text(options.out, json.dumps(results) + "\n")
    frontier_page.write(json.loads(options.out.read_text()), options.page, options.picture)


if __name__ == "__main__":
    main()
