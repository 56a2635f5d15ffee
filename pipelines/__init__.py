"""What is aligned: policies over diffusion models. `load_policy` turns the name of a model into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.siblings import refuse_strangers

if TYPE_CHECKING:
    from pipelines.loading import load_policy

__all__ = ["load_policy"]

refuse_strangers()


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name != "load_policy":
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    from pipelines.loading import load_policy

    return load_policy
