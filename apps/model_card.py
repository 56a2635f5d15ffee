"""Measures an embedded image model with its checker and writes its card.

``python -m apps.model_card emoji`` writes ``docs/models/emoji.md`` with a grid of samples, and the folder's README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from diffalign import images
from diffalign.config import SamplerConfig
from diffalign.evaluation import mean_interval
from diffalign.prompts import WORLDS
from diffalign.runs import write_text
from diffalign.seeds import derive
from diffalign.types import Prompt, Sample, Scores
from pipelines.loading import EMBEDDED, load_policy
from rewards.registry import load as load_reward

DOCS = Path(__file__).parent.parent / "docs" / "models"
SETTINGS = ((1.0, 10), (1.0, 5), (2.0, 10), (3.0, 10))
"""Guidance and steps of each column."""
SHOWN = 32

WORDS = {
    "emoji": {
        "title": "embedded:emoji, scenes of Noto Emoji from a caption",
        "steps": "about 12,000",
        "data": "30,000 scenes composed by `diffalign.worlds.emoji` from 24 drawings of Noto Emoji",
        "licence": "Apache-2.0. The drawings are Noto Emoji, Copyright Google LLC, Apache-2.0; see"
        " `diffalign/worlds/assets/noto-emoji/NOTICE`.",
        "limits": "It knows 24 things, six plain backgrounds, counts to four, four relations and four corners, in the"
        " wording of its captions. Anything else gives nonsense. It miscounts most where there are three or four. Fine"
        " detail (faces, wheels, petals) is soft: the autoencoder compresses twelvefold.",
    },
    "brain-mr": {
        "title": "embedded:brain-mr, brain MR slices from a caption",
        "steps": "about 12,000",
        "data": "30,000 slices rendered by `diffalign.worlds.brain_mr` from the MNI ICBM152 atlas",
        "licence": "Apache-2.0. The anatomy is the MNI ICBM152 template, Copyright McConnell Brain Imaging Centre,"
        " Montreal Neurological Institute, McGill University; see `diffalign/worlds/assets/mni-icbm152/`.",
        "limits": "One anatomy (an average of healthy adults), synthetic contrast and synthetic lesions at 64x64: it is"
        " for developing methods. It is no medical device, says nothing about any patient, and its samples are"
        " deformed copies of one template. Nine slice positions; lesions are plain bright or dark blobs.",
    },
}


def samples(name: str, guidance: float, steps: int, count: int) -> list[Sample]:
    """``count`` images of prompts over the whole world at eta 1."""
    prompts = _prompts(name, count)
    policy = load_policy(f"embedded:{name}", sampler=SamplerConfig(steps=steps, guidance_scale=guidance, batch_size=32))
    made: list[Sample] = []
    for i in range(0, count, policy.batch_size):
        chunk = prompts[i : i + policy.batch_size]
        seeds = [derive(0, "card", i + k) for k in range(len(chunk))]
        made += policy.rollout(chunk, seeds).samples
    return made


def _prompts(name: str, count: int) -> list[Prompt]:
    world = import_module(WORLDS[name])
    return [Prompt(world.caption(p.attributes), p.id, p.attributes) for p in
            (world.scene(derive(1, "card prompt", i)).prompt for i in range(count))]  # fmt: skip


def table(rows: Sequence[tuple[str, Scores]]) -> str:
    """Accuracy per attribute with 95 % intervals (Wilson; bootstrap for the total), a column per setting."""
    lines = ["| attribute | " + " | ".join(label for label, _ in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for part in ("total", *rows[0][1].parts):
        cells = []
        for _, scores in rows:
            values = (scores.total if part == "total" else scores.parts[part]).double().numpy()
            known = values[np.isfinite(values)]
            if len(known) == 0:
                cells.append("not asked")
                continue
            if part == "total":
                low, high = mean_interval(known, np.arange(len(known)))["ci95"]
            else:
                low, high = binomtest(round(known.sum()), len(known)).proportion_ci(method="wilson")
            cells.append(f"{known.mean():.1%} [{low:.1%}, {high:.1%}] n={len(known)}")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def card(name: str, count: int) -> str:
    """The text of the card; writes the sample grid beside it."""
    words, checker = WORDS[name], load_reward(f"{name}-checker")
    rows = []
    for guidance, steps in SETTINGS:
        made = samples(name, guidance, steps, count)
        rows.append((f"guidance {guidance:g}, {steps} steps", checker(made)))
        if (guidance, steps) == SETTINGS[-1]:
            shown = made[:SHOWN]
            pictures = [sample.image for sample in shown if sample.image is not None]
            images.save_png(images.grid(pictures, 8, [sample.prompt.text for sample in shown]), DOCS / f"{name}.png")
    size = sum(file.stat().st_size for file in (EMBEDDED / name).rglob("*.safetensors")) / 1e6
    return f"""# {words["title"]}

A latent diffusion model in diffusers' own format (`StableDiffusionPipeline`): an f = 4 autoencoder (0.65 M parameters),
a U-Net of 4.2 M parameters, and a three-layer CLIP text encoder; {size:.1f} MB in half precision. It predicts v under a
schedule with zero terminal signal and wants DDIM with trailing spacing, which its scheduler file says.

**Trained on** {words["data"]}.
By the scripts behind `make embedded`, from scratch: the text encoder first learned to tell a caption's attributes, and
was then trained on together with the U-Net. The shipped weights were trained in several goes, {words["steps"]} steps in
all, while `pipelines/embedded/denoiser.py` grew into what it is; one go from nothing gives another model of its kind.

## Measured

Eta 1, {count} captions drawn as in training, one image each, judged by the
[{name}-checker]({name}-checker.md): accuracy per attribute that the caption asks for, with 95 % intervals (Wilson; the
total: bootstrap).
`python -m apps.model_card {name} --count {count}` repeats it.

{table(rows)}

![The first {SHOWN} samples at guidance {SETTINGS[-1][0]:g}, none left out]({name}.png)

*The first {SHOWN} of these samples at guidance {SETTINGS[-1][0]:g}, none left out.*

## What it cannot do

{words["limits"]}

## Licence

{words["licence"]}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(WORDS))
    parser.add_argument("--count", type=int, default=512)
    arguments = parser.parse_args()
    text = card(arguments.name, arguments.count)
    write_text(DOCS / f"{arguments.name}.md", text)
    plain = text.partition("![")[0] + "## What it cannot do" + text.partition("## What it cannot do")[2]
    link = f"[{arguments.name}-checker]({arguments.name}-checker.md)"
    write_text(EMBEDDED / arguments.name / "README.md", plain.replace(link, f"`{arguments.name}-checker`"))
