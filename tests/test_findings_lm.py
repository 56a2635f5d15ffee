"""The findings language model: what its training reads and counts, and the folder that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffalign.types import Sample
from diffalign.worlds import findings
from pipelines.embedded import findings_lm
from rewards.findings_checker import FindingsChecker

FOLDER = Path(findings_lm.__file__).parent / "findings-lm"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> findings_lm.Trainer:
    return findings_lm.Trainer(tmp_path_factory.mktemp("work"), 200)


def test_the_loss_counts_the_text_and_its_end_alone(trainer: findings_lm.Trainer) -> None:
    examples = [findings.example(i) for i in range(6)]
    ids, labels = findings_lm.collate(findings_lm.encode(trainer.tokenizer, examples))
    for one, row, label in zip(examples, ids, labels, strict=True):
        counted = label != findings_lm.IGNORED
        assert torch.equal(row[counted], label[counted])
        assert trainer.tokenizer.decode(label[counted]) == one.text + findings_lm.EOS
        before = row[: int(counted.nonzero()[0])]
        assert trainer.tokenizer.decode(before) == findings_lm.BOS + one.prompt.text
        assert (row[int(counted.nonzero()[-1]) + 1 :] == trainer.tokenizer.pad_token_id).all()


def test_the_loss_is_the_mean_over_those_tokens(trainer: findings_lm.Trainer) -> None:
    """Against the library's own loss, and batched with a longer text as alone."""
    rows = findings_lm.encode(trainer.tokenizer, [findings.example(i) for i in range(2)])
    model = trainer.model.eval()
    alone = []
    for row in rows:
        ids, labels = findings_lm.collate([row])
        alone.append(findings_lm.loss_of(model, ids, labels).item())
        assert alone[-1] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
    counts = [len(tokens) - start for tokens, start in rows]
    together = findings_lm.loss_of(model, *findings_lm.collate(rows)).item()
    assert together == pytest.approx(sum(a * n for a, n in zip(alone, counts, strict=True)) / sum(counts), rel=1e-5)


def test_a_training_that_is_resumed_is_the_same(tmp_path: Path) -> None:
    whole = findings_lm.Trainer(tmp_path / "whole", 64)
    for _ in range(4):
        whole.step(4, 1e-3)
    part = findings_lm.Trainer(tmp_path / "part", 64)
    for _ in range(2):
        part.step(4, 1e-3)
    part.checkpoint()
    rest = findings_lm.Trainer(tmp_path / "part", 64)
    rest.resume()
    for _ in range(2):
        rest.step(4, 1e-3)
    assert rest.steps == whole.steps == 4
    for one, other in zip([*whole.parameters, *whole.average], [*rest.parameters, *rest.average], strict=True):
        assert torch.equal(one, other)


def test_what_is_saved_is_a_transformers_folder(trainer: findings_lm.Trainer, tmp_path: Path) -> None:
    trainer.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "chat_template" in json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_the_special_tokens_are_three(tokenizer: AutoTokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == findings_lm.VOCABULARY
    for text in ("Axial T2-weighted: a lesion.\n", "Größe: 3 µm, 日本", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_chat_of_one_question_is_the_plain_prompt(tokenizer: AutoTokenizer) -> None:
    asked = findings.prompts("held-out", 1)[0].text
    chat = [{"role": "user", "content": asked}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "<bos>" + asked
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer(asked)["input_ids"]
    answered = [*chat, {"role": "assistant", "content": "No lesion."}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"<bos>{asked}No lesion.<eos>"


def test_every_prompt_and_text_fits_the_context(tokenizer: AutoTokenizer) -> None:
    rows = findings_lm.encode(tokenizer, [findings.example(i) for i in range(500)])
    assert max(len(tokens) for tokens, _ in rows) <= findings_lm.CONTEXT


def test_the_shipped_model_writes_about_its_row(tokenizer: AutoTokenizer) -> None:
    """At temperature 1 on held-out rows it is right more often than not, and leaves room: 0.7 to 0.95 of the facts.

    The text of another row is right in far fewer.
    """
    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()
    prompts = findings.prompts("held-out", 66)
    torch.manual_seed(0)
    asked = tokenizer([prompt.text for prompt in prompts], return_tensors="pt", padding=True)
    made = model.generate(**asked, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=96)
    texts = tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    checker = FindingsChecker()
    right = checker([Sample(prompt, text=text) for prompt, text in zip(prompts, texts, strict=True)]).total
    crossed = checker(
        [Sample(prompt, text=text) for prompt, text in zip(prompts, [*texts[7:], *texts[:7]], strict=True)]
    )
    assert 0.7 < right.mean() < 0.95
    assert crossed.total.mean() < right.mean() - 0.25
    assert (made == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.95


def test_the_folder_is_small_and_has_a_card() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12e6
    assert not [path for path in FOLDER.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
