"""Trains the f = 4 autoencoder of an embedded image model.

``python -m pipelines.embedded.autoencoder emoji --out build/autoencoder-emoji``
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from pipelines.embedded.data import scenes, to_model


def build() -> AutoencoderKL:
    """An autoencoder of 0.65 M parameters: 64x64 pixels to 16x16 latents of 4 channels."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )
    # A fresh encoder would add noise as strong as its signal, and faint channels (colour) would never come alive.
    assert model.quant_conv is not None
    assert model.quant_conv.bias is not None
    torch.nn.init.zeros_(model.quant_conv.weight.data[4:])
    torch.nn.init.constant_(model.quant_conv.bias.data[4:], -6.0)
    return model


def loss(model: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction (L1, squared error, and L1 of the image gradients, which keeps edges) plus a faint KL."""
    posterior = model.encode(images).latent_dist
    decoded = model.decode(posterior.sample()).sample
    edges = sum((F.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3)), start=torch.zeros(()))
    mse = F.mse_loss(decoded, images)
    return F.l1_loss(decoded, images) + mse + edges + 1e-6 * posterior.kl().mean(), mse.detach()


def train(world: str, out: Path, minutes: float, init: Path | None = None, batch: int = 16, count: int = 12000) -> None:
    """Trains for a wall-clock budget and writes a diffusers folder; the latent scale is measured at the end.

    ``init`` is a folder of an earlier training to go on from.
    """
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    images, _ = scenes(world, count)
    model = AutoencoderKL.from_pretrained(init, dtype=torch.float32) if init else build()
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    start, step, peak = time.monotonic(), 0, 2e-3
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        optimiser.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 100, max(0.02, 1 - progress) * 2)
        picked = to_model(images[torch.randint(len(images), (batch,))])
        with torch.autocast("cpu", torch.bfloat16):
            value, mse = loss(model, picked)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        for name, parameter in model.state_dict().items():
            ema[name].lerp_(parameter, 1 - decay)
        if step % 200 == 0:
            print(f"step {step} minute {(time.monotonic() - start) / 60:.1f} mse {mse:.5f}", flush=True)
            save(model, ema, images, out)
    save(model, ema, images, out)


@torch.no_grad()
def save(model: AutoencoderKL, ema: dict[str, Tensor], images: Tensor, out: Path) -> None:
    """Writes the averaged weights in half precision, with the scale that gives latents unit variance."""
    averaged = build()
    averaged.load_state_dict(ema)
    picked = to_model(images[torch.linspace(0, len(images) - 1, 256).long()])
    latents = averaged.encode(picked).latent_dist.mode()
    averaged.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    averaged.half().save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=["emoji", "brain-mr"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--scenes", type=int, default=12000)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.world, arguments.out, arguments.minutes, arguments.init, count=arguments.scenes)
