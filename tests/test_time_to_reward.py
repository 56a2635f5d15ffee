"""The benchmark of the time to a better model: what it would run, what it counts, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import time_to_reward as bench
from benchmarks import time_to_reward_page as page


@pytest.mark.parametrize("task", bench.TASKS)
@pytest.mark.parametrize("name", bench.METHODS)
def test_every_method_is_a_configuration_that_the_engine_takes(task: str, name: str) -> None:
    config = bench.configuration(task, name, seed=2)
    assert config.sampler.eta == (1.0 if name in bench.NOISY else 0.0)
    assert config.seed == 2 and config.name == "time-to-reward" and config.device == "cpu"
    assert config.experience.source in bench.SOURCES and config.trainer.samples_per_epoch == 64


def test_moments_begin_before_training_and_end_with_it() -> None:
    assert bench.moments(8) == [0, 2, 4, 6, 8]
    assert bench.moments(24) == [0, 2, 4, 6, 8, 16, 24]
    assert bench.moments(3) == [0, 2, 3]


def recorded() -> dict[str, Any]:
    """Two prompts. DDPO ends at a mean of 0.75 over its two seeds; ELBO-PG is there at its second measurement, 300
    calls; ReST never."""

    def run(*points: tuple[int, float, float]) -> dict[str, Any]:
        return {
            "settings": {"objective": {"name": "x"}},
            "points": [
                {
                    "epoch": i, "images": 64 * i, "denoiser calls": calls, "accuracy": [first, second],
                    "everything": [first, second], "seconds": {"wall": 2.0 * calls, "processor": calls / 10},
                } for i, (calls, first, second) in enumerate(points)
            ],
        }  # fmt: skip

    return {
        "date": "2026-01-01", "versions": {"torch": "1"}, "common": {"device": "cpu"},
        "machine": {"cpu": "c", "cores": 2, "memory_gb": 3, "system": "s", "threads": 1},
        "tasks": {
            "emoji": {"settings": {"model": "embedded:emoji"}, "runs": {
                "DDPO": {
                    "0": run((0, 0.4, 0.6), (1000, 0.5, 0.7), (2000, 0.6, 0.8)),
                    "1": run((0, 0.4, 0.6), (1000, 0.6, 0.8), (2000, 0.7, 0.9)),
                },
                "ELBO-PG": {"0": run((0, 0.4, 0.6), (300, 0.7, 0.8), (600, 0.8, 0.9))},
                "ReST": {"0": run((0, 0.4, 0.6), (500, 0.5, 0.5))},
            }},
            "brain-mr": {"settings": {"model": "embedded:brain-mr"}, "runs": {}},
        },
    }  # fmt: skip


@pytest.mark.parametrize("measure", page.MEASURES)
def test_the_table_says_when_each_method_reached_the_level_of_ddpo(measure: str) -> None:
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in
            page.tables(recorded())[f"emoji-{measure}"].splitlines()}  # fmt: skip
    assert rows["DDPO"][0] == "2" and rows["DDPO"][2].startswith("0.750 (")
    assert rows["DDPO"][4:] == ["128", "2,000", "200", "1/1.0"]
    assert rows["ELBO-PG"][1] == "0.500" and rows["ELBO-PG"][4:] == ["64", "300", "30", "1/6.7"]
    assert rows["ReST"][4:] == ["not reached", "", "", ""]


def test_page_and_picture_are_written_from_the_results(tmp_path: Path) -> None:
    text = Path(bench.__file__).with_suffix(".md").read_text()
    (tmp_path / "page.md").write_text(text)
    page.write(recorded(), tmp_path / "page.md", tmp_path / "picture.png")
    made = (tmp_path / "page.md").read_text()
    assert "| ELBO-PG | 1 | 0.500 |" in made and "2026-01-01" in made and "embedded:emoji" in made
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (page.WIDTH, page.TOP + 2 * page.HEIGHT)
    (tmp_path / "page.md").write_text(text.replace("<!-- emoji-accuracy -->", ""))
    with pytest.raises(ValueError, match="no place for the table 'emoji-accuracy'"):
        page.write(recorded(), tmp_path / "page.md", tmp_path / "picture.png")


def test_ticks_are_round() -> None:
    assert [page.nice(value) for value in (0.9, 1.0, 1.2, 3.0, 7.0, 1800.0)] == [1.0, 1.0, 2.0, 5.0, 10.0, 2000.0]


def test_a_run_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are made once, and the results keep what is there, whatever was asked for, unless settings changed."""
    made: list[tuple[str, str, int]] = []
    out = tmp_path / "results.json"

    def run(task: str, name: str, seed: int) -> list[dict[str, Any]]:
        made.append((task, name, seed))
        return recorded()["tasks"]["emoji"]["runs"]["DDPO"]["0"]["points"]  # type: ignore[no-any-return]

    def collected(*arguments: str) -> dict[str, Any]:
        bench.collect(bench.parse_arguments(["--out", str(out), "--tasks", "emoji", *arguments]))
        return json.loads(out.read_text())["tasks"]  # type: ignore[no-any-return]

    monkeypatch.setattr(bench, "run", run)
    first = collected("--only", "DDPO", "--seeds", "0", "1")
    assert list(first["emoji"]["runs"]) == ["DDPO"] and first["brain-mr"]["runs"] == {}
    second = collected("--only", "DDPO", "ReST", "--seeds", "0")["emoji"]["runs"]
    assert made == [("emoji", "DDPO", 0), ("emoji", "DDPO", 1), ("emoji", "ReST", 0)]
    assert {name: list(own) for name, own in second.items()} == {"DDPO": ["0", "1"], "ReST": ["0"]}
    collected("--only", "DDPO", "--seeds", "0", "--again")
    assert made[3:] == [("emoji", "DDPO", 0)]
    monkeypatch.setitem(bench.METHODS, "ReST", bench.METHODS["ReST"] | {"trainer": bench.trainer(2, 1e-3)})
    assert list(collected("--only", "ReST", "--seeds", "1")["emoji"]["runs"]["ReST"]) == ["1"]
    monkeypatch.setitem(bench.COMMON, "device", "cuda")
    assert {name: list(own) for name, own in collected("--only", "GRPO", "--seeds", "2")["emoji"]["runs"].items()} == {
        "GRPO": ["2"]
    }
