"""The preference losses equal those of TRL's own trainers, as recorded by ``recorded/record_trl_losses.py``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.objectives import preference

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded" / "trl_losses.json").read_text())
GIVEN = {name: torch.tensor(values, dtype=torch.float64) for name, values in RECORDED["given"].items()}
LOSSES = {
    ("sigmoid", 0.0): preference.dpo,
    ("sigmoid", 0.2): partial(preference.dpo, label_smoothing=0.2),
    ("robust", 0.2): partial(preference.robust_dpo, flip_probability=0.2),
    ("hinge", 0.0): preference.hinge,
    ("ipo", 0.0): preference.ipo,
}


@pytest.mark.parametrize("case", RECORDED["dpo"], ids=lambda case: f"{case['kind']}-{case['beta']}-{case['noise']}")
@pytest.mark.parametrize("swapped", [False, True])
def test_pairwise_losses_and_gradients(case: dict[str, Any], swapped: bool) -> None:
    """Either side may be the winner: for a label of 0 the second is what TRL calls chosen."""
    chosen, rejected = (GIVEN[name].clone().requires_grad_() for name in ("chosen", "rejected"))
    sides = [(chosen, GIVEN["reference_chosen"]), (rejected, GIVEN["reference_rejected"])]
    (first, reference_first), (second, reference_second) = reversed(sides) if swapped else sides
    label = torch.full_like(chosen.detach(), 0.0 if swapped else 1.0)
    loss, _ = LOSSES[case["kind"], case["noise"]](
        first, second, reference_first, reference_second, label, beta=case["beta"]
    )
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(case["losses"], dtype=torch.float64))
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        torch.testing.assert_close(side.grad, torch.tensor(case["gradients"][name], dtype=torch.float64))


@pytest.mark.parametrize("case", RECORDED["kto"], ids=lambda case: f"{case['beta']}-{case['weights']}")
def test_kto(case: dict[str, Any]) -> None:
    baseline = preference.kto_baseline(
        *(torch.tensor(case[name], dtype=torch.float64) for name in ("mismatched", "reference"))
    )
    assert float(baseline) == pytest.approx(case["baseline"]) and case["baseline"] > 0
    loss, _ = preference.kto(
        torch.cat([GIVEN["chosen"], GIVEN["rejected"]]),
        torch.cat([GIVEN["reference_chosen"], GIVEN["reference_rejected"]]),
        torch.arange(32) < 16,
        baseline,
        beta=case["beta"],
        desirable_weight=case["weights"][0],
        undesirable_weight=case["weights"][1],
    )
    torch.testing.assert_close(loss, torch.tensor(case["losses"], dtype=torch.float64))
