"""A policy over a diffusion model: samples images step by step, and says how likely each step was.

Shape legend: ``B`` samples, ``S`` sampling steps, ``K`` of them asked about, ``C H W`` latents, ``L D`` text.

The last step. A schedule may end without noise (then its standard deviation is 0: the step is deterministic, has no
likelihood, and is masked out) or with a little (Stable Diffusion's own, 0.02 at eta 1: an ordinary step).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffalign import denoising, images
from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import ConfigError, InputError
from diffalign.runs import new_folder
from diffalign.types import Capability, Draw, Modality, Prompt, Rollout, Sample, StepLikelihood
from pipelines.families import Family
from pipelines.per_image import PerImage
from pipelines.table_encoder import FOLDER, Codes, TableEncoder

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"]
KNOWN_TEXTS = 2048
"""Embeddings that are kept: 0.5 GB of Stable Diffusion 1.5's."""
Asked = str | Codes
"""What conditions the denoiser: a text, or the codes of a table row."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffusionPolicy:
    """A text-to-image diffusion model that can be aligned."""

    modality: Modality = "image"
    capabilities: frozenset[Capability] = frozenset(
        {"step_log_probs", "step_kl", "log_likelihood", "denoising_residual", "reference"}
    )
    steps_at_once: int | None = 1
    reduction: Literal["mean", "sum"] = "mean"

    def __init__(
        self,
        family: Family,
        *,
        name: str = "diffusion",
        adapter: AdapterConfig | None = None,
        full: bool = False,
        sampler: SamplerConfig | None = None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        gradient_checkpointing: bool = False,
        seed: int = 0,
        table: TableEncoder | None = None,
    ) -> None:
        """Trains a LoRA (``adapter``), every weight of the denoiser (``full``), or nothing (sampling only).

        With ``table`` it is the attributes of a prompt that condition the denoiser, in place of its text.
        """
        self.family, self.name = family, name
        self.sampler = sampler or SamplerConfig()
        self.device = torch.device(device)
        self.batch_size = self.sampler.batch_size
        self.precision = DTYPES[precision]
        self.adapter = adapter
        self.gradient_checkpointing = gradient_checkpointing
        self._frozen: nn.Module | None = None
        self.table = table.to(self.device) if table is not None else None
        self._text: dict[Asked, Tensor] = {}
        self._encoded = PerImage()
        pipeline = family.pipeline
        for module in (pipeline.vae, pipeline.text_encoder, family.denoiser):
            module.requires_grad_(False).eval().to(self.device)
        timesteps, before, after = family.schedule(self.sampler.steps)
        self.timesteps = timesteps.to(self.device)
        self.signal, self.next_signal = before.to(self.device), after.to(self.device)
        self.std = denoising.ddim_std(self.signal, self.next_signal, self.sampler.eta)
        if adapter:
            self._add_adapter(adapter, seed)
        elif full:
            self._frozen = copy.deepcopy(family.denoiser)
            family.denoiser.requires_grad_(True)
        if gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            family.denoiser.train()  # diffusers checkpoints in training mode only; no layer here has dropout

    def _add_adapter(self, adapter: AdapterConfig, seed: int) -> None:
        targets = {"attention": ATTENTION, "all": EVERYTHING}.get(str(adapter.targets), adapter.targets)
        config = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=targets
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.family.denoiser.add_adapter(config)  # type: ignore[operator]
            except ValueError as error:
                raise ConfigError(f"adapter.targets {adapter.targets}: {error}") from None
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()

    # -- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
        """See Policy. Latents are kept in float32, so that a replay sees exactly what sampling saw."""
        noise = self._noise(seeds, self.sampler.steps + 1)
        text, steps = self._encode(prompts), self.sampler.steps
        path, log_probs = [noise[:, 0]], []
        for step in range(steps):
            mean, std = self._step_mean(path[-1], torch.full((len(prompts),), step, device=self.device), text)
            path.append(mean + denoising.expand(std, mean) * noise[:, step + 1])
            log_probs.append(denoising.log_density(path[-1], mean, std))
        pictures = images.to_pil(self.family.decode(path[-1]))
        for picture, latents in zip(pictures, path[-1].cpu(), strict=True):
            self._encoded.put(picture, latents.clone())  # what it was decoded from: the autoencoder would blur it
        samples = tuple(
            Sample(prompt, image=image, seed=seed) for prompt, image, seed in zip(prompts, pictures, seeds, strict=True)
        )
        mask = (self.std > 0).expand(len(prompts), steps)
        return Rollout(samples, torch.stack(log_probs, 1), mask, {"latents": torch.stack(path, 1)})

    def _noise(self, seeds: Sequence[int], count: int) -> Tensor:
        """``count`` draws for each sample, ``(B, count, C, H, W)``, from its own seed: the same on every device."""
        shape = (count, *self.family.latent_shape)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    def _encode(self, prompts: Sequence[Prompt]) -> Tensor:
        """Conditioning ``(2B, L, D)`` (negative or empty row first) under guidance, else ``(B, L, D)``."""
        asked = [self._asked(prompt) for prompt in prompts]
        if self.guided:
            asked = [self._unasked(prompt) for prompt in prompts] + asked
        return self._embed(asked)

    def _asked(self, prompt: Prompt) -> Asked:
        """The prompt's text, or the codes of its row, which may have more columns than the encoder reads.

        Raises ConfigError where it has none of them.
        """
        if self.table is None:
            return prompt.text
        cells = {name: prompt.attributes[name] for name in self.table.columns if name in prompt.attributes}
        if not cells:
            raise ConfigError(
                f"prompt {prompt.key[:60]!r} has no table row to condition on; the table encoder of {self.name} reads"
                f" {', '.join(self.table.columns)}"
            )
        return self.table.codes(cells)

    def _unasked(self, prompt: Prompt) -> Asked:
        """What conditions the unconditional branch of guidance."""
        if self.table is None:
            return prompt.negative
        if prompt.negative:
            raise ConfigError(
                f"negative {prompt.negative[:60]!r} is a text, and the model is conditioned on table rows"
            )
        return self.table.empty

    def _embed(self, asked: Sequence[Asked]) -> Tensor:
        """Embeddings ``(B, L, D)``. A text or row is encoded once, while not too many others come in between, and by
        itself: in a batch its last bits would depend on the others.
        """
        missing = [one for one in dict.fromkeys(asked) if one not in self._text]
        if len(self._text) + len(missing) > KNOWN_TEXTS:
            self._text = {one: self._text[one] for one in dict.fromkeys(asked) if one in self._text}
        for one in missing:
            if isinstance(one, str):
                self._text[one] = self.family.encode_text([one])[0]
            else:
                assert self.table is not None
                self._text[one] = self.table.states([one])[0]
        return torch.stack([self._text[one] for one in asked])

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on (Ho & Salimans 2022)."""
        return self.sampler.guidance_scale != 1

    def _step_mean(self, latents: Tensor, steps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(B, C, H, W)`` and deviation ``(B,)`` of the next latents; rollout and replay both come here."""
        timesteps = self.timesteps[steps]
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            if self.guided:
                output = self.family.denoise(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), text)
            else:
                output = self.family.denoise(latents, timesteps, text)
        output = output.float()
        if self.guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self.sampler.guidance_scale * (conditional - unconditional)
        clip = getattr(self.family, "clip", None)
        clean, noise = denoising.clean_and_noise(latents, output, self.signal[steps], self.family.prediction, clip=clip)
        std = self.std[steps]
        return denoising.ddim_mean(clean, noise, self.next_signal[steps], std), std

    # -- likelihood -------------------------------------------------------------------------------------------------

    def step_log_probs(self, rollout: Rollout, steps: Tensor, *, kl: bool = False) -> StepLikelihood:
        """See Policy. All ``B * K`` steps go through the denoiser in one batch."""
        count, asked = steps.shape
        rows = torch.arange(count).repeat_interleave(asked)
        flat = steps.reshape(-1)
        latents = rollout.state["latents"]
        now, then = latents[rows, flat].to(self.device), latents[rows, flat + 1].to(self.device)
        text = self._encode([rollout.samples[row].prompt for row in rows.tolist()])
        flat = flat.to(self.device)
        reference = None
        if kl:
            with torch.no_grad(), self.reference():
                reference, _ = self._step_mean(now, flat, text)
        mean, std = self._step_mean(now, flat, text)
        log_probs = denoising.log_density(then, mean, std).reshape(count, asked)
        if reference is None:
            return StepLikelihood(log_probs)
        return StepLikelihood(log_probs, denoising.gaussian_kl(mean, reference, std).reshape(count, asked))

    def log_likelihood(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        """See Policy: minus the mean squared denoising error at the draw, without guidance (Wallace et al. 2023).

        A surrogate: the evidence lower bound at one noise level, unweighted. Images of another size are scaled and cut;
        an image that this policy just made has the latents that it was decoded from.
        """
        return -denoising.denoising_error(self.denoising_residual(samples, draw))

    def denoising_residual(self, samples: Sequence[Sample], draw: Draw) -> Tensor:
        """See DenoisingPolicy: ``(B, C, H, W)``."""
        clean = self._latents(samples)
        noise = self._noise(draw.seeds, 1)[:, 0]
        timesteps, signal = self.family.noise_level(draw.time.to(self.device))
        noisy = denoising.noised(clean, noise, signal)
        text = self._embed([self._asked(sample.prompt) for sample in samples])
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            output = self.family.denoise(noisy, timesteps, text)
        return denoising.denoising_residual(output.float(), clean, noise, signal, self.family.prediction)

    def _latents(self, samples: Sequence[Sample]) -> Tensor:
        """Latents ``(B, C, H, W)`` of the samples' images. An image is encoded once, and by itself: in a batch its last
        bits would depend on the others, and a resumed run on what was encoded before.
        """
        width, height = self.family.image_size()
        latents = []
        for sample in samples:
            if sample.image is None:
                missing = sum(sample.image is None for sample in samples)
                raise InputError(f"{missing} of {len(samples)} samples have no image")
            known = self._encoded.get(sample.image)
            if known is None:
                pixels = images.to_tensor([images.fit(images.to_rgb(sample.image), width, height)])
                known = self.family.encode(pixels.to(self.device))[0].cpu()
                self._encoded.put(sample.image, known)
            latents.append(known)
        return torch.stack(latents).to(self.device)

    def reference(self) -> AbstractContextManager[None]:
        """See Policy: adapters off, or the frozen copy when every weight is trained."""
        if self.adapter:
            return self._adapters_off()
        return self._swapped() if self._frozen is not None else nullcontext()

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        self.family.denoiser.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            self.family.denoiser.enable_adapters()  # type: ignore[operator]

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        trained = self.family.denoiser
        assert self._frozen is not None
        self.family.denoiser = self._frozen
        try:
            yield
        finally:
            self.family.denoiser = trained

    # -- what is trained --------------------------------------------------------------------------------------------

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """See Policy."""
        return {name: p for name, p in self.family.denoiser.named_parameters() if p.requires_grad}

    def save(self, run: Path) -> Path:
        """See Policy. The adapter loads with ``load_lora_weights``, the full model with ``from_pretrained``."""
        pipeline = self.family.pipeline
        if not self.adapter:
            with new_folder(run / "model") as folder:
                pipeline.save_pretrained(folder)
                if self.table is not None:
                    self.table.save(folder / FOLDER)
            return run / "model"
        with new_folder(run / "adapter") as folder:
            metadata = _collate_lora_metadata({"unet": self.family.denoiser})
            for settings in metadata.values():
                settings["target_modules"] = sorted(settings["target_modules"])
            pipeline.save_lora_weights(
                folder, unet_lora_layers=get_peft_model_state_dict(self.family.denoiser), **metadata
            )
            for file in folder.glob("*.safetensors"):
                _sort_header(file)
        return run / "adapter"


def _sort_header(file: Path) -> None:
    """Gives a safetensors file the one header that its content has: its writer shuffles the metadata at every call.

    The format is 8 bytes of header length, the header as JSON padded with spaces to a multiple of 8, then the tensors.
    """
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
