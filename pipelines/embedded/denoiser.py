"""Trains an embedded text-to-image model on a world's scenes and writes it as a diffusers pipeline folder.

``python -m pipelines.embedded.denoiser emoji --autoencoder build/autoencoder --out pipelines/embedded/emoji``

The text encoder is a small CLIP text model that can read already (``reader``) and is trained on with the U-Net. The
model predicts v under a noise schedule with zero terminal signal (Lin et al. 2023, "Common diffusion noise schedules
and sample steps are flawed"), so that ten trailing steps suffice and plain backgrounds come out in the colour that was
asked for.

Three things help it to learn *where*, which takes up little of the error and is learned all at once or not at all.
More than half of the timesteps are drawn where places are decided. The training begins with practice: only captions
that say where, only timesteps at which hardly anything else can be known, and a tint on the half of the image that the
caption names, which then fades. And for a while the error counts more on the cells of a lesion and on their mirror
image: the same on both sides, so that only the caption can tell them apart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from diffalign.seeds import derive
from diffalign.worlds import brain_mr, emoji
from pipelines.embedded import reader
from pipelines.embedded import tokenizer as tokenizers
from pipelines.embedded.data import fingerprint, lesion_cells, scenes, to_model

DECISIVE = 450, 900
"""Timesteps at which a lesion's or a drawing's latents stand out of the noise just enough to be found (their squared
norm is 40 to 80 for lesions, some hundreds for drawings; a place among hundreds is found when it is about ten times
the noise's variance)."""
FOCUS = 15.0
"""Extra weight of the error on a lesion's cells."""
TINT = (0.8, -0.8, 0.8, -0.8)
"""What is added to the latents of the half that a brain-mr caption names at first."""
ALL, FIRST, SECOND = slice(None), slice(0, 8), slice(8, 16)
HALVES = {
    "left of": (ALL, ALL, FIRST),
    "right of": (ALL, ALL, SECOND),
    "above": (ALL, FIRST, ALL),
    "below": (ALL, SECOND, ALL),
    "left": (ALL, ALL, SECOND),  # the patient's left is on the right
    "right": (ALL, ALL, FIRST),
    "anterior": (ALL, ALL, FIRST),
    "posterior": (ALL, ALL, SECOND),
}
"""Latents ``(C, H, W)`` of the half where a thing stands that is left of another, where a left lesion is, and so on."""
OPPOSITE = emoji.MIRRORED | {there: back for back, there in emoji.MIRRORED.items()}
PRACTICE = 880, 980
"""Timesteps of the first part of the training."""


def build_unet() -> UNet2DConditionModel:
    """4.2 M parameters; attention at 8x8 and 4x4 only, where it is cheap."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        cross_attention_dim=reader.WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """1000 steps, zero terminal signal, v-prediction, trailing spacing."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Scaled latents ``(N, 4, 16, 16)`` of uint8 images, in half precision to save memory."""
    means = [autoencoder.encode(to_model(chunk)).latent_dist.mode().half() for chunk in images.split(batch)]
    scale: float = autoencoder.config.scaling_factor
    return torch.cat(means) * scale


class Trainer:
    """The denoiser's training: state, one step, and files."""

    def __init__(self, world: str, autoencoder: Path, work: Path, count: int) -> None:
        self.world, self.work = world, work
        self.autoencoder = AutoencoderKL.from_pretrained(autoencoder, dtype=torch.float32).eval()
        self.drawn_by = fingerprint(self.autoencoder)
        cache = work / f"latents-{world}-{count}-{self.drawn_by}.pt"
        if cache.exists():
            self.latents, self.captions = torch.load(cache, weights_only=True)
        else:
            work.mkdir(parents=True, exist_ok=True)
            images, self.captions = scenes(world, count)
            self.latents = encode(self.autoencoder, images)
            torch.save((self.latents, self.captions), cache)
        torch.manual_seed(0)
        self.tokenizer = tokenizers.build(self.captions, work / f"tokenizer-{world}")
        self.focus, self.tints = self._focus(count), self._tints()
        self.places = self.tints.flatten(1).any(1).nonzero()[:, 0]
        self.tokens = self.tokenizer(
            self.captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        self.empty = self.tokenizer([""], padding="max_length", return_tensors="pt").input_ids[0]
        self.unet = build_unet().to(memory_format=torch.channels_last)
        self.text_encoder = reader.build(self.tokenizer)
        self.scheduler = build_scheduler()
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99))
        self.steps = 0

    def _focus(self, count: int) -> Tensor:
        """Cells ``(count, 1, 16, 16)`` on which the error counts more: 1 there, 0 elsewhere."""
        if self.world != "brain-mr":
            return torch.zeros(1, 1, 16, 16).expand(count, 1, 16, 16)
        cache = self.work / f"lesions-{count}.pt"
        if not cache.exists():
            torch.save(lesion_cells(count)[:, None].float(), cache)
        cells: Tensor = torch.load(cache, weights_only=True)
        return cells

    def _tints(self) -> Tensor:
        """What tints the latents of each scene at first, float16 ``(N, 4, 16, 16)``.

        brain-mr: ``TINT`` on the half of the image that the caption names. emoji: of two things in relation, each one's
        half in a colour that stands for that thing.
        """
        tints = torch.zeros(len(self.captions), 4, 16, 16, dtype=torch.float16)
        for tint, caption in zip(tints, self.captions, strict=True):
            if self.world == "brain-mr":
                side = (brain_mr.parse(caption) or {}).get("side")
                if side:
                    tint[HALVES[side]] = torch.tensor(TINT, dtype=torch.float16)[:, None, None]
                continue
            facts = emoji.parse(caption) or {}
            if relation := facts.get("relation"):
                tint[HALVES[str(relation)]] = _colour(str(facts["object"]))
                tint[HALVES[OPPOSITE[str(relation)]]] = _colour(str(facts["other"]))
        return tints

    def step(self, batch: int, rate: float, *, focus: float = 0.0, tint: float = 0.0, practice: bool = False) -> float:
        """One update at learning rate ``rate``; returns the unweighted loss.

        ``focus`` is the extra weight of lesions, ``tint`` (1 is full) that of the half that the caption names.
        """
        self.optimiser.param_groups[0]["lr"] = rate
        pool = self.places if practice else torch.arange(len(self.latents))
        index = pool[torch.randint(len(pool), (batch,))]
        clean, tokens = self.latents[index].float(), self.tokens[index]
        if tint:
            clean = clean + tint * self.tints[index].float()
        tokens = torch.where(torch.rand(batch, 1) < 0.1, self.empty, tokens)
        noise = torch.randn_like(clean)
        decisive = torch.randint(*DECISIVE, (batch,))
        timesteps = torch.where(torch.rand(batch) < 0.6, decisive, torch.randint(1000, (batch,)))
        if practice:
            timesteps = torch.randint(*PRACTICE, (batch,))
        noised = self.scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(clean, noise, timesteps)
        error = (self.unet(noised, timesteps, self.text_encoder(tokens)[0]).sample - target).square()
        self.optimiser.zero_grad()
        (error * (1 + focus * self.focus[index])).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.steps += 1
        torch._foreach_lerp_(
            self.average, [p.detach() for p in self.parameters], 1 - min(0.999, 1 - 10 / (self.steps + 9))
        )
        return float(error.detach().mean())

    def checkpoint(self) -> None:
        """Writes everything that continues the training, whole or not at all."""
        path = self.work / f"checkpoint-{self.world}-{self.drawn_by}.pt"
        state = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "steps": self.steps,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def start(self, reading: int) -> None:
        """Continues from the last checkpoint; where there is none, the text encoder learns to read for some steps."""
        path = self.work / f"checkpoint-{self.world}-{self.drawn_by}.pt"
        if not path.exists():
            right = reader.teach(self.text_encoder, self.tokens, reader.facts(self.world, self.captions), reading)
            print(f"the text encoder tells {right:.2%} of the captions' attributes", flush=True)
            return
        state = torch.load(path, weights_only=True)
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
        self.average, self.steps = state["average"], state["steps"]
        self.optimiser.load_state_dict(state["optimiser"])

    def save(self, out: Path) -> None:
        """Writes the averaged weights as a diffusers pipeline folder in half precision."""
        trained = [p.detach().clone() for p in self.parameters]
        for parameter, value in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(value)
        pipeline = StableDiffusionPipeline(
            vae=self.autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(torch.float16).save_pretrained(out)
        for file in out.rglob("config.json"):  # where the parts came from is a path of this machine
            settings = json.loads(file.read_text())
            settings.pop("_name_or_path", None)
            if "dtype" in settings:  # half precision is for the file only; transformers would compute in it
                settings["dtype"] = "float32"
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        pipeline.to(torch.float32)
        for parameter, value in zip(self.parameters, trained, strict=True):
            parameter.data.copy_(value)


def _colour(thing: str) -> Tensor:
    """Latents ``(4, 1, 1)`` of norm 1.6, always the same for the same thing."""
    drawn = torch.randn(4, generator=torch.Generator().manual_seed(derive(0, "colour", thing)))
    colour: Tensor = 1.6 * drawn / drawn.norm()
    return colour[:, None, None].half()


def train(trainer: Trainer, out: Path, steps: int, batch: int) -> None:
    """Trains to so many steps: practice for a tenth, fading tint to the half, a falling rate from there on."""
    losses: list[float] = []
    saved = started = time.monotonic()
    while trainer.steps < steps:
        progress = trainer.steps / steps
        rate = 1e-3 * min(1.0, (trainer.steps + 1) / 200, max(0.01, 2 - 2 * progress))
        focus, tint = FOCUS if progress < 0.6 else 0.0, min(1.0, max(0.0, 1.25 - 2.5 * progress))
        losses.append(trainer.step(batch, rate, focus=focus, tint=tint, practice=progress < 0.1))
        if trainer.steps % 100 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {trainer.steps} minute {minutes:.1f} loss {sum(losses) / len(losses):.4f}", flush=True)
            losses.clear()
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            trainer.checkpoint()
            trainer.save(out)
    trainer.checkpoint()
    trainer.save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=["emoji", "brain-mr"])
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--steps", type=int, default=12000, help="100 to 200 a minute on one core")
    parser.add_argument("--reading", type=int, default=600, help="steps in which the text encoder learns to read")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    job = Trainer(arguments.world, arguments.autoencoder, arguments.work, arguments.scenes)
    job.start(arguments.reading)
    train(job, arguments.out, arguments.steps, arguments.batch)
