"""The benchmarks' own arithmetic, on made-up results: nothing is timed here, and TRL is not needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import profile, profile_page, trl_alignprop, trl_ddpo_page, trl_grpo_page, trl_level, trl_level_page
from benchmarks.alignprop_sides import Calls
from benchmarks.levels import Levels, fastest, levels, outcome
from benchmarks.measuring import CallCounter

RECORDED = Path(trl_level.__file__).parent


def point(epoch: int, wall: float, accuracy: float, cpu: float | None = None) -> dict[str, Any]:
    """A measurement: an epoch makes 64 images in 640 calls, and trains on 576 of them."""
    return {
        "epoch": epoch, "wall": wall, "cpu": wall if cpu is None else cpu, "accuracy": accuracy,
        "ci95": [accuracy - 0.05, accuracy + 0.05], "images": 64 * epoch, "forward": 640 * epoch,
        "backward": 576 * epoch, "reward": None,
    }  # fmt: skip


OURS = [point(0, 0, 0.70), point(2, 40, 0.78), point(4, 80, 0.83), point(6, 120, 0.81), point(8, 160, 0.84)]


def results(theirs: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """What a race records, with one run of TRL."""
    settings = {
        "model": "embedded:x",
        "reward": "judge?graded=true",
        "prompts": "x, 9 to train on",
        "steps, eta": "10, 1",
    }
    ready = {
        "settings": settings, "epochs": 8, "parameters": 5_000_000, "trainable": 1000, "checker": "judge",
        "held_out": {"prompts": 4, "images": 16}, "versions": {"trl": "0.23.1"},
    }  # fmt: skip
    runs = [
        {"name": "diffalign", "ready": ready, "points": OURS, "failed": ""},
        {"name": "TRL, guidance 3", "ready": ready | {"epochs": None}, "points": theirs, "failed": ""},
    ]
    machine = {"cpu": "a", "cores": 2, "memory_gb": 8, "system": "b", "threads": 1, "load_average": [0.5, 0.4, 0.3]}
    made: dict[str, Any] = {
        "date": "2026-01-01", "machine": machine, "command": "--every 2", "every": 2, "minutes": 8, "overrides": [],
        "recipe": "quickstart", "asked": {}, "runs": runs,
    }  # fmt: skip
    return made | changes


# -- where time goes ------------------------------------------------------------------------------------------------


def test_a_part_has_its_own_seconds_and_not_those_of_the_parts_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is set by hand: 1 s outside, 2 s in one part, 4 s in a part inside of it, 8 s outside again."""
    clock = [0.0]
    monkeypatch.setattr(profile.time, "process_time", lambda: clock[0])
    parts = profile.Parts()
    parts.phase = "update"

    def spend(seconds: float) -> None:
        clock[0] += seconds

    with parts("rest"):
        spend(1)
        with parts("loss"):
            spend(2)
            parts.of("model", spend)(4)
        spend(8)
    spend(16)
    assert parts.seconds == {"update: rest": 9, "update: loss": 2, "update: model": 4}


class Doubles(nn.Module):
    """Answers with a tuple, as a denoiser of diffusers does."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.factor * latents,)


def test_rows_through_a_denoiser_are_counted_both_ways() -> None:
    """3 rows without gradient, 2 that a gradient comes back through, 4 whose output is detached."""
    model = Doubles()
    calls = Calls(model)
    with torch.no_grad():
        model(torch.zeros(3, 2))
    model(torch.zeros(2, 2))[0].sum().backward()
    model(torch.zeros(4, 2))[0].detach()
    assert calls.take() == {"forward": 3 + 2 + 4, "backward": 2}
    assert calls.take() == {}


# -- the level ------------------------------------------------------------------------------------------------------


def test_the_level_is_what_we_end_with_less_two_points() -> None:
    """0.84 - 0.02 = 0.82, which is 0.82 - 0.70 = 0.12 above our start; the 0.83 on the way does not count."""
    found = levels(OURS)
    assert found.accuracy == pytest.approx(0.82)
    assert found.gain == pytest.approx(0.12)


def test_a_level_that_is_asked_for_is_taken() -> None:
    """An accuracy of 0.75 alone is a gain of 0.75 - 0.70 = 0.05; a gain alone leaves the accuracy at 0.82."""
    assert levels(OURS, accuracy=0.75) == Levels(0.75, pytest.approx(0.05))
    assert levels(OURS, gain=0.03) == Levels(pytest.approx(0.82), 0.03)
    assert levels(OURS, accuracy=0.75, gain=0.03) == Levels(0.75, 0.03)


def test_the_gain_counts_from_a_runs_own_start() -> None:
    """A run that starts at 0.76 has to reach 0.76 + 0.12 = 0.88 by gain, and 0.82 by accuracy like all others."""
    targets = Levels(0.82, 0.12).targets([point(0, 0, 0.76), point(2, 50, 0.99)])
    assert targets == {"accuracy": 0.82, "gain": pytest.approx(0.88)}


def test_a_level_is_reached_at_the_first_measurement_at_or_above_it() -> None:
    """0.82 lies between 0.78 (40 s) and 0.83 (80 s): 80 s. On the line between them it would be 40 + 40 * 4/5 = 72 s.

    That the accuracy falls to 0.81 afterwards takes nothing back.
    """
    found = outcome(OURS, 0.82)
    assert found.reached == OURS[2]
    assert found.best == 0.84
    assert found.spent == OURS[4]


def test_a_measurement_exactly_at_the_level_is_there_in_spite_of_rounding() -> None:
    """0.7 + (0.8 - 0.7) and 0.1 + 0.2 are not what they should be in floating point; 0.3 is 0.3 all the same."""
    assert 0.1 + 0.2 > 0.3
    run = [point(0, 0, 0.1), point(2, 10, 0.3)]
    assert outcome(run, Levels(0.5, 0.2).targets(run)["gain"]).reached == run[1]


def test_a_run_that_never_gets_there_has_its_best_and_what_it_spent() -> None:
    run = [point(0, 0, 0.70), point(2, 200, 0.79), point(4, 400, 0.75)]
    found = outcome(run, 0.82)
    assert found.reached is None
    assert (found.best, found.spent["wall"]) == (0.79, 400)
    assert trl_level_page.said(found) == "not reached in 400 s (best 79.0%)"


def test_a_start_above_the_level_is_there_before_training() -> None:
    found = outcome([point(0, 0, 0.85), point(2, 50, 0.80)], 0.82)
    assert found.reached and found.reached["epoch"] == 0
    assert trl_level_page.said(found) == "before training"


def test_the_fastest_is_the_fastest_on_the_asked_clock() -> None:
    first = outcome([point(0, 0, 0.7), point(2, 90, 0.9, cpu=50)], 0.8)
    second = outcome([point(0, 0, 0.7), point(2, 60, 0.9, cpu=55)], 0.8)
    never = outcome([point(0, 0, 0.7), point(2, 10, 0.7)], 0.8)
    assert fastest([first, never, second], "wall") is second
    assert fastest([first, never, second], "cpu") is first
    assert fastest([never], "wall") is None


# -- the page -------------------------------------------------------------------------------------------------------


def test_the_page_divides_their_time_by_ours() -> None:
    """By accuracy (0.82): ours 80 s, TRL's 200 s wall and 180 s processor: 2.50 and 2.25. By gain TRL needs 0.88."""
    made = results([point(0, 0, 0.76), point(2, 100, 0.81, 90), point(4, 200, 0.83, 180)])
    said = trl_level_page.verdict(made, "accuracy")
    assert "2.50 in wall seconds (TRL, guidance 3: 200 s, diffalign: 80 s)" in said
    assert "2.25 in processor seconds (TRL, guidance 3: 180 s, diffalign: 80 s)" in said
    page = trl_level_page.page(made)
    # 4 epochs: 256 images, 2,560 calls forward, 2,304 with backward.
    assert "| diffalign | 82.0% | 80 s | 80 s | 4 | 256 | 2,560 | 2,304 |" in page
    assert "| TRL, guidance 3 | 82.0% | 200 s | 180 s | 4 | 256 | 2,560 | 2,304 |" in page
    assert "| TRL, guidance 3 | 88.0% | not reached in 200 s (best 83.0%) | – | – | – | – | – |" in page


def test_the_page_gives_no_ratio_where_the_level_was_not_reached() -> None:
    """400 s without getting there, where ours took 80 s: five times as long, and no more is said."""
    made = results([point(0, 0, 0.70), point(2, 200, 0.79), point(4, 400, 0.75)])
    for definition in ("accuracy", "gain"):
        said = trl_level_page.verdict(made, definition)
        assert said == "diffalign: 80 s. No run of TRL got there; the longest had 400 s, 5.0 times as long."
    assert "TRL's time over ours" not in trl_level_page.page(made)


def test_the_page_gives_no_ratio_where_a_side_starts_above_the_level() -> None:
    made = results([point(0, 0, 0.86), point(2, 50, 0.85)])
    assert trl_level_page.verdict(made, "accuracy") == "diffalign: 80 s; TRL, guidance 3: before training."


def test_the_page_says_where_we_were_not_there_either() -> None:
    made = results([point(0, 0, 0.70), point(2, 50, 0.95)], asked={"accuracy": 0.9})
    assert trl_level_page.verdict(made, "accuracy") == "diffalign: not reached in 160 s (best 84.0%)."


def test_every_measurement_stands_on_the_page() -> None:
    page = trl_level_page.page(results([point(0, 0, 0.76), point(2, 100, 0.81)]))
    assert "| 2 | 40 s: 78.0% | 100 s: 81.0% |" in page
    assert "| 8 | 160 s: 84.0% |  |" in page


def test_whole_results_need_no_caution() -> None:
    assert trl_level_page.cautions(results([point(0, 0, 0.76)])) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made.update(overrides=["prompts.held_out=4"]), "The recipe was changed"),
        (lambda made: made["runs"][0].update(points=OURS[:3]), "stopped after 4 of its 8 epochs"),
        (lambda made: made["runs"][1].update(failed="it is NaN"), "TRL, guidance 3 ended early: it is NaN."),
        (lambda made: made.update(asked={"accuracy": 0.6}), "not above what our side started with"),
    ],
)
def test_what_weakens_the_results_is_said_on_the_page(change: Callable[[dict[str, Any]], None], words: str) -> None:
    made = results([point(0, 0, 0.76)])
    change(made)
    assert any(words in caution for caution in trl_level_page.cautions(made))
    assert "**Caution.**" in trl_level_page.page(made)
    assert any(line.startswith("caution: ") for line in trl_level_page.table(made))


PAGES = [
    ("trl_ddpo", trl_ddpo_page.page),
    ("trl_level", trl_level_page.page),
    ("trl_grpo", trl_grpo_page.page),
    ("trl_alignprop", trl_alignprop.page),
    ("profile", profile_page.page),
]


@pytest.mark.parametrize(("name", "page"), PAGES)
def test_recorded_pages_are_those_of_the_recorded_results(name: str, page: Callable[[dict[str, Any]], str]) -> None:
    recorded = RECORDED / "results" / f"{name}.json"
    if not recorded.is_file():
        pytest.skip(f"{name} has not been run yet")
    assert page(json.loads(recorded.read_text())) == (RECORDED / f"{name}.md").read_text()


# -- the race -------------------------------------------------------------------------------------------------------


def test_each_guidance_and_each_learning_rate_of_trl_is_a_run() -> None:
    options = trl_level.parse(["--trl-learning-rates", "3e-4", "1e-3", "--trl-guidance", "3", "1"])
    runs = trl_level.planned(options)
    assert [run.name for run in runs] == [
        "diffalign",
        "TRL, guidance 3, learning rate 0.0003",
        "TRL, guidance 3, learning rate 0.001",
        "TRL mended, no guidance, learning rate 0.0003",
        "TRL mended, no guidance, learning rate 0.001",
    ]
    assert runs[3].specification["guidance_scale"] == 1


def test_guidance_that_trl_does_not_know_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trl_level.parse(["--trl-guidance", "0.5"])
    assert "guidance above 1" in capsys.readouterr().err


def test_a_run_ends_with_its_epochs_its_time_or_its_process() -> None:
    ours = trl_level.Run("diffalign", {}, OURS[:3], {"epochs": 8})
    assert not ours.ended(epochs=10**9, limit_s=100)
    assert ours.ended(epochs=4, limit_s=100)
    assert ours.ended(epochs=10**9, limit_s=80)
    assert trl_level.Run("diffalign", {}, OURS, {"epochs": 8}).ended(epochs=10**9, limit_s=1000)
    assert not trl_level.Run("TRL", {}, OURS, {"epochs": None}).ended(epochs=10**9, limit_s=1000)
    assert not trl_level.Run("TRL", {}, [], {"epochs": None}).ended(epochs=10**9, limit_s=1000)
    assert trl_level.Run("TRL", {}, [], {"epochs": None}, "gone").ended(epochs=10**9, limit_s=1000)


def test_another_level_needs_no_other_run(tmp_path: Path) -> None:
    """At 75 % ours is there at its first measurement with 78 %, after 40 s."""
    out, page = tmp_path / "results.json", tmp_path / "page.md"
    out.write_text(json.dumps(results([point(0, 0, 0.76)])))
    trl_level.main(["--page-only", "--out", str(out), "--page", str(page), "--level-accuracy", "75"])
    assert "| diffalign | 75.0% | 40 s | 40 s | 2 |" in page.read_text()
    assert json.loads(out.read_text())["asked"] == {"accuracy": 0.75}


# -- counting -------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Answers with a tuple, as a denoiser does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(latents),)


def test_calls_are_counted_by_what_became_of_them() -> None:
    """Two batches of 3 without gradient are 6 rows; of the two with gradient only the one of 5 was trained on."""
    denoiser = Denoiser()
    counter = CallCounter(denoiser)
    with torch.no_grad():
        denoiser(torch.ones(3, 2))
        denoiser(torch.ones(3, 2))
    denoiser(torch.ones(5, 2))[0].sum().backward()
    denoiser(torch.ones(7, 2))
    counted = dict(counter.calls)
    assert counter.take_rows() == {"forward": 6, "forward and backward": 5}
    assert counter.take() == {}
    counter.calls.update(counted)
    assert counter.take() == {"forward and backward, batch 5": 1, "forward, batch 3": 2}


@pytest.mark.parametrize("run", ["second", "third", "checked"])
def test_the_recorded_loop_made_the_model_better_by_what_it_was_not_trained_on(run: str) -> None:
    """From labels that came over HTTP to a better model: by the held-out checker, the interval above 0."""
    recorded = json.loads((RECORDED / "results" / "closed_loop.json").read_text())[run]["rewards"]
    checker = recorded["brain-mr-checker"]
    assert checker["trained_on"] is False
    assert checker["difference"]["ci95"][0] > 0


# -- GRPO against TRL -----------------------------------------------------------------------------------------------


def grpo_step(generation: float, learning: float, tokens: int, wall: float = 1.0) -> dict[str, Any]:
    """A step with no reward to compute; wall time is that many times processor time."""
    parts = {"generation": generation, "reward": 0.0, "learning": learning, "step": generation + learning}
    return {
        "tokens": tokens, "peak_mb": 100.0,
        "parts": {name: {"cpu": value, "wall": value * wall} for name, value in parts.items()},
    }  # fmt: skip


def test_ratios_of_grpo_are_of_tokens_per_second_within_a_round() -> None:
    """TRL: 100 tokens in 2 + 3 s, then 100 in 4 + 6 s (something else ran); ours: 120 in 1 + 1 s, then 120 in 2 + 2 s.

    Whole step: (120 / 2) / (100 / 5) = 3 in both rounds; of sums over the rounds it would be 3, of medians of seconds
    not. Generation: (120 / 1) / (100 / 2) = 2.4; learning: (120 / 1) / (100 / 3) = 3.6.
    """
    setting = {
        "steps": {
            "trl": [grpo_step(2, 3, 100), grpo_step(4, 6, 100)],
            "diffalign": [grpo_step(1, 1, 120), grpo_step(2, 2, 120)],
        }
    }
    assert trl_grpo_page.ratio(setting, "step", "cpu") == pytest.approx(3)
    assert trl_grpo_page.ratio(setting, "generation", "cpu") == pytest.approx(2.4)
    assert trl_grpo_page.ratio(setting, "learning", "cpu") == pytest.approx(3.6)


@pytest.mark.parametrize(("wall", "expected"), [(1.05, "wall"), (1.5, "cpu")])
def test_processor_seconds_count_where_the_machine_was_not_quiet(wall: float, expected: str) -> None:
    steps = {"trl": [grpo_step(2, 3, 100)], "diffalign": [grpo_step(1, 1, 100, wall)]}
    assert trl_grpo_page.clock({"settings": [{"steps": steps}]}) == expected


def test_the_recorded_step_of_grpo_is_half_as_long_again_at_trls_side() -> None:
    recorded = json.loads((RECORDED / "results" / "trl_grpo.json").read_text())
    for setting in recorded["settings"]:
        assert trl_grpo_page.ratio(setting, "step", trl_grpo_page.clock(recorded)) >= 1.5
