"""From the name of a reward to the reward."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from diffalign.errors import ConfigError
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
}
"""Per name: the class as ``module:attr``, and one line about it."""

_LATER = ("aesthetic", "clinician", "preference")


def names() -> dict[str, str]:
    """Every reward that ``load`` knows by name, and one line about it."""
    return {name: line for name, (_, line) in REWARDS.items()}


def load(spec: str) -> Reward:
    """The reward that ``NAME``, ``NAME?arg=value&…``, ``path/to/file.py:attr`` or ``module:attr`` names."""
    if spec.startswith(("http://", "https://")):
        raise ConfigError(f"the reward {spec!r} is not available in this version: there are no remote rewards yet")
    name, arguments = split(spec)
    if name in _LATER:
        raise ConfigError(f"the reward {name!r} is not available in this version; there are {', '.join(REWARDS)}")
    if name in REWARDS:
        module, _, attribute = REWARDS[name][0].partition(":")
        kind: type[Reward] = getattr(import_module(module), attribute)
        return kind(**typed(kind, arguments, spec))
    if ":" in name:
        from rewards import custom

        return custom.load(name, arguments)
    if name.endswith(".py"):
        raise ConfigError(f"{spec!r} names a file but no function in it; write {name}:FUNCTION")
    near = difflib.get_close_matches(name, REWARDS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"there is no reward {name!r}; {hint}There are {', '.join(REWARDS)}, and your own as path/to/file.py:attr"
    )
