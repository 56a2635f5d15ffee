"""Networks that are on the device only while they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

LARGE = 2**30
"""Bytes. What is smaller stays on the device: moving it would cost more time than its memory is worth."""
OWN_MEMORY = ("cpu", "mps")
"""Devices whose memory is the machine's, so that leaving them would free nothing."""


class Visitors:
    """Networks that wait in main memory, and come to the device for as long as ``here`` is open.

    Where together they are small, or the device has no memory of its own, they stay on it.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.networks, self.device = networks, device
        self.stay = device.type in OWN_MEMORY or self.nbytes < LARGE
        self._move(device if self.stay else torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        """Memory of their weights."""
        return sum(p.numel() * p.element_size() for network in self.networks for p in network.parameters())

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside it they are on the device."""
        if self.stay:
            yield
            return
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for network in self.networks:
            network.to(device)
