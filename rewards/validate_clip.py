"""How far ``embedded:clip`` can be trusted: ``python -m rewards.validate_clip [--model FOLDER] [--scenes 1000]``.

Prints, as Markdown, how often the right caption scores highest among all captions that are wrong about one thing only,
with 95 % Wilson intervals and what guessing would give, on scenes that training did not see.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

from diffalign.images import to_pil
from rewards import clip_scenes as world
from rewards.clip import ClipReward
from rewards.clip_scenes import Scenes, World

FIRST_SCENE = 5_000_000
"""Training takes its scenes from number 0 on."""


@dataclass
class Tally:
    """Right answers to one kind of question."""

    right: int = 0
    asked: int = 0
    guessed: float = 0.0
    """Right answers to expect from guessing."""

    def add(self, right: bool, choices: int) -> None:
        """Counts one question with this many possible answers."""
        self.right += right
        self.asked += 1
        self.guessed += 1 / choices

    def row(self) -> str:
        """The cells: share right, interval, number of questions, guessing."""
        interval = binomtest(self.right, self.asked).proportion_ci(method="wilson")
        share, guess = self.right / self.asked, self.guessed / self.asked
        return f"{share:.3f} | {interval.low:.3f} to {interval.high:.3f} | {self.asked} | {guess:.3f}"


def tally(clip: ClipReward, name: World, count: int) -> dict[str, Tally]:
    """Per topic, and for "any of 99 others", how often the right caption wins over every wrong one."""
    scenes = world.render(name, count, FIRST_SCENE)
    images = clip.encode_images(to_pil(scenes.images.float() / 255))
    found = {topic: Tally() for topic in world.TOPICS[name]}
    for image, (_, attributes) in zip(images, scenes.facts, strict=True):
        for topic, tallied in found.items():
            wrong = world.rivals(name, attributes, topic)
            if wrong:
                texts = clip.encode_texts([world.caption(name, facts) for facts in (attributes, *wrong)])
                tallied.add(_first_wins(texts @ image), len(texts))
    found["any of 99 others"] = _among_others(clip, scenes, images)
    return found


def _among_others(clip: ClipReward, scenes: Scenes, images: Tensor) -> Tally:
    captions = clip.encode_texts([world.caption(*fact) for fact in scenes.facts])
    found = Tally()
    for i, fact in enumerate(scenes.facts):
        true = {world.meaning(fact[0], truth) for truth in world.truths(*fact)}
        others = [j for j, other in enumerate(scenes.facts) if world.meaning(*other) not in true]
        chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(i))[:99].tolist()
        found.add(_first_wins(captions[[i, *(others[j] for j in chosen)]] @ images[i]), 1 + len(chosen))
    return found


def _first_wins(scores: Tensor) -> bool:
    return bool(scores[0] > scores[1:].max())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded:clip", help="as in clip?model=…")
    parser.add_argument("--scenes", type=int, default=1000, help="per world")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clip = ClipReward(given.model)
    print("| world | caption is wrong about | right | 95 % | n | guessing |\n|---|---|---|---|---|---|")
    for name in world.TOPICS:
        for topic, tallied in tally(clip, name, given.scenes).items():
            print(f"| {name} | {topic} | {tallied.row()} |", flush=True)


if __name__ == "__main__":
    main()
