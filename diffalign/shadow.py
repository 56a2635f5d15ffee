"""The weights of another time: a copy of the trained parameters that can take their place for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from diffalign.errors import ConfigError


class Shadow:
    """A copy of some parameters, of a LoRA as of a whole model: one more copy in memory, and no second model.

    It stays as it was made until it is updated.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = dict(parameters)
        self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, decay: float = 0.0) -> None:
        """``decay`` times what it was, and the rest of what the parameters are now; 0 copies them exactly."""
        for name, parameter in self.parameters.items():
            if decay == 0:
                self.weights[name].copy_(parameter)
            else:
                self.weights[name].lerp_(parameter, 1 - decay)

    def matches(self) -> bool:
        """Whether the parameters are, bit for bit, what this remembers."""
        return all(torch.equal(self.weights[name], parameter) for name, parameter in self.parameters.items())

    def exchange(self) -> None:
        """The parameters become what was remembered, and the memory what they were. Twice is as if never.

        The two change places without a copy, so a graph that was made before can still be gone back through after.
        """
        for name, parameter in self.parameters.items():
            self.weights[name], parameter.data = parameter.data, self.weights[name]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside it the parameters are the remembered ones. Nothing is to be trained or updated there."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """The remembered weights, by name, on the CPU."""
        return {name: weights.cpu() for name, weights in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes a state of ``state_dict``. Raises ConfigError if it belongs to other parameters."""
        if state.keys() != self.weights.keys() or any(
            state[name].shape != weights.shape for name, weights in self.weights.items()
        ):
            raise ConfigError("the checkpoint belongs to another model or adapter than the configuration names")
        for name, weights in self.weights.items():
            weights.copy_(state[name])
