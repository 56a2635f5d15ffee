"""Records what TRL's own text losses say, for ``tests/test_recorded_text_losses.py``.

Two versions are asked: 1.16.0 (GRPO, RLOO, DPO, KTO, reward model), and 0.11.4, the last with PPO as functions. They
cannot live in one environment, so install each, and once what they import, into folders of their own outside the
repository, and run this file once with each::

    pip install --no-deps --target NEW trl==1.16.0
    pip install --no-deps --target OLD trl==0.11.4
    pip install --no-deps --target BESIDE datasets tyro jinja2 pyarrow pandas dill multiprocess xxhash fsspec \\
        docstring_parser typeguard shtab rich
    PYTHONPATH=NEW:BESIDE python tests/recorded/record_trl_text_losses.py
    PYTHONPATH=OLD:BESIDE python tests/recorded/record_trl_text_losses.py

Each run writes its own part of ``trl_text_losses.json`` and keeps the other's. It calls the methods of TRL's trainers
on instances that were made without ``__init__`` and have the few attributes that the methods read; in place of a model
stands a table of random log-probabilities, so that every gradient is one with respect to these. All is float64.
"""

from __future__ import annotations

import json
import platform
import re
from collections import defaultdict
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

Values = dict[str, Any]
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS, EACH = 5, 4
"""Of the advantages: prompts, and the completions of each."""


def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers of four decimals, so that the file holds exactly what TRL was given."""
    drawn = scale * torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) + shift
    return torch.tensor([round(value, 4) for value in drawn.flatten().tolist()], dtype=torch.float64).reshape(shape)


def ends(lengths: list[int], width: int) -> Tensor:
    """int64: 1 for the first ``lengths`` tokens of each row, 0 for the padding behind them."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def without_init(kind: type, **attributes: object) -> Any:
    """An instance of a trainer that was never initialised."""
    trainer = object.__new__(kind)
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def plain(values: Values) -> Values:
    """Tensors as lists."""
    return {name: each.tolist() if isinstance(each, Tensor) else each for name, each in values.items()}


# -- TRL 1.16.0 --------------------------------------------------------------------------------------------------------


def accelerator() -> SimpleNamespace:
    """One process, on the CPU."""
    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, gather=lambda values: values,
        gather_for_metrics=lambda values: values, reduce=lambda values, reduction: values,
    )  # fmt: skip


def shared() -> Values:
    """What every trainer of 1.16.0 reads."""
    return {
        "accelerator": accelerator(), "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "_metrics": {"train": defaultdict(list)}, "aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip


def grpo_loss(kind: str, given: Values, rows: slice = slice(None), **differing: Any) -> Values:
    """One case of ``GRPOTrainer._compute_loss`` on ``rows``, with the gradient with respect to their tokens."""
    from trl import GRPOTrainer

    case = {
        "beta": 0.0, "low": 0.2, "high": 0.2, "first": False, "longest": given["mask"].shape[1] + 3,
        "accumulated": 1, "per_generation": 1, **differing,
    }  # fmt: skip
    leaf = given["log_probs"][rows].clone().requires_grad_()
    trainer = without_init(
        GRPOTrainer, **shared(), loss_type=kind, beta=case["beta"], epsilon_low=case["low"],
        epsilon_high=case["high"], importance_sampling_level="token", top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, max_completion_length=case["longest"],
        current_gradient_accumulation_steps=case["accumulated"], _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=case["per_generation"]),
        _get_per_token_logps_and_entropies=lambda *about, **more: (leaf, torch.zeros_like(leaf), None),
    )  # fmt: skip
    mask = given["mask"][rows]
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": given["advantages"][rows], "ref_per_token_logps": given["reference"][rows],
        "num_items_in_batch": given["mask"].sum(),
    }  # fmt: skip
    if not case["first"]:
        inputs["old_per_token_logps"] = given["old_log_probs"][rows]
    loss = trainer._compute_loss(None, inputs)
    loss.backward()
    assert leaf.grad is not None
    return {"kind": kind, **case, "rows": [rows.start, rows.stop], "loss": loss.item(), "gradient": leaf.grad.tolist()}


def grpo() -> Values:
    """Token losses of six completions: one that was not better than others, and one that is masked as a whole."""
    log_probs = random(6, 6, scale=0.5, shift=-1.5)
    given = {
        "log_probs": log_probs, "old_log_probs": log_probs + random(6, 6, scale=0.3),
        "reference": log_probs + random(6, 6, scale=0.4), "mask": ends([6, 3, 1, 5, 0, 4], 6),
        "advantages": torch.tensor([1.2, -0.7, 0.4, 0.0, 0.9, -1.6], dtype=torch.float64),
    }  # fmt: skip
    given = {name: values.double().round(decimals=4) if name != "mask" else values for name, values in given.items()}
    wholes = [
        grpo_loss(kind, given, **more)
        for kind in ("grpo", "bnpo", "dr_grpo", "dapo")
        for more in ({}, {"beta": 0.04, "high": 0.28})
    ]
    wholes.append(grpo_loss("grpo", given, first=True, beta=0.04))
    halves, first = [slice(0, 3), slice(3, 6)], slice(0, 3)
    return {
        "given": plain(given),
        "wholes": wholes,
        "micro_batches": [
            [grpo_loss(kind, given, rows, accumulated=2, per_generation=2, beta=0.04) for rows in halves]
            for kind in ("grpo", "bnpo", "dr_grpo", "dapo")
        ],
        "one_update_of_two": grpo_loss("dapo", given, first, accumulated=1, per_generation=2),
    }


def rewards() -> Tensor:
    """Of five prompts: ordinary, one failed judgement, one that did not fail, all the same, all failed."""
    given = random(PROMPTS, EACH, scale=2.0, shift=1.0)
    given[1, 2] = torch.nan
    given[2, 1:] = torch.nan
    given[3] = given[3, 0]
    given[4] = torch.nan
    return given.flatten()


def scored(kind: type, given: Tensor, lengths: list[int], tables: tuple[Tensor, Tensor], **own: object) -> Tensor:
    """The advantages that ``_generate_and_score_completions`` gives to rewards."""
    new = kind.__name__ == "GRPOTrainer"
    tokens = [list(range(1, length + 1)) for length in lengths]
    texts = ["a"] * len(tokens)
    generated = ([[1]] * len(tokens), tokens, None, texts, None, {}, None, None) if new else ([[1]] * 20, tokens, texts)
    policy, reference = tables
    trainer = without_init(
        kind, **shared(), environment_factories=None, environments=None, tools=[], ref_model=SimpleNamespace(),
        _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None, mask_truncated_completions=False,
        num_iterations=1, use_vllm=False, num_generations=EACH, log_multimodal=False, reward_clip_range=None,
        reward_weights=torch.ones(1), reward_funcs=[None], reward_func_names=["reward"],
        multi_objective_aggregation="sum_then_normalize", _pending_extra_logs={}, _pending_metrics={},
        args=SimpleNamespace(
            steps_per_generation=1, gradient_accumulation_steps=1, per_device_train_batch_size=len(tokens),
            gradient_checkpointing_kwargs=None,
        ),
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *about: given.clone()[:, None],
        **own,
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda model, *about, **more: (
        policy if model is trainer.model else reference, None, None,
    )  # fmt: skip
    advantages: Tensor = trainer._generate_and_score_completions([{"prompt": "p"}] * len(tokens))["advantages"]
    return advantages


def group_advantages() -> Values:
    """What GRPO and RLOO make of the same rewards."""
    from trl import GRPOTrainer, RLOOTrainer

    given = rewards()
    lengths = [1 + (3 * i) % 5 for i in range(len(given))]
    tables = random(len(given), max(lengths), shift=-1.5), random(len(given), max(lengths), shift=-1.5)
    mask = ends(lengths, max(lengths))
    return plain(
        {
            "rewards": [value if isfinite(value) else None for value in given.tolist()],
            "keys": [f"prompt {i // EACH}" for i in range(len(given))],
            "mask": mask,
            "log_probs": tables[0] * mask,
            "reference": tables[1] * mask,
            "kl_weight": 0.05,
            "group": scored(GRPOTrainer, given, lengths, tables, beta=0.0, scale_rewards="group"),
            "none": scored(GRPOTrainer, given, lengths, tables, beta=0.0, scale_rewards="none"),
            "rloo": scored(RLOOTrainer, given, lengths, tables, beta=0.0, normalize_advantages=False),
            "rloo_with_kl": scored(RLOOTrainer, given, lengths, tables, beta=0.05, normalize_advantages=False),
        }
    )


def rloo_loss() -> Values:
    """``RLOOTrainer._compute_loss``: one ratio for a whole completion."""
    from trl import RLOOTrainer

    mask, leaf = ends([5, 2, 1, 4], 5), random(4, 5, scale=0.5, shift=-1.5).requires_grad_()
    old, advantages = (leaf.detach() + random(4, 5, scale=0.2)).round(decimals=4), random(4)
    found = {"log_probs": leaf.detach(), "old_log_probs": old, "mask": mask, "advantages": advantages, "low": 0.2}
    cases = []
    for first in (False, True):
        leaf.grad = None
        trainer = without_init(
            RLOOTrainer, **shared(), epsilon_low=0.2, epsilon_high=0.2,
            _get_per_token_logps_and_entropies=lambda *about, **more: (leaf, torch.zeros_like(leaf), None),
        )  # fmt: skip
        inputs = {
            "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
            "advantages": advantages, "old_logps": ((leaf.detach() if first else old) * mask).sum(1),
        }  # fmt: skip
        loss = trainer._compute_loss(None, inputs)
        loss.backward()
        assert leaf.grad is not None
        cases.append({"first": first, "loss": loss.item(), "gradient": leaf.grad.tolist()})
    return {"given": plain(found), "cases": cases}


def answering(tables: dict[str, Tensor]) -> Any:
    """A model that says, of the inputs called by a name, the log-probabilities of the table of that name."""

    def model(input_ids: Tensor, **more: object) -> SimpleNamespace:
        table = tables["kl" if bool((input_ids == 2).all()) else "own"]
        nothing = torch.zeros_like(table.detach())
        return SimpleNamespace(log_probs=table, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    return model


def dpo() -> Values:
    """``DPOTrainer._compute_loss`` on four pairs, the chosen ones first, whose prompts are one token."""
    from trl import DPOTrainer

    mask = ends([5, 2, 4, 1, 3, 5, 1, 4], 5)
    table = random(8, 5, scale=0.7, shift=-1.5) * mask
    reference = (table + random(8, 5, scale=0.6) * mask).sum(1).round(decimals=4)
    cases = []
    for kinds, weights, smoothing in (
        (["sigmoid"], [1.0], 0.0), (["sigmoid"], [1.0], 0.2), (["robust"], [1.0], 0.2), (["hinge"], [1.0], 0.0),
        (["ipo"], [1.0], 0.0), (["sigmoid", "sft"], [1.0, 0.5], 0.0),
    ):  # fmt: skip
        for beta in (0.1, 0.7):
            leaf = table.clone().requires_grad_()
            trainer = without_init(
                DPOTrainer, **shared(), ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
                loss_types=kinds, loss_weights=weights, beta=beta, label_smoothing=smoothing, use_weighting=False,
            )  # fmt: skip
            prompt_and_completion = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)
            inputs = {
                "input_ids": torch.ones_like(prompt_and_completion), "completion_mask": prompt_and_completion,
                "attention_mask": torch.ones_like(prompt_and_completion), "ref_chosen_logps": reference[:4],
                "ref_rejected_logps": reference[4:],
            }  # fmt: skip
            loss = trainer._compute_loss(answering({"own": leaf * mask}), inputs, return_outputs=False)
            loss.backward()
            assert leaf.grad is not None
            cases.append(
                {
                    "kind": "+".join(kinds), "beta": beta, "smoothing": smoothing, "sft_weight": weights[-1],
                    "loss": loss.item(), "gradient": leaf.grad.tolist(),
                }
            )  # fmt: skip
    given = {"log_probs": table, "mask": mask, "reference": reference}
    return {"given": plain(given), "cases": cases}


def kto() -> Values:
    """``KTOTrainer._compute_loss`` on six completions; what is mismatched gained on the reference, or lost."""
    from trl import KTOTrainer

    mask, mismatched_mask = ends([4, 2, 5, 1, 3, 5], 5), ends([3, 5, 1, 4, 5, 2], 5)
    table, mismatched = (
        random(6, 5, scale=0.7, shift=-1.5) * mask,
        random(6, 5, scale=0.7, shift=-2.5) * mismatched_mask,
    )
    reference = (table.sum(1) + random(6, scale=2.0)).round(decimals=4)
    cases = []
    for beta, good, bad, labels, gained in (
        (0.1, 1.0, 1.0, [1, 0, 1, 1, 0, 0], 0.5), (0.5, 1.3, 0.7, [1, 0, 1, 1, 0, 0], 0.5),
        (0.5, 1.3, 0.7, [1, 0, 1, 1, 0, 0], -0.5), (0.5, 1.0, 1.0, [1, 1, 1, 1, 1, 1], 0.5),
    ):  # fmt: skip
        leaf = table.clone().requires_grad_()
        trainer = without_init(
            KTOTrainer, **shared(), calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=beta,
            desirable_weight=good, undesirable_weight=bad,
        )  # fmt: skip
        whole = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)
        mismatched_reference = (mismatched.sum(1) - gained + torch.linspace(-1, 1, 6)).round(decimals=4)
        inputs = {
            "input_ids": torch.ones_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole,
            "KL_input_ids": torch.full_like(whole, 2), "KL_attention_mask": torch.ones_like(whole),
            "KL_completion_mask": torch.cat([torch.zeros_like(mask[:, :1]), mismatched_mask], 1),
            "label": torch.tensor(labels), "ref_logps": reference, "ref_KL_logps": mismatched_reference,
        }  # fmt: skip
        model = answering({"own": leaf * mask, "kl": mismatched})
        loss = trainer._compute_loss(model, inputs, return_outputs=False)
        loss.backward()
        assert leaf.grad is not None
        cases.append(
            {
                "beta": beta, "weights": [good, bad], "labels": labels, "loss": loss.item(),
                "mismatched_reference": mismatched_reference.tolist(), "gradient": leaf.grad.tolist(),
                "baseline": trainer._metrics["train"]["kl"][0],
            }
        )  # fmt: skip
    given = {"log_probs": table, "mask": mask, "reference": reference, "mismatched": mismatched.sum(1)}
    return {"given": plain(given), "cases": cases}


def reward_model() -> Values:
    """``RewardTrainer.compute_loss`` on five pairs, with and without margin and centring."""
    from trl import RewardTrainer

    given, margin = random(10, scale=1.5), random(5).abs()
    cases = []
    for with_margin in (False, True):
        for centring in (None, 0.01):
            leaf = given.clone().requires_grad_()
            trainer = without_init(RewardTrainer, **shared(), args=SimpleNamespace(center_rewards_coefficient=centring))
            inputs: Values = {"attention_mask": torch.ones(10, 2)} | ({"margin": margin} if with_margin else {})
            loss = trainer.compute_loss(lambda leaf=leaf, **more: SimpleNamespace(logits=leaf[:, None]), inputs)
            loss.backward()
            assert leaf.grad is not None
            cases.append({"margin": with_margin, "centring": centring, "loss": loss.item()})
            cases[-1]["gradient"] = leaf.grad.tolist()
    return {"given": plain({"rewards": given, "margin": margin}), "cases": cases}


# -- TRL 0.11.4 --------------------------------------------------------------------------------------------------------


def ppo_trainer(**config: object) -> Any:
    """With the defaults of ``PPOConfig``, but for what is named."""
    from trl.trainer.ppo_trainer import PPOTrainer

    defaults = {
        "kl_penalty": "kl", "gamma": 1, "lam": 0.95, "whiten_rewards": False, "cliprange": 0.2, "cliprange_value": 0.2,
        "vf_coef": 0.1, "ratio_threshold": 10.0,
    }  # fmt: skip
    return without_init(PPOTrainer, config=SimpleNamespace(**{**defaults, **config}), kl_ctl=SimpleNamespace(value=0.3))


def ppo() -> Values:
    """From scores to losses: five completions with padding, and the same with gaps (a mask of False inside)."""
    from trl.core import masked_whiten
    from trl.trainer.utils import AdaptiveKLController

    shape = (5, 6)
    padded = ends([6, 2, 4, 1, 5], 6)
    gaps = padded.clone()
    gaps[0, 2], gaps[4, 0], gaps[4, 3] = 0, 0, 0
    old = random(*shape, scale=0.5, shift=-1.5)
    given = {
        "scores": random(5, scale=2.0), "old_log_probs": old, "log_probs": old + random(*shape, scale=0.3),
        "reference": old + random(*shape, scale=0.5), "values": random(*shape), "kl_weight": 0.3,
    }  # fmt: skip
    given["new_values"] = given["values"] + random(*shape, scale=0.3)
    given = {name: values.round(decimals=4) if isinstance(values, Tensor) else values for name, values in given.items()}
    found: Values = {"given": plain(given), "padded": padded.tolist(), "gaps": gaps.tolist(), "rewards": {}}
    for kind in ("kl", "abs", "mse"):
        trainer = ppo_trainer(kl_penalty=kind)
        rewards, _, drift = trainer.compute_rewards(given["scores"], old, given["reference"], padded)
        found["rewards"][kind] = plain({"rewards": rewards, "drift": drift})
    found["advantages"] = []
    for which, mask in (("padded", padded), ("gaps", gaps)):
        rewards, _, _ = ppo_trainer().compute_rewards(given["scores"], old, given["reference"], mask)
        for discount, trace, whiten in ((1.0, 0.95, False), (0.9, 0.5, False), (1.0, 0.95, True)):
            trainer = ppo_trainer(gamma=discount, lam=trace, whiten_rewards=whiten)
            _, advantages, returns = trainer.compute_advantages(given["values"], rewards, mask)
            case = {"mask": which, "discount": discount, "trace": trace, "whiten_rewards": whiten}
            found["advantages"].append(case | plain({"advantages": advantages, "returns": returns}))
    found["losses"] = []
    for case in (found["advantages"][0], found["advantages"][1]):
        log_probs, expected = (given[name].clone().requires_grad_() for name in ("log_probs", "new_values"))
        trainer = ppo_trainer(gamma=case["discount"], lam=case["trace"])
        policy, value, _ = trainer.loss(
            old, given["values"] * padded, torch.zeros(*shape, 2), expected, log_probs, padded,
            torch.tensor(case["advantages"], dtype=torch.float64), torch.tensor(case["returns"], dtype=torch.float64),
        )  # fmt: skip
        (policy + value).backward()
        gradients = plain({"log_probs": log_probs.grad, "new_values": expected.grad})
        found["losses"].append({"policy": policy.item(), "value": value.item(), "gradients": gradients})
    found["whitened"] = plain(
        {name: masked_whiten(given["values"], gaps, shift_mean=name == "shifted") for name in ("shifted", "kept")}
    )
    controller, weights = AdaptiveKLController(0.2, 6.0, 10000), []
    for kl in (3.0, 6.5, 20.0, -1.0):
        controller.update(kl, 512)
        weights.append([kl, float(controller.value)])
    found["controller"] = {"weight": 0.2, "target": 6.0, "horizon": 10000, "count": 512, "steps": weights}
    return found


if __name__ == "__main__":
    file = Path(__file__).with_name("trl_text_losses.json")
    everything = json.loads(file.read_text()) if file.exists() else {}
    made_with = {"python": platform.python_version()}
    made_with |= {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
    if trl.__version__ == "1.16.0":
        parts = {
            "grpo": grpo(), "advantages": group_advantages(), "rloo": rloo_loss(), "dpo": dpo(), "kto": kto(),
            "reward_model": reward_model(),
        }  # fmt: skip
    elif trl.__version__ == "0.11.4":
        parts = {"ppo": ppo()}
    else:
        raise SystemExit(f"this is TRL {trl.__version__}; what is recorded is 1.16.0 and 0.11.4")
    everything[trl.__version__] = {"made_with": made_with, **parts}
    text = json.dumps(dict(sorted(everything.items())), indent=1)
    file.write_text(re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match.group().split()), text) + "\n")
