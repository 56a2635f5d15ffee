"""Pretrained language models in the formats of llama.cpp and llama2.c, converted once to transformers folders.

Both functions read files as data. The folder holds ``config.json``, ``model.safetensors`` in 32 bits, the tokenizer and
``generation_config.json``, so whatever loads a transformers folder loads it.

Shape legend: ``L`` layers, ``D`` width, ``F`` width inside the feed-forward, ``H`` heads, ``G`` heads of keys and
values, ``V`` vocabulary, ``S`` longest text.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import InputError, NotFoundError

HEADER = struct.Struct("<7i")
"""Of llama2.c: width, feed-forward width, layers, heads, heads of keys and values, vocabulary, longest text."""
VERSIONED = 0x616B3432
"""First number of llama2.c's later formats, "ak42"."""
MOST = 1 << 24
"""No size in a header is larger; what is, is no header."""
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = range(3, 259)
"""Tokens of the single bytes, in every vocabulary that llama2.c uses."""
LONGEST_TOKEN = 1 << 12


def check(form: str) -> None:
    """NotFoundError where a package is missing that converting this form takes."""
    if form == "gguf" and find_spec("gguf") is None:
        raise NotFoundError(
            "reading a GGUF file takes the package gguf, which is not installed; pip install 'diffalign[gguf]'"
        )


# -- GGUF -------------------------------------------------------------------------------------------------------------


def convert_gguf(folder: Path) -> None:
    """Puts a transformers folder in the place of ``model.gguf``; see ``from_gguf``."""
    from_gguf(folder / "model.gguf", folder)
    (folder / "model.gguf").unlink()


def from_gguf(path: Path, folder: Path) -> None:
    """Writes the causal LM of a GGUF file, with its tokenizer and chat template. InputError for a damaged file.

    Quantised weights get the values that their blocks stand for (of Q4_1: ``scale * q + minimum``). transformers and
    the package gguf do the reading.
    """
    check("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path.name} is no GGUF file: it does not begin with GGUF")
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        with redirect_stderr(StringIO()):  # a progress bar that cannot be turned off
            packed = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
            )
    except Exception as error:  # the libraries raise whatever the broken bytes lead to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path.name} is damaged, or no language model in GGUF: {reason}") from error
    _split_digits(path, tokenizer)
    # What was loaded remembers that it was quantised, and refuses to be saved.
    facts = packed.config.to_dict()
    facts.pop("quantization_config", None)
    config = type(packed.config).from_dict(facts)
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    _save(model, tokenizer, folder)


def _split_digits(path: Path, tokenizer: Any) -> None:
    """llama.cpp's pre-tokenizer ``smollm`` takes digits one by one before all else; transformers leaves that out."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import Digits, Sequence

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


# -- llama2.c ---------------------------------------------------------------------------------------------------------


def convert_llama2c(folder: Path) -> None:
    """Puts a transformers folder in the place of ``llama2.data``: a model and behind it its tokenizer."""
    data = folder / "llama2.data"
    from_llama2c(data, folder)
    data.unlink()


def from_llama2c(path: Path, folder: Path) -> None:
    """Writes the model of a file that holds llama2.c's ``model.bin`` (version 0) and then its ``tokenizer.bin``.

    A text ends with the token that begins the next one, ``<s>``, as in llama2.c. InputError for anything else.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    data = path.read_bytes()
    width, inner, layers, heads, key_heads, vocabulary, longest = _header(path, data)
    config = LlamaConfig(
        vocab_size=abs(vocabulary), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=longest, rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0, bos_token_id=1, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    weights, end = _weights(path, data, config)
    pieces, scores = _pieces(path, data[end:], abs(vocabulary))
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    _save(model, _tokenizer(pieces, scores), folder)


def _header(path: Path, data: bytes) -> tuple[int, ...]:
    """The seven numbers at the beginning; a vocabulary below 0 says that the last layer has weights of its own."""
    if len(data) < HEADER.size:
        raise InputError(f"{path.name} is cut off: llama2.c's header has {HEADER.size} bytes, and it has {len(data)}")
    found = HEADER.unpack_from(data)
    if found[0] == VERSIONED:
        raise InputError(f"{path.name} is of version {found[1]} of llama2.c's format; this reads version 0")
    width, _, _, heads, key_heads, vocabulary, _ = found
    sizes = (*found[:5], abs(vocabulary), found[6])
    if not all(0 < size < MOST for size in sizes) or width % heads or heads % key_heads or width // heads % 2:
        raise InputError(f"{path.name} is no model of llama2.c: its header says {', '.join(map(str, found))}")
    return found


def _weights(path: Path, data: bytes, config: Any) -> tuple[dict[str, Tensor], int]:
    """The tensors by the names of transformers, and where they end."""
    tensors, at = {}, HEADER.size
    for name, shape in _layout(config):
        size = math.prod(shape)
        if at + 4 * size > len(data):
            raise InputError(
                f"{path.name} is cut off: {name} ends at byte {at + 4 * size}, and the file has {len(data)}"
            )
        tensors[name] = torch.from_numpy(np.frombuffer(data, "<f4", size, at).reshape(shape).copy())
        at += 4 * size
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    del tensors["rotations"]
    found = {"lm_head": tensors["model.embed_tokens"]}
    for name, tensor in tensors.items():
        if "{}" not in name:
            found[name] = tensor
            continue
        leaf = name.rpartition(".")[2]
        for layer, own in enumerate(tensor):
            found[name.format(layer)] = _halves(own, heads[leaf]) if leaf in heads else own
    return {f"{name}.weight": tensor.contiguous() for name, tensor in found.items()}, at


def _layout(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in the order of the file; all layers of a name stand together."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = width // config.num_attention_heads
    narrow = config.num_key_value_heads * head
    yield "model.embed_tokens", (config.vocab_size, width)
    yield "model.layers.{}.input_layernorm", (layers, width)
    yield "model.layers.{}.self_attn.q_proj", (layers, width, width)
    yield "model.layers.{}.self_attn.k_proj", (layers, narrow, width)
    yield "model.layers.{}.self_attn.v_proj", (layers, narrow, width)
    yield "model.layers.{}.self_attn.o_proj", (layers, width, width)
    yield "model.layers.{}.post_attention_layernorm", (layers, width)
    yield "model.layers.{}.mlp.gate_proj", (layers, inner, width)
    yield "model.layers.{}.mlp.down_proj", (layers, width, inner)
    yield "model.layers.{}.mlp.up_proj", (layers, inner, width)
    yield "model.norm", (width,)
    yield "rotations", (2, config.max_position_embeddings, head // 2)
    if not config.tie_word_embeddings:
        yield "lm_head", (config.vocab_size, width)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection ``(H * 2R, D)`` from pairs that are turned together, side by side in llama2.c, to the order
    of transformers, where the second of each pair stands half a head further.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _pieces(path: Path, data: bytes, count: int) -> tuple[list[str], list[float]]:
    """The tokens and their scores of a ``tokenizer.bin``: the longest token's length, then score, length and bytes."""
    wrong = f"{path.name}: the tokenizer behind the model"
    pieces, scores, at = [], [], 4
    for number in range(count):
        if at + 8 > len(data):
            raise InputError(f"{wrong} is cut off: it has {number} of {count} tokens")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= LONGEST_TOKEN or not math.isfinite(score):
            raise InputError(f"{wrong} is damaged: token {number} has {length} bytes and the score {score:g}")
        raw = data[at : at + length]
        at += length
        pieces.append(_piece(wrong, number, raw))
        scores.append(score)
    if at != len(data):
        raise InputError(f"{wrong} ends at byte {at}, and there are {len(data)}")
    if count <= BYTES.stop or len(set(pieces)) != count:
        raise InputError(f"{wrong} is no vocabulary of llama2.c: {count} tokens, {len(set(pieces))} of them different")
    return pieces, scores


def _piece(wrong: str, number: int, raw: bytes) -> str:
    """A token as sentencepiece writes it: specials first, then the single bytes, then texts with ▁ for a space."""
    if number < BYTES.start:
        return SPECIAL[number]
    if number in BYTES:
        byte = number - BYTES.start
        # Older exports hold the byte itself, or the character of that number.
        if raw not in (b"<0x%02X>" % byte, bytes([byte]), chr(byte).encode()):
            raise InputError(f"{wrong} is no vocabulary of llama2.c: token {number} is not the byte {byte}")
        return f"<0x{byte:02X}>"
    try:
        return raw.decode("utf-8").replace(" ", "▁")
    except UnicodeDecodeError:
        raise InputError(f"{wrong} is damaged: token {number} is not UTF-8") from None


def _tokenizer(pieces: list[str], scores: list[float]) -> Any:
    """Llama's tokenizer: two neighbours become one token where that is in the vocabulary, the best score first."""
    from transformers import LlamaTokenizer

    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return LlamaTokenizer(
        vocab=vocabulary, merges=_merges(vocabulary, scores), bos_token="<s>", eos_token="<s>", unk_token="<unk>",
        pad_token="<s>", add_bos_token=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a third, in the order in which they are tried."""
    found = []
    for piece, number in vocabulary.items():
        if number in BYTES or number < BYTES.start:
            continue
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        found += [(-scores[number], number, vocabulary[a], a, b) for a, b in known]
    return [(a, b) for *_, a, b in sorted(found)]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
