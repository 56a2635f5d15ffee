"""The report of a run from scripted files, and the page that explains every number."""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from apps import charts, outcome, report, report_measures, report_pictures
from apps.cli import main
from diffalign.config import AdapterConfig, ObjectiveConfig, SamplerConfig, TrainerConfig, parse
from diffalign.evaluation import Evaluation, Measure
from diffalign.experience import Rollouts
from diffalign.objectives import forward_process, policy_gradient, reward_backprop
from diffalign.runs import Run
from diffalign.trainer import Trainer
from diffalign.types import Prompt, Sample, Scores
from pipelines.diffusion import DiffusionPolicy
from tests.test_experience import SOURCES
from tests.test_experience import trainer as learner

ROOT = Path(__file__).resolve().parent.parent
ATTACK = "two <script>alert(1)</script> \"cats\" & 'dogs'"
SECRET = "/somewhere/alice/private"

ENTRY = dict[str, Any]


def interval(mean: float, spread: float, **more: Any) -> ENTRY:
    return {"mean": mean, "ci95": [mean - spread, mean + spread], **more}


def entry(before: float, after: float, spread: float, *, trained_on: bool, n: int = 128) -> ENTRY:
    return {
        "before": interval(before, spread, n=n),
        "after": interval(after, spread, n=n),
        "difference": interval(after - before, spread),
        "trained_on": trained_on,
    }


def evaluation(**changes: Any) -> ENTRY:
    return {
        "rewards": {
            "emoji-checker": entry(0.5, 0.625, 0.05, trained_on=True),
            "emoji-checker/count": entry(0.25, 0.75, 0.1, trained_on=True, n=56),
            "clip": entry(0.301, 0.289, 0.004, trained_on=False),
            "brightness": entry(-120.25, -120.5, 2.0, trained_on=False),
        },
        "win_rate": {"value": 0.7, "ci95": [0.64, 0.76], "n": 128, "by": "emoji-checker", "ties": 0.2},
        "diversity": {"before": 0.2, "after": 0.15},
        "distance": {"step_kl": 0.00123, "pixel_rms": 0.21},
        "prompts": "held-out",
        "verdict": {"alarm": True, "text": "Over-optimised: clip, which was not trained on, fell by 0.012."},
        "seconds": 12.5,
    } | changes


def start(path: Path, **changes: Any) -> Run:
    """A run that has a configuration and an environment, and nothing else."""
    fields: ENTRY = {"name": "tiny", "model": "embedded:emoji", "rewards": ["emoji-checker"], "trainer": {"epochs": 3}}
    config = parse(fields | {"prompts": {"source": "emoji"}, "seed": 7} | changes)
    run = Run.create(path, config)
    environment = {
        "python": "3.11.0", "versions": {"torch": "2.11.0"}, "git": "abc123", "seed": 7,
        "hardware": {"system": "Linux x86_64", "processor_cores": 2, "threads": 2, "accelerator": None},
        "hashes": {"model": "sha256:0123"},
    }  # fmt: skip
    (path / "environment.json").write_text(json.dumps(environment))
    return run


def log(run: Run, epochs: int) -> None:
    for epoch in range(1, epochs + 1):
        row = {"reward/total": 0.5 + epoch / 100, "reward/count": 0.3, "reward/std": 0.2, "reward/failed": 0.0}
        row |= {"policy/ratio": 1.0, "policy/approx_kl": 2e-7, "policy/grad_norm": float("nan")}
        run.log(epoch, row | {"time/sample": 4.0, "time/update": 8.0, "count/samples": epoch * 64.0})
    run.log(epochs, {"held_out/emoji-checker": 0.55})


def add_pictures(run: Run, scores: list[tuple[float | None, float | None]]) -> None:
    samples = run.path / "samples"
    for side in ("before", "after"):
        (samples / side).mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(samples / f"{side}.png")
        for i in range(len(scores)):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(samples / side / f"{i:03d}.png")
    Image.new("RGB", (40, 30), "blue").save(samples / "epoch-2.png")
    rows = [{"prompt": f"pair {i}", "seed": i, "before": a, "after": b} for i, (a, b) in enumerate(scores)]
    rows[0]["prompt"] = ATTACK
    (samples / "prompts.json").write_text(json.dumps(rows))


@pytest.fixture
def finished(tmp_path: Path) -> Run:
    run = start(tmp_path / "alice-home" / "finished")
    log(run, 3)
    (run.path / "evaluation.json").write_text(json.dumps(evaluation()))
    add_pictures(run, [(0.5, 0.75), (0.5, 0.25), (None, 0.5), (0.5, 0.5)])
    (run.path / "adapter").mkdir()
    return run


class Page(HTMLParser):
    """What a browser would load, and what it would show."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.addresses += [values[name] for name in ("src", "href", "srcset", "xlink:href", "action") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data.strip())


def test_the_page_needs_nothing_but_itself(finished: Run) -> None:
    text = report.write(finished).read_text()
    page = Page(text)
    assert page.addresses and all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "script" not in page.tags and not page.open
    assert "Content-Security-Policy" in text and "default-src 'none'" in text


def test_prompts_are_escaped_and_images_have_words(finished: Run) -> None:
    text = report.render(finished)
    page = Page(text)
    assert "<script" not in text
    assert ATTACK in page.text
    assert all(image["alt"] for image in page.images)
    assert any(image["alt"] == f"before training: {ATTACK}; score 0.500" for image in page.images)


def test_the_numbers_are_there(finished: Run) -> None:
    text = Page(report.render(finished)).text.replace("\u00a0", " ")
    assert "embedded:emoji was aligned to emoji-checker for 3 epochs (192 samples, 36 s)." in text
    assert "emoji-checker rose from 0.500 to 0.625: a difference of +0.125 (95 % interval +0.075 to +0.175)." in text
    assert "The aligned model won 70 % of the pairs (64 % to 76 %; a tie is half a win)." in text
    assert "of 128 pairs: 60 % better, 20 % the same, 20 % worse." in text
    assert "clip held out" in text and "emoji-checker trained on" in text
    assert "0.250 0.150 to 0.350" in text and "−120.2 −122.2 to −118.2" in text
    assert "75 %" in text and "0.00123" in text
    assert "Of 4 saved pairs, 1 scored better after training, 1 the same and 1 worse; 1 could not be judged." in text
    assert "diffalign align finished/config.yaml" in text and 'load_lora_weights("finished/adapter")' in text
    assert "torch 2.11.0" in text and "sha256:0123" in text and "learning_rate: 0.0003" in text


def test_the_table_can_be_read_aloud(finished: Run) -> None:
    text = report.render(finished)
    assert text.count('scope="row"') >= 4 and text.count('scope="col"') == 6
    assert "clearly better:" in text and "clearly worse:" in text and "no clear change:" in text
    headings = Page(text).headings
    assert headings[0] == "tiny"
    assert {"Over-optimised", "Measures", "Before and after", "During training", "Curves", "Repeat it"} <= set(headings)


@pytest.mark.parametrize(
    ("verdict", "trained_on", "title", "words"),
    [
        ({"alarm": True, "text": "Over-optimised: clip fell."}, False, "Over-optimised", "What got worse: clip fell."),
        (
            {"alarm": False, "text": "No sign of over-optimisation: nothing got worse."},
            False,
            "No sign of over-optimisation",
            "Nothing got worse.",
        ),
        (
            {"alarm": False, "text": "No measure was kept out of training."},
            True,
            "Over-optimisation cannot be ruled out",
            "No measure was kept out of training.",
        ),
        (None, False, "Over-optimisation cannot be ruled out", "The evaluation holds no verdict."),
    ],
)
def test_the_verdict_in_words(tmp_path: Path, verdict: ENTRY | None, trained_on: bool, title: str, words: str) -> None:
    run = start(tmp_path / "run")
    log(run, 3)
    found = evaluation(verdict=verdict, rewards={"clip": entry(0.3, 0.3, 0.1, trained_on=trained_on)})
    (run.path / "evaluation.json").write_text(json.dumps(found))
    page = Page(report.render(run))
    assert title in page.headings and words in page.text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    log(run, 2)
    page = Page(report.render(run))
    assert "This run is not finished" in page.headings and "Measures" not in page.headings
    assert "2 of 3 epochs are done, and there is no evaluation yet." in page.text
    assert "diffalign align run/config.yaml --resume --out run" in page.text
    assert "No adapter or model is saved in this run yet." in page.text
    assert "Curves" in page.headings


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    (run.path / "environment.json").unlink()
    page = Page(report.render(run))
    assert "0 of 3 epochs are done" in page.text and "No epoch was finished" in page.text
    assert "versions and hardware were not recorded" in page.text


def test_a_trained_run_without_evaluation(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    log(run, 3)
    page = Page(report.render(run))
    assert "Not evaluated" in page.headings
    assert "Training is finished, but there is no evaluation" in page.text


def test_what_could_not_be_measured_is_not_a_number(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    log(run, 3)
    empty = {"mean": None, "ci95": [None, None], "n": 0}
    none = {"before": empty, "after": empty, "difference": empty, "trained_on": True}
    found = evaluation(rewards={"emoji-checker": none}, win_rate=empty | {"value": None, "by": "emoji-checker"})
    found |= {"diversity": {"before": float("nan"), "after": float("nan")}, "distance": {}}
    (run.path / "evaluation.json").write_text(json.dumps(found))
    page = Page(report.render(run))
    assert "not measured" in page.text
    assert "nan" not in page.text.lower().split() and "None" not in page.text


def test_too_few_prompts_have_no_interval(tmp_path: Path) -> None:
    """The means are shown, the intervals are dashes, and nothing is called clear or safe."""
    run = start(tmp_path / "run")
    log(run, 3)
    found = evaluation(verdict={"alarm": False, "text": "There are too few judged prompts for an interval."})
    for row in [*found["rewards"].values(), found["win_rate"]]:
        for part in (row, *row.values()):
            if isinstance(part, dict) and "ci95" in part:
                part["ci95"] = None
    (run.path / "evaluation.json").write_text(json.dumps(found))
    page = Page(report.render(run))
    text = page.text.replace("\u00a0", " ")
    assert "0.500 –" in text and "–: too few prompts for an interval." in text and "None" not in text
    assert "from 0.500 to 0.625: a difference of +0.125 (too few prompts for an interval)." in text
    assert "won 70 % of the pairs (too few prompts for an interval; a tie is half a win)" in text
    assert "Over-optimisation cannot be ruled out" in page.headings


def test_without_an_interval_there_is_no_axis() -> None:
    """An axis from the mean before to the mean after would show 0.500 to 0.501 as it shows 0 to 1."""
    measure = {"before": {"mean": 0.5, "n": 4}, "after": {"mean": 0.501, "n": 4}, "difference": {"mean": 0.001}}
    with_one = entry(0.5, 0.501, 0.02, trained_on=True)
    rows = report_measures.table({"rewards": {"few": measure, "many": with_one}})
    assert [bool(row.plot) for row in rows] == [False, True]


def test_what_did_not_change_in_any_sample_is_said_in_words(tmp_path: Path) -> None:
    """All differences are 0: the bootstrap interval is 0 to 0, which is no knowledge of other prompts."""
    run = start(tmp_path / "run")
    log(run, 3)
    same = entry(0.5, 0.5, 0.1, trained_on=True) | {"difference": interval(0.0, 0.0)}
    (run.path / "evaluation.json").write_text(json.dumps(evaluation(rewards={"emoji-checker": same})))
    text = Page(report.render(run)).text
    assert "unchanged in every sample" in text and "0.000 to 0.000" not in text
    assert "emoji-checker stayed at 0.500: no sample scored differently." in text


def test_the_terminal_says_unchanged_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Six prompts, whose scores are the same after training as before by one measure, and higher by another."""
    before = np.linspace(0.2, 0.7, 6)
    measures = {
        "same": Measure(before, before, trained_on=False, higher_is_better=True),
        "more": Measure(before, before + 0.1, trained_on=True, higher_is_better=True),
    }
    outcome.show(Evaluation(measures, np.arange(6), "more", (0.5, 0.5), {}))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "unchanged in every sample" in lines["same"] and "+0.100 (+0.100 to +0.100)" in lines["more"]


def test_a_rate_that_did_not_change_in_any_sample_is_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of rates an interval has a width where all prompts agree, and a mean of 0 may be of changes that cancel out:
    here of the two samples of each prompt one got right and the other wrong."""
    right = np.tile([0.0, 1.0], 6)
    measures = {
        "same": Measure(right, right, trained_on=False),
        "swapped": Measure(right, 1 - right, trained_on=True),
    }
    found = Evaluation(measures, np.repeat(np.arange(6), 2), "swapped", (0.5, 0.5), {})
    changes = {name: row["difference"] for name, row in found.to_json()["rewards"].items()}
    assert changes["same"]["ci95"] == changes["swapped"]["ci95"] and changes["same"]["ci95"][1] > 0.3
    assert (changes["same"]["changed"], changes["swapped"]["changed"]) == (0, 12)
    outcome.show(found)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "unchanged in every sample" in lines["same"] and "+0.000 (-0." in lines["swapped"]
    run = start(tmp_path / "run")
    log(run, 3)
    (run.path / "evaluation.json").write_text(found.dumps())
    rows = {row.name: row.unchanged for row in report_measures.table(json.loads(found.dumps()))}
    assert rows == {"same": True, "swapped": False}
    text = Page(report.render(run)).text
    assert text.count("unchanged in every sample") == 1
    assert "swapped went from 0.500 to 0.500: a difference of 0.000 that cannot be told from none" in text


def test_nothing_changed_on_few_prompts_needs_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    same = Measure(np.ones(4), np.ones(4), trained_on=True)
    outcome.show(Evaluation({"same": same}, np.arange(4), "same", (0.5, 0.5), {}))
    shown = capsys.readouterr().out
    assert "unchanged in every sample" in shown and "–: too few" not in shown


def test_before_after_and_change_of_a_pair_agree_in_every_digit(tmp_path: Path) -> None:
    """0.7254 to 0.7296 is 0.725 to 0.730: 0.0042 is shown as the 0.005 between them; 0.7301 to 0.7304 as nothing."""
    run = start(tmp_path / "run")
    log(run, 3)
    (run.path / "evaluation.json").write_text(json.dumps(evaluation()))
    add_pictures(run, [(0.7254, 0.7296), (0.7301, 0.7304), (0.5, 0.5), (0.5, 0.25)])
    page = report.render(run)
    cards = [card.partition("</p>")[0] for card in page.split('<p class="foot">')[1:]]
    for card, change in zip(cards, ["▲ +0.005", "≈ 0.000", "= same", "▼ −0.250"], strict=True):
        assert change in card
    assert [any(arrow in card for arrow in "▲▼") for card in cards] == [True, False, False, True]
    assert page.count("<b>0.730</b>") == 3 and "<b>0.725</b>" in page and "score 0.725" in page


def test_small_numbers_keep_three_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward of some hundredths: 0.0451 to 0.0463 was shown as 0.045 to 0.046, and a gain of 0.0004 as 0.000."""
    assert [report_measures.decimals([value]) for value in (0.0, 0.5, 0.099, 0.00123, 1e-12, 50)] == [3, 3, 4, 5, 8, 2]
    run = start(tmp_path / "run")
    log(run, 3)
    small = entry(0.0451, 0.0463, 0.0004, trained_on=True)
    (run.path / "evaluation.json").write_text(json.dumps(evaluation(rewards={"emoji-checker": small})))
    add_pictures(run, [(0.0451, 0.0455), (0.0463, 0.0461)])
    text = Page(report.render(run)).text
    assert "rose from 0.0451 to 0.0463: a difference of +0.0012 (95 % interval +0.0008 to +0.0016)" in text
    assert "▲ +0.0004" in text and "▼ −0.0002" in text
    values = np.full(8, 0.0451)
    measured = Measure(values, values + 0.0004, trained_on=True)
    outcome.show(Evaluation({"redness": measured}, np.arange(8), "redness", (0.5, 0.5), {}))
    assert "0.0451" in (shown := capsys.readouterr().out) and "+0.0004" in shown


def test_broken_and_missing_pictures_are_said_to_be(finished: Run) -> None:
    (finished.path / "samples" / "before" / "000.png").write_bytes(b"no picture")
    (finished.path / "samples" / "after" / "001.png").unlink()
    assert Page(report.render(finished)).text.count("no image") == 2


def test_nothing_private_is_shown(tmp_path: Path) -> None:
    rewards = [f"{SECRET}/mine.py:score", {"reward": "clip?model=/data/of bob/clip", "weight": 0.5}]
    run = start(tmp_path / "alice" / "run", model=f"{SECRET}/model", rewards=rewards)
    log(run, 3)
    text = report.render(run)
    for word in ("alice", "private", "of bob", str(tmp_path)):
        assert word not in text
    assert "…/mine.py:score (weight 1), clip?model=…/clip (weight 0.5)" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("embedded:emoji", "embedded:emoji"),
        ("org/model-v1.5", "org/model-v1.5"),
        ("./local/model", "./local/model"),
        ("path/to/file.py:function", "path/to/file.py:function"),
        ("/srv/bob/models/x", "…/x"),
        ("~bob/models/x", "…/x"),
        ("C:\\Users\\bob\\x", "…/x"),
        ("clip?model=/srv/bob/x&name=y", "clip?model=…/x&name=y"),
        ("https://bob:key@host.example:8000/score?token=1", "https://…"),
        ("ten images / second", "ten images / second"),
    ],
)
def test_paths_and_addresses_are_shortened(given: str, shown: str) -> None:
    assert report.public(given) == shown


def test_pairs_are_chosen_honestly(tmp_path: Path) -> None:
    """Of 30 pairs, number i changes by i - 10 hundredths: 10 fall (most of all 0, then 1), one stays, 19 rise (29)."""
    run = start(tmp_path / "run")
    add_pictures(run, [(0.5, 0.5 + (i - 10) / 100) for i in range(30)])
    groups, tally = report_pictures.pairs(run.path / "samples", 1, seed=7)
    assert tally == report_pictures.Tally(better=19, same=1, worse=10, unknown=0)
    assert [group.title for group in groups] == ["Drawn at random", "Largest gains", "Largest losses"]
    assert [pair.seed for pair in groups[1].pairs] == list(range(29, 21, -1))
    assert [pair.seed for pair in groups[2].pairs] == list(range(8))
    drawn = [pair.seed for pair in groups[0].pairs]
    again, _ = report_pictures.pairs(run.path / "samples", -1, seed=7)
    assert len(set(drawn)) == 8 and [pair.seed for pair in again[0].pairs] == drawn
    assert [pair.seed for pair in again[1].pairs] == list(range(8))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.58, 0.77, [0.55, 0.6, 0.65, 0.7, 0.75, 0.8]),
        (3.0, 3.0, [2.6, 2.8, 3.0, 3.2, 3.4]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert found == pytest.approx(expected)


def test_numbers_have_one_format() -> None:
    assert report_measures.number(-0.0004, 3, signed=True) == "0.000"
    assert report_measures.number(-0.25, 2) == "−0.25"
    assert report_measures.number(1234.5, 1, signed=True) == "+1,234.5"
    assert charts.brief(6.04e-7, [1e-7, 7e-7]) == "6.0e−7"
    assert charts.brief(0.9999957, [0.99998, 1.00003]) == "0.999996"
    assert charts.tick_labels([0.0, 2e-7, 4e-7]) == ["0", "2e−7", "4e−7"]
    assert report.duration(5) == "5.0 s" and report.duration(600) == "10 min" and report.duration(7500) == "2 h 05 min"


# -- docs/metrics.md ------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    """The names in the first column of the tables of docs/metrics.md."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def is_documented(metric: str) -> bool:
    patterns = (re.sub("PART|REWARD", ".+", re.escape(name)) for name in documented())
    return any(re.fullmatch(pattern, metric) for pattern in patterns)


class Redness:
    """Mean of the red channel, with one part."""

    name, modality, unit, range, higher_is_better = "redness", "image", "fraction", (0.0, 1.0), True

    def __call__(self, samples: list[Sample]) -> Scores:
        total = torch.tensor([float(np.asarray(s.image)[..., 0].mean() / 255) for s in samples])
        return Scores(total, {"part": total})


def logged(run: Run, policy: DiffusionPolicy) -> set[str]:
    """The names that one epoch of real training logs, with every option on that adds a name."""
    trainer = Trainer(
        policy,
        Rollouts(Redness(), [Prompt("red ball"), Prompt("blue cube")]),  # type: ignore[arg-type]
        settings=TrainerConfig(epochs=1, samples_per_epoch=4, batch_size=4),
        objective=ObjectiveConfig(name="ppo-clip", kl_coefficient=0.1),
        run=run,
    )
    trainer.train()
    one = torch.ones(1, 1)
    _, other = policy_gradient.reinforce(one, one, one[0], one > 0)
    _, valued = policy_gradient.value_clip(one, one, one, one > 0, clip_range=0.2)
    _, contrasted = forward_process.nft(one[0], one[0], one[0], beta=0.1, largest=5.0)
    _, elbo = forward_process.elbo_ppo_clip(one[0], one[0], one[0], clip_range=0.01)
    _, redrawn = reward_backprop.reward_backprop(one[0], one[0])
    own = other | valued | contrasted | elbo | redrawn
    found = {name for row in run.metrics() for name in row} | {f"policy/{name}" for name in own}
    for objective, source in (
        ("dpo", "pairs"),
        ("kto", "labels"),
        ("reward-weighted", "rollouts"),
        ("sft", "best-of-n"),
    ):
        job = learner(objective, SOURCES[source](), epochs=1, **({"sft_weight": 0.1} if objective == "dpo" else {}))
        gathered = job.gather()
        found |= gathered.metrics.keys() | job.update(job.lesson(gathered.experience)).keys()
    return found


def written_down() -> set[str]:
    """The names in the sources, with PART for what is filled in: also those that a short run never reaches."""
    names = set()
    for path in ("diffalign/trainer.py", "diffalign/actor_critic.py", "diffalign/experience.py", "apps/align.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "PART" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if re.fullmatch(r"(reward|policy|advantage|critic|experience|distance|time|count|held_out)/\S+", text):
                names.add(text)
    return (names - {"policy/PART", "distance/PART"}) | {"distance/step_kl", "distance/sample_kl"}


def test_every_metric_is_documented(tmp_path: Path, make: Callable[..., DiffusionPolicy]) -> None:
    policy = make(adapter=AdapterConfig(), sampler=SamplerConfig(steps=2))
    names = logged(start(tmp_path / "run"), policy)
    assert {"policy/kl", "policy/clip_fraction", "reward/part", "time/update", "count/updates"} <= names
    sources = written_down()
    assert {"reward/std", "held_out/PART", "advantage/mean"} <= sources
    fixed = {name for name in sources if "PART" not in name}
    missing = {name for name in names | sources if not is_documented(name)} | fixed - set(documented())
    assert not missing, f"docs/metrics.md does not explain {', '.join(sorted(missing))}"
    stale = {name for name in documented() if "/" in name} - names - sources - {"reward/PART", "held_out/REWARD"}
    assert not stale, f"docs/metrics.md explains {', '.join(sorted(stale))}, which nothing logs"


def test_an_undocumented_metric_would_be_noticed() -> None:
    assert not is_documented("policy/entropy") and not is_documented("reward") and not is_documented("time/total")
    assert is_documented("reward/emoji-checker/count") and is_documented("held_out/clip")


def test_every_field_of_an_evaluation_is_documented() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    found = Evaluation(
        {"clip": Measure(scores, scores + 0.1, trained_on=False)}, np.array([0, 0, 1, 1]), "clip", (0.2, 0.2),
        {"step_kl": 0.1, "sample_kl": 0.4, "pixel_rms": 0.1},
    ).to_json()  # fmt: skip
    text = (ROOT / "docs" / "metrics.md").read_text().partition("## `evaluation.json`")[2]
    inner = {key for value in found.values() if isinstance(value, dict) for key in value} - {"clip"}
    inner |= {key for part in found["rewards"]["clip"].values() if isinstance(part, dict) for key in part}
    keys = set(found) | inner | set(found["rewards"]["clip"])
    missing = {key for key in keys if not re.search(rf"`([\w.]+\.)?{key}`", text)}
    assert not missing, f"docs/metrics.md does not explain {', '.join(sorted(missing))}"


WARMED: ENTRY = {
    "model": "embedded:findings-lm", "modality": "text", "rewards": ["findings-gold"],
    "prompts": {"source": "findings"}, "warm_up": {"demonstrations": "findings"},
}  # fmt: skip


@pytest.mark.parametrize("measured", [True, False])
def test_after_a_warm_up_the_comparison_is_with_what_it_left(tmp_path: Path, measured: bool) -> None:
    run = start(tmp_path / "run", **WARMED)
    log(run, 3)
    before = evaluation(distance={"step_kl": 0.05, "sample_kl": 1.5})
    (run.path / "evaluation.json").write_text(json.dumps(before))
    if measured:
        (run.path / "warm-up").mkdir()
        gained = {"rewards": {"gold": entry(0.25, 0.375, 0.05, trained_on=False, n=32)}, "win_rate": {"by": "gold"}}
        (run.path / "warm-up" / "evaluation.json").write_text(json.dumps(gained))
    page = " ".join(html.unescape(re.sub("<[^>]*>", "", report.render(run))).split())
    assert '"Before" is the SFT model in run/warm-up/model, not embedded:findings-lm.' in page
    assert "Before (SFT model) After" in page and "Distance from the SFT model" in page
    assert "base model" not in page and "latent" not in page
    assert re.search(r"KL divergence per text ?1.5 nats: the sum over the tokens of a text", page)
    gain = "The warm-up alone took embedded:findings-lm to the SFT model. On 32 samples of held-out prompts, gold"
    assert (f"{gain} rose from 0.250 to 0.375: a difference of +0.125" in page) == measured
    assert ("The warm-up alone" in page) == measured


def test_without_a_warm_up_nothing_of_it_is_said(finished: Run) -> None:
    page = report.render(finished)
    assert "SFT" not in page and "Distance from the base model" in page and "nats per latent element, along" in page


def test_a_text_model_loads_as_the_report_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of code is run as it stands there."""
    monkeypatch.chdir(tmp_path)
    small = ("trainer.epochs=1", "prompts.train=2", "prompts.held_out=2", "trainer.samples_per_epoch=4")
    settings = (*small, "trainer.batch_size=4", "trainer.inner_epochs=1", "evaluation.seeds_per_prompt=1")
    command = ["align", "text-grpo", "--out", "tiny"]
    for setting in (*settings, "generation.max_new_tokens=4", "trainer.samples_per_prompt=2"):
        command += ["--set", setting]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "tiny" / "report.html").read_text()
    assert "diffusers" not in page.partition('id="repeat"')[2].partition("Where it ran")[0]
    block = re.search(r"<code>(from transformers import .*?)</code>", page, re.DOTALL)
    assert block is not None
    known: dict[str, Any] = {}
    exec(html.unescape(block[1]), known)
    assert known["written"].shape[1] > known["tokens"].input_ids.shape[1]
