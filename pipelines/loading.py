"""From the name of a model to a policy over it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import LocalEntryNotFoundError
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from diffalign.config import AdapterConfig, GenerationConfig, SamplerConfig
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Modality
from pipelines.complete import lacking, require_weights, transformers_complete
from pipelines.diffusion import DTYPES, DiffusionPolicy
from pipelines.families import FAMILIES, Family
from pipelines.language import LanguagePolicy
from pipelines.naming import EMBEDDED, embedded_models, locate, modality_of
from pipelines.table_encoder import FOLDER, TableEncoder

__all__ = [
    "EMBEDDED",
    "embedded_models",
    "load_adapter",
    "load_family",
    "load_language_model",
    "load_policy",
    "load_table_encoder",
    "locate",
    "modality_of",
]

_MARKER = re.compile(r"<.*>|\[.*\]", re.DOTALL)
"""Tokens that are signs to the model and no part of a text, such as ``<|endoftext|>``."""


def load_family(model: str, precision: torch.dtype = torch.float32) -> Family:
    """The pipeline of a model, behind the interface of its family: in float32, but for what the family keeps in less
    when the denoiser computes in ``precision``. That is read as it is kept: a checkpoint that is saved
    so never has a float32 copy.
    """
    where = locate(model)
    local = isinstance(where, Path)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        config = DiffusionPipeline.load_config(where, local_files_only=local)
    except Exception as error:
        raise _not_loaded(model, local, error) from error
    kind = config.get("_class_name")
    if kind not in FAMILIES:
        raise ConfigError(f"model {model} is a {kind}; what can be aligned is {', '.join(FAMILIES)}")
    # A part that was left out of a checkpoint, such as SD3's T5, must be left out by name.
    options: dict[str, Any] = {name: None for name, value in config.items() if value == [None, None]}
    if kind == StableDiffusionPipeline.__name__:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    parts = [name for name, value in config.items() if isinstance(value, list) and name not in options]
    dtypes = {"default": torch.float32, **FAMILIES[kind].kept_in(precision, parts)}
    try:
        with transformers_complete(model):
            pipeline = DiffusionPipeline.from_pretrained(
                where, dtype=dtypes, use_safetensors=True, local_files_only=local, **options
            )
    except InputError:
        raise
    except Exception as error:
        raise _not_loaded(model, local, error) from error
    for part, loaded in pipeline.components.items():
        if isinstance(loaded, PreTrainedTokenizerBase):
            _require_words(loaded, model, part)
        elif isinstance(loaded, torch.nn.Module):
            require_weights(model, part, loaded)
    pipeline.set_progress_bar_config(disable=True)
    family: Family = FAMILIES[type(pipeline).__name__](pipeline)
    return family


def load_language_model(model: str) -> tuple[Any, Any]:
    """The causal LM of that name in float32, and its tokenizer."""
    where = locate(model)
    local = isinstance(where, Path)
    transformers_logging.disable_progress_bar()
    try:
        options = {"local_files_only": local}
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        found, info = AutoModelForCausalLM.from_pretrained(
            where, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:
        raise _not_loaded(model, local, error) from error
    _require_words(tokenizer, model, "tokenizer")
    if info["missing_keys"]:
        raise lacking(model, "network", sorted(info["missing_keys"]))
    return found, tokenizer


def _require_words(tokenizer: PreTrainedTokenizerBase, model: str, part: str) -> None:
    """Where its files are missing, transformers makes a tokenizer that knows no word, and every prompt is the same."""
    if not any(any(map(str.isalnum, token)) for token in tokenizer.get_vocab() if not _MARKER.fullmatch(token)):
        raise InputError(
            f"model {model} cannot be loaded: its {part} knows no word, so files of its vocabulary (tokenizer.json,"
            " vocab.json, merges.txt, spiece.model) are missing"
        )


def _not_loaded(model: str, local: bool, error: Exception) -> InputError | NotFoundError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if local:
        return InputError(f"model {model} cannot be loaded, its files are incomplete or corrupt: {reason}")
    if (first := _unreached(error)) is not None:
        return NotFoundError(
            f"model {model} is not on this machine, and the hub could not be reached ({first}); give a local folder, or"
            " try again with a connection"
        )
    return NotFoundError(f"model {model} is not on this machine and could not be fetched: {reason}")


def _unreached(error: BaseException) -> str | None:
    """Why the hub could not be reached, where that is what came first: the libraries say that a file is missing."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return str(chain[-1]) if any(isinstance(one, LocalEntryNotFoundError) for one in chain) else None


def load_policy(  # noqa: PLR0913 - one keyword for each choice that a model is loaded with
    model: str,
    *,
    modality: Modality | None = None,
    adapter: AdapterConfig | None = None,
    full: bool = False,
    critic: bool = False,
    sampler: SamplerConfig | None = None,
    generation: GenerationConfig | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    shard: bool = False,
    seed: int = 0,
    name: str | None = None,
    condition: Literal["text", "table"] = "text",
) -> DiffusionPolicy | LanguagePolicy:
    """The model of that name, to sample from, or to align by a LoRA (``adapter``) or in every weight (``full``).

    ``modality`` is needed for a language model of the hub only. ``sampler`` is for images, ``generation`` for texts;
    raises ConfigError for the other's.
    ``shard`` divides the frozen weights of an image model's denoiser among the processes of the run.
    ``condition="table"`` conditions an image model on the attributes of its prompts, by its table encoder.
    """
    options: dict[str, Any] = {
        "name": name or model, "adapter": adapter, "full": full, "device": device, "precision": precision,
        "gradient_checkpointing": gradient_checkpointing, "seed": seed,
    }  # fmt: skip
    if (modality or modality_of(model)) == "text":
        if condition == "table":
            raise ConfigError(f"condition table: {model} makes texts, and only image models have a table encoder")
        if compiled:
            raise ConfigError(f"compile: {model} makes texts, and only the blocks of image models are compiled")
        if sampler is not None:
            raise ConfigError(f"sampler: {model} makes texts; say by generation=GenerationConfig(...) how")
        if shard:
            raise ConfigError(f"trainer.shard: {model} makes texts, and only denoisers are divided among processes")
        return LanguagePolicy(*load_language_model(model), generation=generation, critic=critic, **options)
    if generation is not None:
        raise ConfigError(f"generation: {model} makes images; say by sampler=SamplerConfig(...) how")
    if critic:
        raise ConfigError(f"credit.rule gae: {model} makes images, and no critic says what a denoising step is worth")
    options |= {"sampler": sampler, "shard": shard, "compiled": compiled}
    kept = torch.float32 if full else DTYPES[precision]
    if condition == "text":
        return DiffusionPolicy(load_family(model, kept), **options)
    table, family = load_table_encoder(model), load_family(model, kept)
    text = family.encode_text([""])
    if text.pooled is not None or text.mask is not None:
        raise ConfigError(
            f"condition table: {model} is a {type(family.pipeline).__name__}, whose denoiser reads more of a text than"
            " its tokens; table encoders are for StableDiffusionPipeline checkpoints"
        )
    if (wide := table.sizes["width"]) != (wanted := text.tokens.shape[-1]):
        raise InputError(f"table encoder of {model} makes tokens of width {wide}, and the denoiser reads {wanted}")
    return DiffusionPolicy(family, table=table, **options)


def load_table_encoder(model: str) -> TableEncoder:
    """The table encoder of an image model. Raises NotFoundError where it has none."""
    where = locate(model)
    if not isinstance(where, Path) or not (where / FOLDER).is_dir():
        raise NotFoundError(
            f"condition table: {model} has no table encoder, a folder {FOLDER}, which turns a row into conditioning"
        )
    return TableEncoder.load(where / FOLDER)


def load_adapter(policy: DiffusionPolicy | LanguagePolicy, folder: Path) -> None:
    """Puts the weights of a saved adapter into a policy that was built with the same adapter settings."""
    if isinstance(policy, LanguagePolicy):
        _load_language_adapter(policy, folder)
        return
    try:
        state = policy.family.pipeline.lora_state_dict(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"adapter {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    state = state[0] if isinstance(state, tuple) else state
    weights = {name.removeprefix(f"{policy.family.part}."): tensor for name, tensor in state.items()}
    result = set_peft_model_state_dict(policy.family.denoiser, weights)
    if result.unexpected_keys:
        raise InputError(f"adapter {folder} does not fit the model: unexpected {result.unexpected_keys[0]}")


def _load_language_adapter(policy: LanguagePolicy, folder: Path) -> None:
    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        raise InputError(f"adapter {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    result = set_peft_model_state_dict(policy.model, weights)
    if result.unexpected_keys:
        raise InputError(f"adapter {folder} does not fit the model: unexpected {result.unexpected_keys[0]}")
