"""The README's library example runs as it stands there, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

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


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links and all((ROOT / link).exists() for link in links if "://" not in link), links


def test_both_commands_are_there() -> None:
    assert "make quickstart" in README and "make test" in README
