"""Measures an embedded image model with its checker and writes its card.

``python -m apps.model_card emoji`` writes ``docs/models/emoji.md`` with a grid of samples, and the folder's README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.stats import binomtest

from diffalign import images
from diffalign.config import SamplerConfig
from diffalign.evaluation import mean_interval
from diffalign.prompts import WORLDS
from diffalign.runs import write_text
from diffalign.seeds import derive
from diffalign.types import Prompt, Reward, Sample, Scores
from pipelines.loading import EMBEDDED, load_policy
from pipelines.table_encoder import FOLDER
from rewards.everything import EVERYTHING
from rewards.registry import load as load_reward

DOCS = Path(__file__).parent.parent / "docs" / "models"
SETTINGS = ((1.0, 10), (1.0, 5), (2.0, 10), (3.0, 10))
"""Guidance and steps of each column."""
SHOWN = 32
ROWS, LIMITS = "## From a table row", "## What it cannot do"
LEFT_OUT = 1 / 3
"""Share of the cells that rows with missing cells lack."""

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
        "table": "300 steps of regression on the text encoder's states, then 360 steps of 32 scenes on the denoising\n"
        "error, in which the cells of lesions count more, in several goes while the schedule was settled. Going\n"
        "on to 720 steps without that weight gave fewer of the lesions that were asked for, and at guidance 3\n"
        "fewer that are too large; the choice between the two was made on the rows below. At guidance 3 the\n"
        "shipped one draws some small lesions too large, and there the caption is the better way to get all\n"
        "attributes right",
        "limits": "One anatomy (an average of healthy adults), synthetic contrast and synthetic lesions at 64x64: it is"
        " for developing methods. It is no medical device, says nothing about any patient, and its samples are"
        " deformed copies of one template. Nine slice positions; lesions are plain bright or dark blobs.",
    },
}


def samples(
    name: str, prompts: Sequence[Prompt], guidance: float, steps: int, condition: Literal["text", "table"] = "text"
) -> list[Sample]:
    """One image of each prompt at eta 1; the same seeds for every setting."""
    sampler = SamplerConfig(steps=steps, guidance_scale=guidance, batch_size=32)
    policy = load_policy(f"embedded:{name}", sampler=sampler, condition=condition)
    made: list[Sample] = []
    for i in range(0, len(prompts), policy.batch_size):
        chunk = prompts[i : i + policy.batch_size]
        seeds = [derive(0, "card", i + k) for k in range(len(chunk))]
        made += policy.rollout(chunk, seeds).samples
    return made


def _prompts(name: str, count: int) -> list[Prompt]:
    world = import_module(WORLDS[name])
    return [Prompt(world.caption(p.attributes), p.id, p.attributes) for p in
            (world.scene(derive(1, "card prompt", i)).prompt for i in range(count))]  # fmt: skip


def with_missing_cells(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts with cells of their rows left out at random; a row without any cell has one that is None."""
    found = []
    for i, prompt in enumerate(prompts):
        rng = np.random.default_rng(derive(2, "card cells", i))
        cells = {name: None if rng.random() < LEFT_OUT else value for name, value in prompt.attributes.items()}
        found.append(replace(prompt, attributes=cells))
    return found


def judged(checker: Reward, made: Sequence[Sample], prompts: Sequence[Prompt], *, given: bool) -> Scores:
    """The checker's judgement by the full rows in ``prompts``, of the cells that were given only, or of the others."""
    rows = [sample.prompt.attributes for sample in made]
    full = checker([replace(sample, prompt=prompt) for sample, prompt in zip(made, prompts, strict=True)])
    parts = {}
    for name, values in full.parts.items():
        if name == EVERYTHING:
            continue
        counted = torch.tensor([name in row and (row[name] is not None) == given for row in rows])
        parts[name] = values.masked_fill(~counted, torch.nan)
    return Scores(torch.stack(list(parts.values())).nanmean(0), parts)


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


def rows_section(name: str, count: int) -> str:
    """The section on table rows: as many at guidance 1, half of them at guidance 3, each against its caption."""
    checker, everyone = load_reward(f"{name}-checker"), _prompts(name, count)
    columns, missing, compared = [], [], []
    for guidance, prompts in ((1.0, everyone), (3.0, everyone[: count // 2])):
        captions = checker(samples(name, prompts, guidance, 10))
        scores = checker(samples(name, prompts, guidance, 10, "table"))
        columns += [(f"caption, guidance {guidance:g}", captions), (f"row, guidance {guidance:g}", scores)]
        gain = 100 * (scores.total - captions.total).double().numpy()
        low, high = mean_interval(gain, np.arange(len(gain)))["ci95"]
        compared.append(f"{gain.mean():+.1f} [{low:+.1f}, {high:+.1f}] points at guidance {guidance:g}")
        made = samples(name, with_missing_cells(prompts), guidance, 10, "table")
        for given in (True, False):
            label = f"cells that are {'given' if given else 'missing'}, guidance {guidance:g}"
            missing.append((label, judged(checker, made, prompts, given=given)))
    size = sum(file.stat().st_size for file in (EMBEDDED / name / FOLDER).iterdir()) / 1e6
    return f"""{ROWS}

`{FOLDER}/` ({size:.1f} MB) turns a row (plane, contrast, level, lesion, side, size; any of them may be missing) into
the tokens that the U-Net reads in place of the text encoder's: `load_policy("embedded:{name}", condition="table")`. It
was trained by `python -m pipelines.embedded.table_encoder` with everything else frozen:
{WORDS[name]["table"]}.

The same rows, seeds and checker as above, 10 steps, the row in place of its caption. The row's total less its
caption's (bootstrap over pairs): {"; ".join(compared)}.
`python -m apps.model_card {name} --rows-only` repeats it.

{table(columns)}

The same rows with missing cells: each cell is left out with a chance of one in three, and then asks for nothing. How
often the image shows what stood there is a matter of chance and of the other cells (a level gives its plane away, a
side or a size that there is a lesion). No caption can say most of these rows, so there is none to compare with.

{table(missing)}

"""


def renew_rows(name: str, count: int) -> None:
    """Writes the section on table rows anew into a card and a README that are there."""
    section = rows_section(name, count)
    for file in (DOCS / f"{name}.md", EMBEDDED / name / "README.md"):
        before, _, after = file.read_text(encoding="utf-8").partition(LIMITS)
        write_text(file, before.partition(ROWS)[0] + section + LIMITS + after)


def card(name: str, count: int) -> tuple[str, str]:
    """The text of the card and of the folder's README, which has no picture; writes the sample grid beside it."""
    words, checker, prompts = WORDS[name], load_reward(f"{name}-checker"), _prompts(name, count)
    rows = []
    for guidance, steps in SETTINGS:
        made = samples(name, prompts, guidance, steps)
        rows.append((f"guidance {guidance:g}, {steps} steps", checker(made)))
        if (guidance, steps) == SETTINGS[-1]:
            shown = made[:SHOWN]
            pictures = [sample.image for sample in shown if sample.image is not None]
            images.save_png(images.grid(pictures, 8, [sample.prompt.text for sample in shown]), DOCS / f"{name}.png")
    from_rows = rows_section(name, count) if "table" in words else ""
    picture = f"""![The first {SHOWN} samples at guidance {SETTINGS[-1][0]:g}, none left out]({name}.png)

*The first {SHOWN} of these samples at guidance {SETTINGS[-1][0]:g}, none left out.*

"""
    weights = (file for file in (EMBEDDED / name).rglob("*.safetensors") if file.parent.name != FOLDER)
    size = sum(file.stat().st_size for file in weights) / 1e6
    text = f"""# {words["title"]}

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

{picture}{from_rows}{LIMITS}

{words["limits"]}

## Licence

{words["licence"]}
"""
    link = f"[{name}-checker]({name}-checker.md)"
    return text, text.replace(picture, "").replace(link, f"`{name}-checker`")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(WORDS))
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--rows-only", action="store_true", help="only the section on table rows (brain-mr)")
    arguments = parser.parse_args()
    if arguments.rows_only:
        renew_rows(arguments.name, arguments.count)
    else:
        whole, plain = card(arguments.name, arguments.count)
        write_text(DOCS / f"{arguments.name}.md", whole)
        write_text(EMBEDDED / arguments.name / "README.md", plain)
