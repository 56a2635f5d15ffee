"""Every random draw comes from a seed that is derived from names, never from the state of a global generator.

That is what makes a run repeatable, resumable at any epoch, and independent of batch size and worker count.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: object) -> int:
    """A seed in ``[0, 2**63)`` for one purpose, such as ``derive(7, "sample", epoch, index)``."""
    text = "\x1f".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in the random order that the seed stands for."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
