"""``diffalign score`` on texts."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from apps.cli import main
from diffalign.errors import InputError
from diffalign.types import Prompt, Sample
from diffalign.worlds import findings
from rewards.check import check
from rewards.custom import FunctionReward
from rewards.findings_checker import FindingsChecker
from rewards.judge import Judge
from rewards.line import Line, UnreachableError
from tests.test_text_rewards import chat, said

ROOT = Path(__file__).resolve().parent.parent
ROW = "row: plane=axial; contrast=T2; level=ventricles; lesion=none"


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


def words(samples: Sequence[Sample]) -> list[float]:
    return [float(len(sample.text.split())) for sample in samples]  # type: ignore[union-attr]


def characters(texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


@pytest.mark.parametrize("function", [words, characters])
def test_a_function_of_texts_that_does_not_say_so_is_told_how(function: Callable[..., list[float]]) -> None:
    told = str(check(FunctionReward(function, function.__name__, __file__)))
    assert f'says so by {function.__name__}.modality = "text", and reads sample.text' in told


def test_other_failures_get_no_such_hint() -> None:
    """A function that says what it judges, one that fails otherwise, and one that got texts."""

    def stated(samples: Sequence[Sample]) -> list[float]:
        return [sample.nothing for sample in samples]  # type: ignore[attr-defined]

    def divides(samples: Sequence[Sample]) -> list[float]:
        return [1 / 0 for _ in samples]

    stated.modality = "image"  # type: ignore[attr-defined]
    assert "modality" not in str(check(FunctionReward(stated, "stated")))
    assert "modality" not in str(check(FunctionReward(divides, "divides")))
    with pytest.raises(InputError) as error:
        FunctionReward(characters, "characters")([Sample(Prompt("a"), text="b")])
    assert "modality" not in str(error.value)


def test_the_function_of_the_page_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words 12 and 2: minus 0 and minus 10. Without its last line the file of texts is refused with the reason."""
    page = (ROOT / "docs" / "text-rewards.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    rows = [{"prompt": "p", "text": "a " * count} for count in (12, 2)]
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["score", "--reward", "mine.py:score", "--dataset", "texts.jsonl"]
    result = CliRunner().invoke(main, [*command, "--out", "scores.parquet"])
    assert result.exit_code == 0, result.output
    assert pq.read_table("scores.parquet")["score"].to_pylist() == [0.0, -10.0]
    assert CliRunner().invoke(main, ["reward", "check", "mine.py:score"]).exit_code == 0
    Path("other.py").write_text(code.replace('score.modality = "text"', ""))
    other = CliRunner().invoke(main, [*command[:2], "other.py:score", *command[3:]])
    assert other.exit_code == 2 and "judges images, and texts.jsonl holds texts" in other.stderr


@pytest.mark.parametrize("between", [" ", "; ", "\t", "  ;  "])
def test_findings_are_read_from_one_line(between: str) -> None:
    """As from the two lines of the world's own prompt."""
    text = "No lesion at the level of the ventricles on this axial T2 slice."
    one, two = (Sample(Prompt(f"{ROW}{gap}task: findings"), text=text) for gap in (between, "\n"))
    assert FindingsChecker()([one, two]).total.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("prompt", [f"{ROW} task: findings task: explain", f"{ROW} task: sing", f"{ROW}", "a poem"])
def test_a_prompt_without_a_row_names_the_form(prompt: str) -> None:
    with pytest.raises(InputError, match="on the next line 'task: findings'"):
        FindingsChecker()([Sample(Prompt(prompt), text="No lesion.")])


def test_the_rows_of_the_page_are_rows() -> None:
    page = (ROOT / "docs" / "text-rewards.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith('{"prompt": "row: '))
    block = "row: " + page.partition("```text\nrow: ")[2].partition("```")[0]
    assert findings.parse(json.loads(line)["prompt"]) and findings.parse(block)


def test_a_judge_that_talks_nonsense_is_named(tmp_path: Path) -> None:
    """Two principles of each of two texts make four replies. Where one text is judged, that is told below the table."""
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "p", "text": text}) for text in ("good", "odd")))
    with chat(lambda _: said("I like both.")) as server:
        spec = f"judge?url={server.url}&model=tiny"
        result = CliRunner().invoke(main, ["score", "--reward", spec, "--dataset", str(file)])
    assert result.exit_code == 2
    assert "4 of its 4 replies were no answer; at first it was asked yes or no and said 'I like both.'" in result.stderr
    assert "may not know prompts" not in result.stderr
    with chat(lambda request: said("perhaps" if "odd" in str(request["messages"]) else "yes")) as server:
        spec = f"judge?url={server.url}&model=tiny"
        result = CliRunner().invoke(main, ["score", "--reward", spec, "--dataset", str(file)])
    assert result.exit_code == 0, result.output
    assert "judge: 2 of its 4 replies were no answer" in result.stdout
    assert Judge(server.url, "tiny").why_nothing == ""


def test_what_may_help_against_a_slow_server_is_for_the_caller_to_say() -> None:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"timeout": 0.2, "retries": 0, "patience": 1.0}
        with pytest.raises(UnreachableError, match="a smaller max_tokens= may help") as error:
            Judge(url, "tiny", **settings)([Sample(Prompt("p"), text="t")])  # type: ignore[arg-type]
        assert "batch_size" not in str(error.value)
        line = Line(
            url, what="clock", remedy="wait", hurry="wind it up", timeout=0.2, retries=0, patience=1, token_env=""
        )
        with pytest.raises(UnreachableError, match=r"no answer within 0\.2 s; wind it up; wait"):
            line.ask("GET", "/", None, lambda _: {})
