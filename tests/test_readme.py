"""The library examples of the README and of the page on texts run as they stand there; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipelines.loading import EMBEDDED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Trainer" in code)
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / "emoji", safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "runs" / "from-python" / "adapter")


def test_the_text_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not given follows the model: the page says which defaults that gives."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "two-modalities.md").read_text(), re.DOTALL)
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    exec(compile(example, "two-modalities.md", "exec"), known)
    objective = known["trainer"].objective
    assert (objective.reduction, objective.clip_range, objective.kl_coefficient) == ("sum", 0.2, 0.02)
    assert known["trainer"].epoch == 2 and known["trainer"].updates > 0
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "findings-lm")
    adapted = PeftModel.from_pretrained(base, tmp_path / "runs" / "texts-from-python" / "adapter")
    assert any(bool(values.any()) for name, values in adapted.named_parameters() if "lora_B" in name)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links and all((ROOT / link).exists() for link in links if "://" not in link), links


def test_both_commands_are_there() -> None:
    assert "make quickstart" in README and "make test" in README
