"""What generators are aligned to. `load_reward` turns the name of a reward into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.siblings import refuse_strangers

if TYPE_CHECKING:
    from rewards.registry import load as load_reward

__all__ = ["load_reward"]

refuse_strangers()


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name != "load_reward":
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    from rewards.registry import load

    return load
