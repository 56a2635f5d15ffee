"""``diffalign list`` and ``diffalign doctor``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click
import psutil
import yaml

from apps.catalogue import dataset_recipes, fit_recipes, recipes

OBJECTIVES = {
    "ppo-clip": "from scores: importance-weighted, clipped per denoising step (DDPO-IS; with group credit, GRPO)",
    "reinforce": "from scores: score function, one update per rollout (DDPO-SF)",
    "elbo-reinforce": "from scores, on images noised anew: score function of the denoising error; any sampler (EPG)",
    "elbo-ppo-clip": "the same by clipped ratios to the weights that sampled; several updates a rollout",
    "nft": "the same by contrasting an implicit good and bad policy (DiffusionNFT)",
    "reward-weighted": "from scores: imitate fresh samples, the better ones more (RWR)",
    "dpo": "from pairs: Diffusion-DPO, with soft labels, label_smoothing (conservative DPO) and guards",
    "robust-dpo": "from pairs: DPO that undoes a known share of flipped labels",
    "ipo": "from pairs: towards a finite margin",
    "hinge": "from pairs: a margin and then no gradient (SLiC)",
    "kto": "from thumbs up and down, or both sides of pairs (Diffusion-KTO)",
    "draft": "from a reward's own gradient, through the last steps of sampling (DRaFT-K)",
    "align-prop": "the same through a random number of last steps (AlignProp)",
    "refl": "the same through one step, drawn among the last (ReFL)",
    "sft": "from samples to imitate: demonstrations, the best of n (RAFT, ReST), winners of pairs",
}


def show(what: str) -> None:
    """Prints one of the lists."""
    entries = {"recipes": _recipes, "models": _models, "rewards": _rewards, "assets": _assets}.get(what)
    found = OBJECTIVES if entries is None else entries()
    if not found:
        click.echo(f"there are no {what} in this version")
    for name, text in found.items():
        click.echo(f"{name:<24} {text}")


def _recipes() -> dict[str, str]:
    fits = {f"{name} (reward fit)": _first_comment(path) for name, path in fit_recipes().items()}
    datasets = {f"{name} (generate)": _first_comment(path) for name, path in dataset_recipes().items()}
    return {name: _first_comment(path) for name, path in recipes().items()} | fits | datasets


def _first_comment(path: Path) -> str:
    first = path.read_text().splitlines()[0]
    return first.removeprefix("# ") if first.startswith("#") else str(yaml.safe_load(path.read_text()).get("name", ""))


def _models() -> dict[str, str]:
    from diffalign.assets import CATALOGUE
    from pipelines.naming import EMBEDDED, FETCHED, embedded_models, fetchable_models

    found = {f"embedded:{name}": _title(EMBEDDED / name / "README.md") for name in embedded_models()}
    for model in fetchable_models():
        asset = CATALOGUE[model.removeprefix(FETCHED)]
        state = "here" if asset.present else f"not here: diffalign fetch {asset.name}"
        found[model] = f"{asset.gives.partition(' (')[0]}; {state}"
    return found


def _title(card: Path) -> str:
    lines = card.read_text().splitlines() if card.is_file() else []
    return next((line.strip("# ").strip() for line in lines if line.startswith("# ")), "")


def _rewards() -> dict[str, str]:
    from rewards.registry import names

    return dict(names())


def _assets() -> dict[str, str]:
    from apps.fetch import listed

    return listed()


def doctor() -> int:
    """Prints what this installation has; 0 if it can align an embedded model, else 1."""
    import torch

    from diffalign.runs import environment
    from pipelines.naming import embedded_models

    facts = environment(0, {})
    problems = []
    click.echo(f"python {facts['python']} on {facts['hardware']['system']}, {os.cpu_count()} cores")
    for package, version in facts["versions"].items():
        click.echo(f"  {package:<18} {version}")
        if version == "not installed":
            problems.append(f"{package} is not installed")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    click.echo(f"accelerator          {accelerator or 'none: models run on the CPU'}")
    free = shutil.disk_usage(Path.cwd()).free
    click.echo(f"memory               {psutil.virtual_memory().available / 2**30:.1f} GiB free")
    click.echo(f"disk                 {free / 2**30:.1f} GiB free here")
    click.echo(f"embedded models      {', '.join(embedded_models()) or 'none'}")
    if not embedded_models():
        problems.append("no embedded model is installed")
    if free < 2**30:
        problems.append("less than 1 GiB of disk is free")
    for problem in problems:
        click.echo(f"problem: {problem}", err=True)
    click.echo("ready" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0
