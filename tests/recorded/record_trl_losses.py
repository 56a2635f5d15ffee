"""Records what TRL 0.23.1's own loss functions say, for ``tests/test_recorded_losses.py``.

Run it in an environment that has TRL and ``datasets``: ``PYTHON tests/recorded/record_trl_losses.py``. It calls the
methods of TRL's trainers on log-probabilities alone; no model is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import trl  # type: ignore[import-not-found,unused-ignore]
from trl import import_utils  # type: ignore[import-not-found,unused-ignore]

for name, value in vars(import_utils).items():
    if isinstance(value, tuple) and name.endswith("_available"):  # transformers 5 says (False, "N/A"), which is true
        setattr(import_utils, name, value[0])

from trl import DPOTrainer, KTOTrainer  # noqa: E402

NAMES = ("chosen", "rejected", "reference_chosen", "reference_rejected")
HERE = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda values: values)


def dpo(kind: str, beta: float, smoothing: float, given: dict[str, torch.Tensor]) -> dict[str, object]:
    """One case of TRL's ``dpo_loss``."""
    trainer = SimpleNamespace(
        accelerator=HERE, reference_free=False, f_divergence_type="reverse_kl", f_divergence_params=None, beta=beta,
        label_smoothing=smoothing,
    )  # fmt: skip
    leaves = {name: values.clone().requires_grad_(name in NAMES[:2]) for name, values in given.items()}
    losses, _, _ = DPOTrainer.dpo_loss(trainer, *(leaves[name] for name in NAMES), kind)
    losses.sum().backward()
    gradients = {name: leaves[name].grad.tolist() for name in NAMES[:2]}
    return {"kind": kind, "beta": beta, "noise": smoothing, "losses": losses.tolist(), "gradients": gradients}


def kto(beta: float, weights: tuple[float, float], given: dict[str, torch.Tensor]) -> dict[str, object]:
    """One case of TRL's ``kto_loss``; what is mismatched has gained 0.3 on the reference."""
    trainer = SimpleNamespace(
        accelerator=HERE, calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )  # fmt: skip
    chosen, rejected, reference_chosen, reference_rejected = (given[name] for name in NAMES)
    mismatched, reference = reference_chosen.roll(1) + 0.3, reference_chosen.roll(1)
    losses, _, _, baseline = KTOTrainer.kto_loss(
        trainer, chosen, rejected, mismatched, reference_chosen, reference_rejected, reference
    )
    return {
        "beta": beta, "weights": weights, "mismatched": mismatched.tolist(), "reference": reference.tolist(),
        "baseline": float(baseline), "losses": losses.tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    given = {name: 3 * torch.randn(16, generator=generator, dtype=torch.float64) - 20 for name in NAMES}
    cases = [
        dpo(kind, beta, smoothing, given)
        for kind, smoothing in (("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0))
        for beta in (0.1, 1.0)
    ]
    recorded = {
        "trl": trl.__version__,
        "given": {name: values.tolist() for name, values in given.items()},
        "dpo": cases,
        "kto": [kto(beta, weights, given) for beta in (0.1, 1.0) for weights in ((1.0, 1.0), (1.3, 0.7))],
    }
    Path(__file__).with_name("trl_losses.json").write_text(json.dumps(recorded, indent=1) + "\n")
