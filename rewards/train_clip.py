"""Trains ``embedded:clip``: a small CLIP for the scenes of both embedded worlds, in open_clip's own format.

::

    python -m rewards.train_clip --out FOLDER --minutes 25 [--resume]

Scenes that share a caption are positives of each other, and every image also meets captions that are wrong in one
detail (Yuksekgonul et al. 2023, NegCLIP): without them a CLIP learns which things there are and not how they stand.

Shape legend: ``N`` images, ``M`` captions of different meaning, ``D`` dimensions of the embedding.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.seeds import derive
from rewards import clip_scenes as world
from rewards.clip_scenes import Scenes

if TYPE_CHECKING:
    from open_clip import CLIP
    from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 32
EMBED_DIM = 128
VISION_CONFIG = {"image_size": 64, "layers": [1, 2, 2, 1], "width": 24, "patch_size": None}
TEXT_CONFIG = {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 2, "hf_tokenizer_name": "embedded-clip"}
PREPROCESS_CONFIG = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


@dataclass(frozen=True)
class Batch:
    """Images, captions, and which caption is true of which image."""

    images: Tensor
    """float32 ``(N, 3, 64, 64)`` in [0, 1]."""
    captions: list[str]
    """``M`` texts, no two of one meaning."""
    true: Tensor
    """bool ``(N, M)``; every row has at least one."""


def contrastive_loss(images: Tensor, captions: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    """The symmetric CLIP loss with several positives, each with an equal share of the target (a scalar).

    ``images (N, D)`` and ``captions (M, D)`` have length 1. A caption that is true of no image is a negative only.
    """
    logits = scale * images @ captions.T
    target = true.float()
    by_image = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    some = true.any(0)
    logits, target = logits[:, some], target[:, some]
    by_caption = -(target / target.sum(0) * logits.log_softmax(0)).sum(0).mean()
    return (by_image + by_caption) / 2


def batches(scenes: Scenes, size: int, wrong: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless batches, number ``start`` first; each depends on the seed and its number alone."""
    step = start
    while True:
        rng = np.random.default_rng(derive(seed, "clip batch", step))
        chosen = rng.choice(len(scenes.facts), size, replace=False).tolist()
        captions: dict[str, str] = {}
        said: list[set[str]] = []
        for i in chosen:
            place, attributes = scenes.facts[i]
            true = world.truths(place, attributes)
            said.append({world.meaning(place, fact) for fact in true})
            shown = [true[0] if len(true) == 1 or rng.random() < 0.85 else true[1]]
            topics = [topic for topic in world.TOPICS[place] if world.rivals(place, attributes, topic)]
            for topic in rng.choice(topics, min(wrong, len(topics)), replace=False).tolist():
                found = world.rivals(place, attributes, topic)
                shown.append(found[int(rng.integers(len(found)))])
            for fact in shown:
                captions.setdefault(world.meaning(place, fact), world.caption(place, fact, int(rng.integers(12))))
        true_table = torch.tensor([[meaning in row for meaning in captions] for row in said])
        images = augment(scenes.images[chosen].float() / 255, rng)
        yield Batch(images, list(captions.values()), true_table)
        step += 1


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Small shifts, blur and noise, as in what a generator paints; nothing is mirrored, sides are facts."""
    count, _, height, width = images.shape
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    corners = rng.integers(0, 5, (count, 2)).tolist()
    images = torch.stack([padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(corners)])

    def strength(highest: float) -> Tensor:
        drawn = rng.uniform(0, highest, count) * (rng.random(count) < 0.5)
        return torch.from_numpy(drawn).float()[:, None, None, None]

    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images.lerp(smooth, strength(1.0))
    noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return (images + noise * strength(0.08)).clamp(0, 1)


def build_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the captions is one token. EOS has the largest id: CLIP pools there."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Each word once: how often it occurs must not decide whether it becomes one token.
    words = sorted({word for caption in captions for word in caption.replace(",", " ,").split()})
    learner.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, show_progress=False)
    )
    learner.add_special_tokens([BOS, EOS])
    ids = [(token, learner.token_to_id(token)) for token in (BOS, EOS)]
    learner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=CONTEXT
    )


def write_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, weights: dict[str, Tensor] | None = None) -> None:
    """Writes config and tokenizer, and the weights as fp16 safetensors, so that ``local-dir:FOLDER`` loads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    text = {**TEXT_CONFIG, "vocab_size": len(tokenizer)}
    model = {"embed_dim": EMBED_DIM, "vision_cfg": VISION_CONFIG, "text_cfg": text}
    config = {"model_cfg": model, "preprocess_cfg": PREPROCESS_CONFIG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if weights is not None:
        halves = {n: t.half().contiguous() if t.is_floating_point() else t for n, t in weights.items()}
        save_file(halves, folder / "partial")
        os.replace(folder / "partial", folder / "open_clip_model.safetensors")


def train(
    out: Path,
    scenes: Scenes,
    *,
    minutes: float = math.inf,
    steps: int | None = None,
    batch: int = 160,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Trains for so many minutes of wall time or steps, a resumed run's past included, and writes ``out/model/``."""
    import open_clip

    torch.manual_seed(seed)
    folder, checkpoint = out / "model", out / "checkpoint.pt"
    tokenizer = build_tokenizer(world.all_captions())
    write_folder(folder, tokenizer)
    model: CLIP = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        # open_clip starts it at 0.04 beside features of about 1, where in a short training it stays: position, and
        # with it every relation and side, would be invisible to the pooling.
        model.visual.attnpool.positional_embedding.normal_(std=1.0)
    optimizer = _optimizer(model)
    step, spent = _restore(checkpoint, model, optimizer) if resume and checkpoint.is_file() else (0, 0.0)
    started = time.monotonic() - spent
    told = saved = spent
    losses: list[float] = []
    for item in batches(scenes, batch, 2, seed, step):
        spent = time.monotonic() - started
        progress = max(spent / (minutes * 60), step / steps if steps else 0.0)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        losses.append(_update(model, optimizer, item, tokenize(item.captions)))
        step += 1
        if spent - told > 20:
            print(f"{spent / 60:5.1f} min  step {step}  loss {np.mean(losses):.3f}", flush=True)
            told, losses = spent, []
        if spent - saved > 120:
            _save_checkpoint(checkpoint, model, optimizer, step, spent)
            saved = spent
    _save_checkpoint(checkpoint, model, optimizer, step, spent)
    write_folder(folder, tokenizer, model.state_dict())


def _update(model: CLIP, optimizer: torch.optim.Optimizer, batch: Batch, tokens: Tensor) -> float:
    mean, std = (torch.tensor(PREPROCESS_CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.autocast("cpu", torch.bfloat16):
        images = model.encode_image((batch.images - mean) / std, normalize=True)
        captions = model.encode_text(tokens, normalize=True)
    loss = contrastive_loss(images.float(), captions.float(), batch.true, model.logit_scale.exp())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return loss.item()


def _optimizer(model: CLIP) -> torch.optim.Optimizer:
    """AdamW that lets norms, biases and the logit scale be."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    free = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def _restore(file: Path, model: CLIP, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """The number of steps done and the seconds spent on them."""
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["spent"]


def _save_checkpoint(file: Path, model: CLIP, optimizer: torch.optim.Optimizer, step: int, spent: float) -> None:
    partial = file.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}, partial
    )
    os.replace(partial, file)


def _scenes(out: Path, emoji: int, brain_mr: int) -> Scenes:
    """Rendering takes minutes; it is kept for a resumed run."""
    file = out / "scenes.pt"
    if file.is_file():
        stored = torch.load(file, weights_only=True)
        if stored["counts"] == [emoji, brain_mr]:
            return Scenes(stored["images"], stored["facts"])
    scenes = world.render("emoji", emoji) + world.render("brain-mr", brain_mr)
    torch.save({"counts": [emoji, brain_mr], "images": scenes.images, "facts": scenes.facts}, file)
    return scenes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="gets model/, the checkpoint and the rendered scenes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="wall time of the training, without rendering")
    parser.add_argument("--steps", type=int, help="for a machine that is shared; 1000 take about 25 idle minutes")
    parser.add_argument("--emoji", type=int, default=40_000, help="number of emoji scenes")
    parser.add_argument("--brain-mr", type=int, default=12_000, help="number of brain-mr scenes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="goes on from the checkpoint in --out")
    given = parser.parse_args()
    if given.steps is None and given.minutes == math.inf:
        parser.error("say how long to train: --minutes or --steps")
    logging.basicConfig(level=logging.ERROR)  # open_clip warns that a model to be trained has no weights yet
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    scenes = _scenes(given.out, given.emoji, given.brain_mr)
    train(given.out, scenes, minutes=given.minutes, steps=given.steps, seed=given.seed, resume=given.resume)


if __name__ == "__main__":
    main()
