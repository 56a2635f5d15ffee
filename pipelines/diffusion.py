"""A policy over a diffusion model: samples images step by step, and says how likely each step was.

Shape legend: ``B`` samples, ``S`` sampling steps, ``K`` of them asked about, ``C H W`` latents.

The last step. A schedule may end without noise (then its standard deviation is 0: the step is deterministic, has no
likelihood, and is masked out) or with a little (Stable Diffusion's own, 0.02 at eta 1: an ordinary step).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
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
from diffalign.sampling import WindowConfig
from diffalign.types import Capability, Draw, Modality, Prompt, Redrawn, Rollout, Sample, StepLikelihood
from pipelines import backprop, compiling, merging
from pipelines.families import ATTENTION, EVERYTHING, Conditioning, Family, joined
from pipelines.per_image import PerImage
from pipelines.schedules import Schedule
from pipelines.sharding import Divided, Question
from pipelines.table_encoder import FOLDER, Codes, TableEncoder
from pipelines.visiting import Visitors

__all__ = ["ATTENTION", "EVERYTHING", "DiffusionPolicy"]

KNOWN_BYTES = 2**31
"""Memory for the embeddings that are kept, at most: 9078 texts of Stable Diffusion 1.5, or 255 of FLUX."""
Asked = str | Codes
"""What conditions the denoiser: a text, or the codes of a table row."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffusionPolicy:
    """A text-to-image diffusion model that can be aligned."""

    modality: Modality = "image"
    capabilities: frozenset[Capability] = frozenset(
        {"step_log_probs", "step_kl", "log_likelihood", "denoising_residual", "reference", "differentiable_sampling"}
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
        compiled: bool = False,
        seed: int = 0,
        table: TableEncoder | None = None,
        shard: bool = False,
    ) -> None:
        """Trains a LoRA (``adapter``), every weight of the denoiser (``full``), or nothing (sampling only).

        With ``table`` it is the attributes of a prompt that condition the denoiser, in place of its text. ``shard``
        divides the frozen weights of the denoiser among the processes of the run, and ``compiled`` runs its blocks by
        torch.compile, in all that is asked of the policy.
        """
        self.family, self.name = family, name
        self.sampler = sampler or SamplerConfig()
        self.device = torch.device(device)
        self.batch_size = self.sampler.batch_size
        self.precision = DTYPES[precision]
        self.adapter = adapter
        self.gradient_checkpointing, self.shard = gradient_checkpointing, shard
        self._frozen: nn.Module | None = None
        self.table = table.to(self.device) if table is not None else None
        self._text: dict[Asked, Conditioning] = {}
        self._encoded = PerImage()
        self.denoiser_calls = 0
        """Latents that went through the denoiser so far; guidance sends each through twice, and backward passes do not
        count."""
        if shard and full:
            raise ConfigError("shard divides frozen weights among processes, and with full all are trained")
        if shard and compiled:
            raise ConfigError("compile: nobody has tried it with trainer.shard; leave one of the two out")
        if not full:
            family.freeze_in(self.precision)
        encoders = {n: part for n, part in family.components().items() if n.startswith("text_encoder")}
        for name_of, module in family.components().items():
            module.requires_grad_(False).eval()
            if name_of not in encoders and not (shard and module is family.denoiser):
                module.to(self.device)
        self.encoders = Visitors(list(encoders.values()), self.device)
        """The text encoders, which leave a device of little memory once a prompt is encoded."""
        if self.sampler.size is not None:
            family.resize(self.sampler.size)
        self.schedule = family.schedule(self.sampler, self.device)
        if adapter:
            self._add_adapter(adapter, seed)
        elif full:
            self._frozen = copy.deepcopy(family.denoiser)
            family.denoiser.requires_grad_(True)
        if gradient_checkpointing:
            family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            family.denoiser.train()  # diffusers checkpoints in training mode only; no layer here has dropout
        models = [model for model in (family.denoiser, self._frozen) if model is not None]
        self.compiled: Mapping[str, int] = compiling.compile_blocks(models, self.device) if compiled else {}
        """Classes of the denoiser's blocks that are compiled, and how many of each."""
        self._divided = Divided(family.denoiser, self._denoised, self._some, self.device) if shard else None

    def _add_adapter(self, adapter: AdapterConfig, seed: int) -> None:
        named = adapter.targets if isinstance(adapter.targets, list) else self.family.layers[adapter.targets]
        config = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=list(named)
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
        mask = (self.schedule.std > 0).expand(len(prompts), steps)
        return Rollout(samples, torch.stack(log_probs, 1), mask, {"latents": torch.stack(path, 1)})

    def _noise(self, seeds: Sequence[int], count: int) -> Tensor:
        """``count`` draws for each sample, ``(B, count, C, H, W)``, from its own seed: the same on every device."""
        shape = (count, *self.family.latent_shape)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    def _encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Conditioning of ``2B`` rows (negative or empty row first) under guidance, else of ``B``."""
        if self.family.guidance_embedded and (negative := next((p.negative for p in prompts if p.negative), "")):
            raise ConfigError(
                f"negative {negative[:60]!r} belongs to the unconditional pass of guidance, and {self.name} has none:"
                " it takes the guidance scale as an input"
            )
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

    def _embed(self, asked: Sequence[Asked]) -> Conditioning:
        """Embeddings, one after the other. A text or row is encoded once, while not too many others come in between,
        and by itself: in a batch its last bits would depend on the others.
        """
        wanted = dict.fromkeys(asked)
        if missing := [one for one in wanted if one not in self._text]:
            with self.encoders.here():
                self._text |= {one: self._embedded(one) for one in missing}
            if sum(known.nbytes for known in self._text.values()) > KNOWN_BYTES:
                self._text = {one: self._text[one] for one in wanted}
        found = joined([self._text[one] for one in asked])
        if not self.family.guidance_embedded:
            return found
        scale = torch.full((len(found),), float(self.sampler.guidance_scale), device=self.device)
        return replace(found, guidance=scale)

    def _embedded(self, one: Asked) -> Conditioning:
        if isinstance(one, str):
            return self.family.encode_text([one])
        assert self.table is not None
        return Conditioning(self.table.states([one]))

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on (Ho & Salimans 2022), with an unconditional pass of its own."""
        return self.sampler.guidance_scale != 1 and not self.family.guidance_embedded

    def _step_mean(self, latents: Tensor, steps: Tensor, text: Conditioning) -> tuple[Tensor, Tensor]:
        """Mean ``(B, C, H, W)`` and deviation ``(B,)`` of the next latents; rollout and replay both come here."""
        output = self._output(latents, steps, text)
        return self.schedule.mean(latents, output, steps), self.schedule.std[steps]

    def _output(self, latents: Tensor, steps: Tensor, text: Conditioning) -> Tensor:
        """The denoiser's output under guidance, float32 ``(B, C, H, W)``."""
        timesteps = self.schedule.timesteps[steps]
        if not self.guided:
            return self._denoise(latents, timesteps, text)
        unconditional, conditional = self._denoise(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), text).chunk(2)
        return unconditional + self.sampler.guidance_scale * (conditional - unconditional)

    def _denoise(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        self.denoiser_calls += len(latents)
        return (self._divided or self._denoised)(latents, timesteps, text)

    def _denoised(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.family.denoise(latents, timesteps, text).float()

    def _some(self) -> Question:
        """A question for the denoiser that needs no sample: of one image, all 0."""
        latents = torch.zeros(1, *self.family.latent_shape, device=self.device)
        return latents, self.schedule.timesteps[:1], self._embed([self._unasked(Prompt(""))])

    def redraw(self, rollout: Rollout, start: int, *, jump: bool = False, drift: bool = False) -> Redrawn:
        """See DifferentiablePolicy, and ``pipelines.backprop``."""
        return backprop.redraw(self, rollout, start, jump=jump, drift=drift)

    def merged(self) -> AbstractContextManager[None]:
        """For samples alone: inside it the adapter is added into the model's weights (see ``merging``).

        That is exact to rounding, so a replay outside has other last bits, and a ratio that is not exactly 1. Half
        precisions do without: they would round the adapter away. So do divided weights.
        """
        able = self.precision == torch.float32 and not self.shard
        return merging.merged(self.family.denoiser) if able else nullcontext()

    @contextmanager
    def at_epoch(self, epoch: int) -> Iterator[None]:
        """Inside it noise is where that epoch of training, counted from 0, has it: ``sampler.window`` may move."""
        window, schedule = self.sampler.window, self.schedule
        if window is not None and window.every is not None:
            noisy = int((self._scheduled(None).std > 0).sum())
            self.schedule = self._scheduled(window.at(epoch, noisy))
        try:
            yield
        finally:
            self.schedule = schedule

    @contextmanager
    def sampled_by(self, sampler: SamplerConfig) -> Iterator[None]:
        """Inside it samples are made by another sampler's steps and noise; its guidance and size must be the same."""
        mine = self.sampler, self.schedule
        if sampler != self.sampler:
            self.sampler, self.schedule = sampler, self.family.schedule(sampler, self.device)
        try:
            yield
        finally:
            self.sampler, self.schedule = mine

    def _scheduled(self, window: WindowConfig | None) -> Schedule:
        return self.family.schedule(self.sampler.model_copy(update={"window": window}), self.device)

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
        noisy, timesteps, level = self.schedule.noised(clean, noise, draw.time.to(self.device))
        output = self._denoise(noisy, timesteps, self._embed([self._asked(sample.prompt) for sample in samples]))
        return self.schedule.residual(output, clean, noise, level)

    def clean_error(self, residual: Tensor, draw: Draw) -> Tensor:
        """See DenoisingPolicy."""
        _, _, level = self.schedule.noised(residual, residual, draw.time.to(self.device))
        return self.schedule.clean_error(residual, level)

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

    def known(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The latents ``(B, ...)`` that images which this policy just made were decoded from, for ``adopt``."""
        kept = [None if sample.image is None else self._encoded.get(sample.image) for sample in samples]
        found = [latents for latents in kept if latents is not None]
        return {"latents": torch.stack(found)} if found and len(found) == len(kept) else {}

    def adopt(self, samples: Sequence[Sample], known: Mapping[str, Tensor]) -> None:
        """Samples of another process of the run, and what its policy knows of them, as if this one had made them."""
        for sample, latents in zip(samples, known["latents"], strict=True):
            if sample.image is not None:
                self._encoded.put(sample.image, latents.clone())

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
            part, denoiser = self.family.part, self.family.denoiser
            metadata = _collate_lora_metadata({part: denoiser})
            for settings in metadata.values():
                settings["target_modules"] = sorted(settings["target_modules"])
            layers = {f"{part}_lora_layers": get_peft_model_state_dict(denoiser)}
            pipeline.save_lora_weights(folder, **layers, **metadata)
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
