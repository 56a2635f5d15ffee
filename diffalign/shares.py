"""Work divided among the processes of a run, so that each of them has the whole result: samples, scores, answers.

Shape legend: ``B`` samples of a batch, ``N`` of all, ``S`` steps, ``n`` rows of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.processes import Processes
from diffalign.types import Policy, Prompt, Reward, Rollout, Sample, Scores

Packed = dict[str, Any]
"""A rollout without its prompts and seeds, which every process knows, as plain data."""
Batch = tuple[Sequence[Prompt], Sequence[int]]


def joined(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of several."""
    return Rollout(
        samples=tuple(sample for part in parts for sample in part.samples),
        log_probs=torch.cat([part.log_probs for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        state={name: torch.cat([part.state[name] for part in parts]) for name in parts[0].state},
    )


def packed(policy: Policy, rollout: Rollout) -> Packed:
    """What another process needs to have the same rollout, and to know what the policy knows of its samples."""
    samples = rollout.samples
    known: Callable[[Sequence[Sample]], dict[str, Tensor]] | None = getattr(policy, "known", None)
    pictures = [None if s.image is None else torch.from_numpy(np.array(s.image.convert("RGB"))) for s in samples]
    return {
        "images": pictures,
        "texts": [sample.text for sample in samples],
        "evidence": [dict(sample.evidence) for sample in samples],
        "log_probs": _kept(rollout.log_probs),
        "mask": _kept(rollout.mask),
        "state": {name: _kept(tensor) for name, tensor in rollout.state.items()},
        "known": {} if known is None else known(samples),
    }


def unpacked(data: Packed, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
    """The rollout of another process, on the CPU."""
    pictures = [None if pixels is None else Image.fromarray(pixels.numpy()) for pixels in data["images"]]
    parts = zip(prompts, pictures, data["texts"], seeds, data["evidence"], strict=True)
    return Rollout(tuple(Sample(*part) for part in parts), data["log_probs"], data["mask"], data["state"])


def _kept(tensor: Tensor) -> Tensor:
    """By itself on the CPU: a part of a larger tensor would travel with all of it."""
    return tensor.detach().cpu().clone()


def together(
    processes: Processes,
    policy: Policy,
    own: Mapping[int, Rollout],
    batches: Sequence[Batch],
    found: Sequence[Mapping[int, Packed]],
) -> list[Rollout]:
    """The rollouts of all batches, of which ``own`` are this process's and ``found`` what each process has sent.

    Where there are several processes they are on the CPU. What a policy knows of its samples beside them (``known``,
    such as the latents that an image was decoded from), the others' learn (``adopt``).
    """
    if processes.count == 1:
        return [own[number] for number in range(len(batches))]
    sent = {number: data for each in found for number, data in each.items()}
    parts = []
    for number, (prompts, seeds) in enumerate(batches):
        if number in own:
            mine = own[number]
            state = {name: tensor.cpu() for name, tensor in mine.state.items()}
            parts.append(Rollout(mine.samples, mine.log_probs.cpu(), mine.mask.cpu(), state))
            continue
        parts.append(unpacked(sent[number], prompts, seeds))
        if sent[number]["known"]:
            cast(Any, policy).adopt(parts[-1].samples, sent[number]["known"])
    return parts


def sendable(processes: Processes, policy: Policy, own: Mapping[int, Rollout]) -> dict[int, Packed]:
    """Rollouts by number, packed where there is anybody to send them to."""
    return {number: packed(policy, rollout) for number, rollout in own.items()} if processes.count > 1 else {}


def divided(prompts: Sequence[Prompt], seeds: Sequence[int], size: int) -> list[Batch]:
    """Batches of at most ``size``."""
    return [(prompts[i : i + size], seeds[i : i + size]) for i in range(0, len(prompts), size)]


def samples_alone(policy: Policy) -> AbstractContextManager[None]:
    """For samples that will not be replayed: inside it a policy may sample in a way that takes less time, where it has
    one (``merged``), and its log-probabilities are those of a replay to rounding only.
    """
    merged: Callable[[], AbstractContextManager[None]] | None = getattr(policy, "merged", None)
    return nullcontext() if merged is None else merged()


def scores(processes: Processes, reward: Reward, samples: Sequence[Sample]) -> Scores:
    """Scores ``(N,)`` of samples that every process has; each asks the reward about its share."""
    if processes.count == 1:
        return reward(samples)
    size = -(-len(samples) // processes.count)
    share = samples[processes.rank * size : (processes.rank + 1) * size]
    own = reward(share) if share else Scores(torch.zeros(0))
    return _joined_scores(processes.exchange("scores", _plain(own)))


def scores_of_batches(processes: Processes, own: Mapping[int, Scores]) -> Scores:
    """Scores ``(N,)`` of all batches, in their order, of which ``own`` are those that this process asked about."""
    found = processes.exchange("scores", {number: _plain(scores) for number, scores in own.items()})
    sent = {number: scores for each in found for number, scores in each.items()}
    return _joined_scores([sent[number] for number in sorted(sent)])


def _plain(scores: Scores) -> Packed:
    return {"total": _kept(scores.total), "parts": {name: _kept(part) for name, part in scores.parts.items()}}


def _joined_scores(found: Sequence[Packed]) -> Scores:
    """One after the other; a part that some do not have is NaN there."""
    names = list(dict.fromkeys(name for each in found for name in each["parts"]))
    missing = [torch.full_like(each["total"], math.nan) for each in found]
    parts = {
        name: torch.cat([each["parts"].get(name, none) for each, none in zip(found, missing, strict=True)])
        for name in names
    }
    return Scores(torch.cat([each["total"] for each in found]), parts)


def answers(
    processes: Processes,
    own: Sequence[Mapping[str, Tensor]],
    count: int,
    device: torch.device,
    beside: float | None = None,
) -> tuple[dict[str, Tensor], float | None]:
    """What a loss is a function of for all ``count`` rows, in their order, and the sum of what is ``beside``.

    ``own`` are the answers, in chunks and without gradient, about the rows ``processes.own(count)``.
    """
    mine = {name: torch.cat([each[name] for each in own]) for name in (own[0] if own else ())}
    if processes.count == 1:
        return mine, beside
    found = processes.exchange("answers", [{name: _kept(values) for name, values in mine.items()}, beside])
    asked = [rank for rank, (each, _) in enumerate(found) if each]
    order = torch.cat([torch.arange(rank, count, processes.count) for rank in asked]).argsort()
    whole = {name: torch.cat([found[rank][0][name] for rank in asked])[order].to(device) for name in found[asked[0]][0]}
    return whole, None if beside is None else sum(each for _, each in found)


def rollouts(
    processes: Processes,
    policy: Policy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """A sample of each prompt and seed, in the batches of one process, which the processes deal out among them.

    They are for looking at, and not replayed: see ``samples_alone``.
    """
    batches, own = divided(prompts, seeds, policy.batch_size), {}
    for number in processes.own(len(batches)).tolist():
        with samples_alone(policy):
            own[number] = policy.rollout(*batches[number])
        progress(min((number + 1) * policy.batch_size, len(prompts)))
    found = processes.exchange("rollouts", sendable(processes, policy, own))
    return together(processes, policy, own, batches, found)
