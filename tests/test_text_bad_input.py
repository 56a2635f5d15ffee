"""The real command on texts, and every kind of bad input: one sentence, exit status 2, nothing lost."""

from __future__ import annotations

import http.server
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from apps.cli import main
from diffalign.runs import Run
from tests.tiny_language import tiny_language_model

REWARD = """
def letters(samples):
    return [sample.text.count("a") / 10 for sample in samples]
def silence(samples):
    return [float(sample.text == "") for sample in samples]
letters.modality = silence.modality = "text"
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of letters, a reward, prompts and a configuration; also the working directory."""
    model, tokenizer = tiny_language_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("ab\ncd\nef\ngh\n")
    config = {
        "model": "model",
        "rewards": ["reward.py:letters"],
        "prompts": {"source": "prompts.txt", "train": 2, "held_out": 2},
        "generation": {"max_new_tokens": 8, "batch_size": 8},
        "credit": {"rule": "batch"},
        "trainer": {"epochs": 2, "samples_per_epoch": 8, "batch_size": 4, "learning_rate": 1e-3},
        "evaluation": {"seeds_per_prompt": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def diffalign(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def change(path: Path, **values: object) -> None:
    """Sets entries of a JSON file; None takes one out."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.output


def _no_end(desk: Path) -> None:
    change(desk / "model" / "tokenizer_config.json", eos_token=None)


def _other_tokenizer(desk: Path) -> None:
    change(desk / "model" / "config.json", vocab_size=4)
    (desk / "model" / "model.safetensors").unlink()
    model, _ = tiny_language_model()
    model.resize_token_embeddings(4)
    model.save_pretrained(desk / "model")


def _long_prompt(desk: Path) -> None:
    (desk / "prompts.txt").write_text("ab\ncd\nef\n" + "abcdefgh" * 8 + "\n")


def _nothing(desk: Path) -> None:
    del desk


def _no_weights(desk: Path) -> None:
    (desk / "model" / "model.safetensors").write_bytes(b"\x00" * 64)


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (_no_end, [], "has no end-of-text token"),
        (_other_tokenizer, [], "they do not belong together"),
        (_long_prompt, [], "more than the 64"),
        (_nothing, ["--set", "rewards=[compressibility]"], "image"),
        (_nothing, ["--set", "rewards=[findings-checker]"], "needs a row with plane, contrast"),
        (_no_weights, [], "model"),
        (_nothing, ["--set", "generation.chat=always"], "no chat template"),
        (_nothing, ["--set", "sampler.steps=4"], "sampler"),
        (_nothing, ["--set", "generation.max_new_tokens=0"], "generation.max_new_tokens"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    desk: Path, prepare: Callable[[Path], None], arguments: list[str], message: str
) -> None:
    prepare(desk)
    before = {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()}
    refused(diffalign("align", "run.yaml", *arguments), message)
    assert {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()} == before


def test_a_model_without_a_padding_token_is_aligned(desk: Path) -> None:
    """Padding is masked, so that any token does: the run is the same to the last bit."""
    assert diffalign("align", "run.yaml", "--out", "with").exit_code == 0
    change(desk / "model" / "tokenizer_config.json", pad_token=None)
    change(desk / "model" / "config.json", pad_token_id=None)
    result = diffalign("align", "run.yaml", "--out", "without")
    assert result.exit_code == 0, result.output
    assert adapter(desk / "with") == adapter(desk / "without")


def test_empty_completions_are_scored_and_learned_from(desk: Path) -> None:
    """A model that often ends at once writes empty texts: samples like others, in pairs and in rewards."""
    model, _ = tiny_language_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 8
    model.save_pretrained(desk / "model")
    settings = "--set", "rewards=['reward.py:silence']", "--set", "trainer.samples_per_epoch=64"
    result = diffalign("align", "run.yaml", *settings)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (desk / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["reward/total"] < 1 for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())


class Chat(http.server.ThreadingHTTPServer):
    """A judge that likes every third letter of the alphabet, and is silent after so many answers."""

    def __init__(self, answers: int = 10**6, reply: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.answers, self.reply, self.over = answers, reply, threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.answers -= 1
        if self.server.answers < 0:
            self.server.over.wait(20)
        text = request["messages"][-1]["content"].partition("Answer:\n")[2].partition("\n\n")[0]
        reply = self.server.reply or ("yes" if text[:1] in "adg" else "no")
        body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": reply}}]})
        with suppress(OSError):  # who asked may have given up
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def chat(answers: int = 10**6, reply: str = "") -> Iterator[Chat]:
    server = Chat(answers, reply)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


def judge(server: Chat, extra: str = "") -> tuple[str, ...]:
    return "--set", f"rewards=['judge?url={server.url}&model=m&principles=principles.yaml{extra}']"


def test_a_judge_that_hangs_stops_the_run_and_nothing_is_lost(desk: Path) -> None:
    """Sixteen texts in two epochs: it is silent in the second, and when it is back the run goes on to the same end."""
    (desk / "principles.yaml").write_text("- It is about letters.\n")
    with chat() as server:
        asked = ["align", "run.yaml", "--out", "whole", *judge(server)]
        assert diffalign(*asked).exit_code == 0
        first = 10**6 - server.answers
    with chat(first - 12) as server:
        asked = ["align", "run.yaml", "--out", "stopped", *judge(server, "&timeout=0.3&retries=1")]
        stopped = diffalign(*asked)
        refused(stopped, "gave no answer in 2 tries")
        assert "--resume" in stopped.stderr and Run(desk / "stopped").checkpoints()
        server.answers = 10**6
        resumed = diffalign(*asked, "--resume")
        assert resumed.exit_code == 0, resumed.output
    assert adapter(desk / "stopped") == adapter(desk / "whole")


def test_a_judge_of_nonsense_is_told(desk: Path) -> None:
    (desk / "principles.yaml").write_text("- It is about letters.\n")
    with chat(reply="I like turtles") as server:
        result = diffalign("align", "run.yaml", *judge(server))
    refused(result, "is NaN or infinite for all 8 samples")
