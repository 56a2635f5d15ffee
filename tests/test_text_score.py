"""``diffalign score`` on texts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
from click.testing import CliRunner

from apps.cli import main


def test_texts_are_scored_and_broken_rows_named(tmp_path: Path) -> None:
    rows = [{"prompt": "say it", "text": "one two three"}, {"prompt": "say it", "text": "one"}, {"prompt": "say it"}]
    file, out = tmp_path / "texts.jsonl", tmp_path / "scores.parquet"
    file.write_text("\n".join(map(json.dumps, rows)))
    result = CliRunner().invoke(
        main, ["score", "--reward", "length?target=2", "--dataset", str(file), "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "n 2" in result.output and "3" in result.stderr and "no text" in result.stderr
    assert pq.read_table(out)["score"].to_pylist() == [-1.0, -1.0]


def test_a_file_without_texts_says_what_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n')
    result = CliRunner().invoke(main, ["score", "--reward", "length?target=2", "--dataset", str(file)])
    assert result.exit_code == 2
    assert "has the columns answer, question; texts need prompt, and completion or text" in result.stderr
