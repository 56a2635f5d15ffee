"""Trains the table encoder of embedded:brain-mr, with the image model frozen.

``python -m pipelines.embedded.table_encoder --model build/brain-mr``

It begins by regression on the states of the text encoder, so that the U-Net finds what it was trained to read. Then it
learns from the denoising error on rendered scenes, through the frozen U-Net. In both parts cells are left out at random
and the target stays: a row with missing cells learns the average of what it leaves open.

The tokens stand in place of the text's. Appended to those of an empty text they did worse on the held-back scenes, at
the start (0.482 against 0.479 on lesions) and after 100 steps (0.480 against 0.478).

Shape legend: ``N`` scenes, ``B`` rows, ``A`` columns, ``L`` text tokens, ``K`` conditioning tokens, ``D`` width.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from diffalign.worlds import brain_mr
from pipelines.embedded.data import fingerprint, lesion_cells, scenes
from pipelines.embedded.denoiser import DECISIVE, encode
from pipelines.table_encoder import FOLDER, MISSING, TableEncoder

LAYERS, HEADS = 2, 4
FOCUS = 8.0
"""Extra weight of the error on a lesion's cells and their mirror image, in the first part of the training."""
VALIDATION = 256
"""Scenes at the end that are not trained on."""


def columns() -> dict[str, list[str]]:
    """The values of each column of the world, each once."""
    full = brain_mr.combinations()
    return {name: list(dict.fromkeys(row[name] for row in full if name in row)) for name in brain_mr.FIELDS}


def code(rows: list[dict[str, str]]) -> Tensor:
    """Codes int64 ``(B, A)`` of rows."""
    values = columns()
    return torch.tensor([[values[n].index(row[n]) + 1 if n in row else MISSING for n in values] for row in rows])


def drop(codes: Tensor) -> Tensor:
    """The same rows ``(B, A)``: half of them whole, a tenth empty, of the others every second cell left out."""
    fate = torch.rand(len(codes), 1)
    left_out = (torch.rand(codes.shape) < 0.5) & (fate > 0.5) | (fate > 0.9)
    return codes.masked_fill(left_out, MISSING)


class Trainer:
    """The training: state, one step of each kind, and files."""

    def __init__(self, model: Path, work: Path, count: int) -> None:
        self.work = work
        pipeline = StableDiffusionPipeline.from_pretrained(
            model, dtype=torch.float32, safety_checker=None, requires_safety_checker=False, local_files_only=True
        )
        self.unet = pipeline.unet.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.scheduler: DDIMScheduler = pipeline.scheduler
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder.requires_grad_(False).eval()
        self.path = work / f"checkpoint-table-encoder-{fingerprint(self.unet, self.text_encoder, pipeline.vae)}.pt"
        self.latents, self.rows, self.cells = self._scenes(pipeline.vae.eval(), count)
        torch.manual_seed(0)
        self.encoder = TableEncoder(
            columns(), code(brain_mr.combinations()), tokens=self.tokenizer.model_max_length,
            width=pipeline.unet.config.cross_attention_dim, layers=LAYERS, heads=HEADS,
        )  # fmt: skip
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(self.encoder.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
        self.steps = 0

    def _scenes(self, autoencoder: AutoencoderKL, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents float16 ``(N, 4, 16, 16)``, codes ``(N, A)`` and cells of lesions ``(N, 1, 16, 16)``; kept in work.

        They are the denoiser's own training scenes, in the files that it keeps.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        drawn = self.work / f"latents-brain-mr-{count}-{fingerprint(autoencoder)}.pt"
        lesions = self.work / f"lesions-{count}.pt"
        if not drawn.exists():
            images, captions = scenes("brain-mr", count)
            torch.save((encode(autoencoder, images), captions), drawn)
        if not lesions.exists():
            torch.save(lesion_cells(count)[:, None].float(), lesions)
        latents, captions = torch.load(drawn, weights_only=True)
        cells = torch.load(lesions, weights_only=True)
        return latents, code([brain_mr.parse(caption) or {} for caption in captions]), cells

    @torch.no_grad()
    def text_states(self, captions: list[str]) -> Tensor:
        """What the text encoder makes of captions: ``(B, L, D)``."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states: Tensor = self.text_encoder(tokens)[0]
        return states

    def regress(self, steps: int) -> float:
        """Learns the text encoder's states of every caption; returns the share of their variance that is left."""
        full = brain_mr.combinations()
        rows, empty = code(full), torch.zeros(1, len(brain_mr.FIELDS), dtype=torch.long)
        states, nothing = self.text_states([brain_mr.caption(row) for row in full]), self.text_states([""])
        optimiser = torch.optim.AdamW(self.encoder.parameters(), lr=2e-3, weight_decay=0.0)
        left = 1.0
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 50, 1.0, (steps - step) / (0.5 * steps))
            half = torch.randperm(len(rows))[: len(rows) // 2]
            asked = drop(rows[half])
            said = (asked != MISSING).any(1)[:, None, None]
            target = torch.where(said, states[half], nothing)
            loss = F.mse_loss(self.encoder(torch.cat([asked, empty])), torch.cat([target, nothing]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            left = float(F.mse_loss(self.encoder(rows), states) / states.var(0).mean())
        self.average.load_state_dict(self.encoder.state_dict())
        return left

    def step(self, batch: int, rate: float, focus: float) -> float:
        """One update on the denoising error at learning rate ``rate``; returns the unweighted loss."""
        self.optimiser.param_groups[0]["lr"] = rate
        index = torch.randint(len(self.latents) - VALIDATION, (batch,))
        clean = self.latents[index].float()
        noise = torch.randn_like(clean)
        decisive = torch.randint(*DECISIVE, (batch,))
        timesteps = torch.where(torch.rand(batch) < 0.7, decisive, torch.randint(1000, (batch,)))
        error = self.error(clean, noise, timesteps, self.encoder(drop(self.rows[index])))
        self.optimiser.zero_grad()
        (error * (1 + focus * self.cells[index])).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimiser.step()
        self.steps += 1
        weight = 1 - min(0.998, 1 - 10 / (self.steps + 9))
        torch._foreach_lerp_(list(self.average.parameters()), [p.detach() for p in self.encoder.parameters()], weight)
        return float(error.detach().mean())

    def error(self, clean: Tensor, noise: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """Squared error ``(B, 4, 16, 16)`` of the frozen U-Net's v under conditioning ``(B, K, D)``."""
        noised = self.scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(clean, noise, timesteps)
        error: Tensor = (self.unet(noised, timesteps, states).sample - target).square()
        return error

    @torch.no_grad()
    def validate(self, states: Tensor, batch: int = 64) -> tuple[float, float]:
        """Mean error on the held-back scenes, in all cells and in those of lesions, of conditioning ``(256, K, D)``."""
        generator = torch.Generator().manual_seed(1)
        clean, cells = self.latents[-VALIDATION:].float(), self.cells[-VALIDATION:]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(*DECISIVE, (VALIDATION,), generator=generator)
        parts = zip(*(t.split(batch) for t in (clean, noise, timesteps, states)), strict=True)
        error = torch.cat([self.error(*part) for part in parts]).mean(1, keepdim=True)
        return float(error.mean()), float((error * cells).sum() / cells.sum())

    def checkpoint(self) -> None:
        """Writes everything that continues the training, whole or not at all."""
        state = {
            "encoder": self.encoder.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": torch.get_rng_state(),
            "steps": self.steps,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def start(self, regression: int) -> None:
        """Continues from the last checkpoint; where there is none, begins by regression."""
        if not self.path.exists():
            left = self.regress(regression)
            print(f"regression leaves {left:.2%} of the variance of the text encoder's states", flush=True)
            self.checkpoint()
            return
        state = torch.load(self.path, weights_only=True)
        self.encoder.load_state_dict(state["encoder"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["generator"])
        self.steps = state["steps"]

    def report(self) -> str:
        """The validation error under the text encoder and under the table encoder."""
        values = columns()
        rows = [{n: v[c - 1] for (n, v), c in zip(values.items(), row, strict=True) if c} for row in
                self.rows[-VALIDATION:].tolist()]  # fmt: skip
        text = self.validate(self.text_states([brain_mr.caption(row) for row in rows]))
        with torch.no_grad():
            table = self.validate(self.average(self.rows[-VALIDATION:]))
        return f"text {text[0]:.4f} (lesions {text[1]:.4f}), table {table[0]:.4f} (lesions {table[1]:.4f})"


def train(trainer: Trainer, out: Path, steps: int, batch: int) -> None:
    """Trains to so many steps with a falling rate; the lesions count more in the first three quarters."""
    saved = started = time.monotonic()
    while trainer.steps < steps:
        progress = trainer.steps / steps
        rate = 5e-4 * min(1.0, (trainer.steps + 1) / 100, max(0.02, 2 - 2 * progress))
        trainer.step(batch, rate, FOCUS if progress < 0.75 else 0.0)
        if time.monotonic() - saved > 60 or trainer.steps == steps:
            saved = time.monotonic()
            trainer.checkpoint()
            trainer.average.save(out)
            print(f"step {trainer.steps} minute {(saved - started) / 60:.1f}: {trainer.report()}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained brain-mr pipeline")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {FOLDER} in the folder of the model")
    parser.add_argument("--work", type=Path, default=Path("build/work"))
    parser.add_argument("--steps", type=int, default=360, help="100 to 200 a minute on one core")
    parser.add_argument("--regression", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    job = Trainer(arguments.model, arguments.work, arguments.scenes)
    job.start(arguments.regression)
    print(f"beginning: {job.report()}", flush=True)
    train(job, arguments.out or arguments.model / FOLDER, arguments.steps, arguments.batch)
