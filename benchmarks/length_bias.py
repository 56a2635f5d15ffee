"""The pairs of docs/length-bias.md: what the asset ``alpaca-eval`` says by majority, and how often the longer wins.

    diffalign fetch alpaca-eval
    python -m benchmarks.length_bias pairs.parquet
    diffalign reward fit text-preference --set preferences=pairs.parquet --set length=controlled ...
    python -m benchmarks.length_bias pairs.parquet --measure runs/text-preference/reward

Different judges saw many of the same pairs, some of them several times and in both orders. A pair is kept once, with
the side that more judgements prefer; one that they are divided about is left out.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign import assets, preferences
from diffalign.looks import words
from diffalign.prompts import plain
from diffalign.seeds import derive
from diffalign.types import Preference, Prompt, Sample
from rewards.language_reward import LanguageReward
from rewards.text_rules import words as rule_words

EACH = 6
"""Pairs of one prompt at most: pairs of other prompts say more."""
Pair = tuple[str, str, str]
"""Prompt and two texts, in the order of the alphabet: which one stands first says nothing."""


def majorities(path: Path) -> tuple[int, dict[Pair, float]]:
    """How many judgements there are, and the share of them that prefers the first text, per pair."""
    votes: dict[Pair, list[float]] = defaultdict(list)
    count = 0
    for item in preferences.read(path):
        if isinstance(item, Preference):
            first, second = item.first.text or "", item.second.text or ""
            swapped = first > second
            pair = (item.prompt.text, *((second, first) if swapped else (first, second)))
            votes[pair].append(1 - item.label if swapped else item.label)
            count += 1
    return count, {pair: sum(own) / len(own) for pair, own in votes.items()}


def longer_wins(shares: Mapping[Pair, float]) -> float:
    """The share of decided pairs in which the text of more words is preferred; equally long ones count a half."""
    found = []
    for (_, first, second), share in shares.items():
        difference = len(words(first)) - len(words(second))
        found.append(0.5 if difference == 0 else float((difference > 0) == (share > 0.5)))
    return sum(found) / len(found)


def chosen(shares: Mapping[Pair, float], count: int, most: int, seed: int) -> dict[Pair, float]:
    """So many pairs, drawn by ``seed``, of which no text and no prompt has more words, and few are of one prompt."""
    found: dict[Pair, float] = {}
    taken: Counter[str] = Counter()
    for pair in sorted(shares, key=lambda pair: derive(seed, *pair)):
        if len(found) == count:
            break
        if taken[pair[0]] < EACH and all(len(words(text)) <= most for text in pair):
            taken[pair[0]] += 1
            found[pair] = shares[pair]
    return found


def apart(shares: Mapping[Pair, float], path: Path) -> dict[Pair, float]:
    """The pairs of instructions that no pair of this file has."""
    known = {plain(prompt.text) for prompt in preferences.Table(path).prompts()}
    return {pair: share for pair, share in shares.items() if plain(pair[0]) not in known}


@dataclass(frozen=True)
class Judged:
    """Differences of scores, first minus second, beside what was preferred and how much longer the first is."""

    difference: Tensor
    answer: Tensor
    """1 where the first is preferred, else -1."""
    gap: Tensor
    """Of ``log(1 + words)``."""

    def row(self, name: str) -> str:
        """A row of the table: accuracy with its 95 % interval, that of either preference, correlation with length."""
        right = (self.difference * self.answer > 0).double() + 0.5 * (self.difference == 0).double()
        draws = torch.randint(len(right), (2000, len(right)), generator=torch.Generator().manual_seed(0))
        low, high = right[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        sides = [right[self.answer * self.gap * side > 0].mean() for side in (1, -1)]
        towards = (self.difference * self.gap).sum() / (self.difference.norm() * self.gap.norm())
        shown = f"{right.mean():.1%} ({low:.1%} to {high:.1%}) | {sides[0]:.1%} | {sides[1]:.1%} | {towards:+.2f}"
        return f"| {name} | {shown} |"


def judged(folder: Path, shares: Mapping[Pair, float]) -> tuple[Judged, float]:
    """What a fitted reward model says of these pairs, with length as it was learned, and what it takes off for it."""
    reward = LanguageReward(folder=str(folder))
    samples = [Sample(Prompt(prompt), text=text) for prompt, *texts in shares for text in texts]
    # Words as this reward counts them.
    size = torch.tensor([math.log1p(rule_words(sample.text or "")) for sample in samples]).double().view(-1, 2)
    total = reward(samples).total.double().view(-1, 2)
    taken = reward.header.length_coefficient if reward.header else 0.0
    kept = total.isfinite().all(1)
    answer = torch.tensor([1.0 if share > 0.5 else -1.0 for share in shares.values()]).double()
    learned, gap = (total + taken * size)[kept].diff(dim=1)[:, 0], size[kept].diff(dim=1)[:, 0]
    return Judged(-learned, answer[kept], -gap), taken


def tabulate(folder: Path, shares: Mapping[Pair, float]) -> str:
    """The table of the page."""
    free, taken = judged(folder, shares)
    controlled = replace(free, difference=free.difference - taken * free.gap)
    longer = replace(free, difference=free.gap)
    return "\n".join(
        [
            f"{len(free.answer)} pairs; {taken:+.3f} standard deviations for each unit of log(1 + words) are taken off",
            "| judge | accuracy | the longer preferred | the shorter preferred | correlation with length |",
            "|---|---|---|---|---|",
            longer.row("the longer text"),
            free.row("fitted, `length: free`"),
            controlled.row("fitted, `length: controlled`"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where the pairs are written, or with --measure were")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="a reward model that was fitted to PATH")
    parser.add_argument("--pairs", type=int, default=1200)
    parser.add_argument("--words", type=int, default=60, help="most words of a prompt or text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count, shares = majorities(assets.file("alpaca-eval", "preferences.parquet"))
    decided = {pair: share for pair, share in shares.items() if share != 0.5}
    if args.measure:
        print(tabulate(args.measure, chosen(apart(decided, args.path), args.pairs, args.words, args.seed)))
        return
    print(f"{count} judgements of {len(shares)} pairs, of which {len(decided)} are decided")
    print(f"the longer wins {longer_wins(decided):.3f} of these")
    kept = chosen(decided, args.pairs, args.words, args.seed)

    def rows() -> Iterator[Preference]:
        for (text, first, second), share in kept.items():
            prompt = Prompt(text)
            yield Preference(prompt, Sample(prompt, text=first), Sample(prompt, text=second), float(share > 0.5))

    preferences.write(args.path, rows())
    instructions = len({pair[0] for pair in kept})
    print(f"{len(kept)} pairs of {instructions} instructions in {args.path}; the longer wins {longer_wins(kept):.3f}")


if __name__ == "__main__":
    main()
