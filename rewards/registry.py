"""From the name of a reward to the reward."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.errors import ConfigError, NotFoundError
from rewards.arguments import split, typed

if TYPE_CHECKING:
    from diffalign.types import Reward

REWARDS: dict[str, tuple[str, str]] = {
    "compressibility": (
        "rewards.jpeg:Compressibility",
        "minus the size of the image as a JPEG, in kB",
    ),
    "incompressibility": ("rewards.jpeg:Incompressibility", "the size of the image as a JPEG, in kB"),
    "clip": ("rewards.clip:ClipReward", "cosine of image and prompt by any open_clip model (model=, pretrained=)"),
    "emoji-checker": ("rewards.emoji_checker:EmojiChecker", "share of an emoji prompt's attributes that the image has"),
    "brain-mr-checker": (
        "rewards.brain_mr_checker:BrainMRChecker",
        "share of a brain-mr prompt's attributes that the image has",
    ),
    "findings-checker": (
        "rewards.findings_checker:FindingsChecker",
        "share of a findings prompt's facts that the text has, and nothing else",
    ),
    "findings-gold": (
        "rewards.findings_gold:FindingsGold",
        "a findings text that is consistent and easy to read, without getting longer",
    ),
    "readability": ("rewards.readability:Readability", "how easy a text is to read (measure=ease or grade)"),
    "length": ("rewards.text_rules:Length", "minus the words by which a text misses a length (target= or max=)"),
    "format": ("rewards.text_rules:Format", "whether a text has the form of a regular expression (pattern=)"),
    "sentiment": ("rewards.sentiment:Sentiment", "how positive a text sounds, by VADER (extra `text`)"),
    "profanity": ("rewards.sentiment:Profanity", "whether a text has a word of a list of profanities (extra `text`)"),
    "judge": (
        "rewards.judge:Judge",
        "a language model behind a chat endpoint that judges by principles (url=, model=, principles=)",
    ),
    "hidden-utility": ("rewards.rater:hidden_utility", "what simulated raters want, noise-free (rater=, criterion=)"),
    "preference": (
        "rewards.preference:PreferenceReward",
        "what people's choices taught; folder= is what `diffalign reward fit` wrote",
    ),
    "clinician": (
        "rewards.clinician:ClinicianReward",
        "the same, cautious: lower confidence bounds per criterion, NaN far from its data (folder=)",
    ),
    "language-reward": (
        "rewards.language_reward:LanguageReward",
        "a language model with a scalar head: what `diffalign reward fit` wrote of texts (folder=), or another's"
        " (model=)",
    ),
    "aesthetic": ("rewards.aesthetic:AestheticReward", "rating of the look of an image, LAION's (weights=, clip=)"),
    "pickscore": ("rewards.pickscore:PickScoreReward", "which image of a prompt people pick (model=)"),
    "hpsv2": ("rewards.hpsv2:HPSv2Reward", "Human Preference Score (version=2.0 or 2.1, weights=)"),
    "imagereward": ("rewards.imagereward:ImageReward", "ImageReward of image and prompt (weights=, tokenizer=)"),
    "biomedclip": ("rewards.biomedclip:BiomedClipReward", "cosine of a medical image and its text (model=)"),
    "xray-findings": (
        "rewards.xray:XrayFindings",
        "whether a chest X-ray has the findings of its prompt, and not those it rules out (weights=)",
    ),
    "mr-artefact": (
        "rewards.mr_artefacts:MRArtefact",
        "how free of motion artefacts an MR slice is, by a rater of others (`diffalign fetch mr-artefacts`)",
    ),
}
"""Per name: the class as ``module:attr``, and one line about it."""


def names() -> dict[str, str]:
    """Every reward that ``load`` knows by name, and one line about it."""
    return {name: line for name, (_, line) in REWARDS.items()}


def differentiable() -> list[str]:
    """The names of the rewards that have a gradient; it imports all of them."""
    return [name for name in REWARDS if hasattr(_class(name), "differentiable")]


def _class(name: str) -> type[Reward]:
    module, _, attribute = REWARDS[name][0].partition(":")
    found: type[Reward] = getattr(import_module(module), attribute)
    return found


def check(spec: str) -> None:
    """Raises ConfigError or NotFoundError for a name, an argument or a file that ``load`` would not find.

    It loads no weights, runs no code of users, and asks no server.
    """
    if spec.startswith(("http://", "https://")):
        return
    name, arguments = split(spec)
    if name in REWARDS:
        typed(_class(name), arguments, spec)
        return
    if ":" not in name:
        raise _unknown(spec, name)
    file = name.rpartition(":")[0]
    if file.endswith(".py") and not Path(file).expanduser().is_file():
        raise NotFoundError(f"there is no file {file}, which the reward {spec!r} names")


def parts(spec: str, reward: Reward) -> list[str] | None:
    """The names of the parts that a loaded reward gives; None where only its scores tell, as of a user's function."""
    return list(reward([]).parts) if split(spec)[0] in REWARDS else None


def load(spec: str | Callable[..., object]) -> Reward:
    """The reward that ``NAME``, ``NAME?arg=value&…``, ``path/to/file.py:attr``, ``module:attr`` or an address names;
    or one of a function of the caller's own, in any form that a file may have it.
    """
    if callable(spec):
        from rewards import custom

        return custom.of(spec)
    if spec.startswith(("http://", "https://")):
        from rewards import remote

        return remote.load(spec)
    name, arguments = split(spec)
    if name in REWARDS:
        kind = _class(name)
        return kind(**typed(kind, arguments, spec))
    if ":" in name:
        from rewards import custom

        return custom.load(name, arguments)
    raise _unknown(spec, name)


def _unknown(spec: str, name: str) -> ConfigError:
    if name.endswith(".py"):
        return ConfigError(f"{spec!r} names a file but no function in it; write {name}:FUNCTION")
    near = difflib.get_close_matches(name, REWARDS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return ConfigError(
        f"there is no reward {name!r}; {hint}There are {', '.join(REWARDS)}, and your own as path/to/file.py:attr"
    )
