"""Weights of another time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffalign.errors import ConfigError
from diffalign.shadow import Shadow


def parameters(*values: float) -> dict[str, nn.Parameter]:
    return {f"p{i}": nn.Parameter(torch.tensor([value])) for i, value in enumerate(values)}


def test_inside_it_the_parameters_are_the_remembered_ones() -> None:
    live = parameters(1.0, 2.0)
    shadow = Shadow(live)
    with torch.no_grad():
        live["p0"].add_(5)
    assert not shadow.matches()
    with shadow():
        assert live["p0"].item() == 1.0 and shadow.weights["p0"].item() == 6.0
    assert live["p0"].item() == 6.0 and shadow.weights["p0"].item() == 1.0
    with pytest.raises(RuntimeError), shadow():
        raise RuntimeError
    assert live["p0"].item() == 6.0
    shadow.update()
    assert shadow.matches()


def test_exponential_decay_by_hand() -> None:
    """1, then 0.75 * 1 + 0.25 * 5 = 2, then 0.75 * 2 + 0.25 * 5 = 2.75."""
    live = parameters(1.0)
    shadow = Shadow(live)
    with torch.no_grad():
        live["p0"].fill_(5)
    shadow.update(0.75)
    assert shadow.weights["p0"].item() == 2.0
    shadow.update(0.75)
    assert shadow.weights["p0"].item() == 2.75


def test_a_graph_made_before_the_exchange_is_gone_back_through_after_it() -> None:
    """y = w x with w = 3 and x = 2: dy/dw = 2 and dy/dx = 3, whatever was remembered in between."""
    live = parameters(3.0)
    shadow = Shadow(live)
    shadow.weights["p0"].fill_(100)
    x = torch.tensor([2.0], requires_grad=True)
    y = live["p0"] * x
    with shadow(), torch.no_grad():
        assert (live["p0"] * x).item() == 200
    y.backward()
    assert live["p0"].grad is not None and x.grad is not None
    assert live["p0"].grad.item() == 2 and x.grad.item() == 3


def test_its_state_comes_back_and_another_models_is_refused() -> None:
    live = parameters(1.0, 2.0)
    shadow = Shadow(live)
    with torch.no_grad():
        live["p1"].fill_(9)
    other = Shadow(live)
    other.load_state_dict(shadow.state_dict())
    assert other.weights["p1"].item() == 2.0
    with pytest.raises(ConfigError, match="another model or adapter"):
        other.load_state_dict(Shadow(parameters(1.0)).state_dict())
