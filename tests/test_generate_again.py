"""A dataset is made again by the specification in its folder; what that file does not hold is named, and checked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps import generate, generate_again, generate_models
from apps.generate_origin import Origin, aligned
from diffalign.config import AdapterConfig
from diffalign.errors import ConfigError, NotFoundError, RefusedError
from diffalign.synthesis import alignment, beginning, store, tables
from pipelines.loading import load_policy
from tests.synthesis_stubs import contents

ROOT = Path(__file__).resolve().parent.parent
OF_A_TABLE = """name: people
table: {file: people.csv, id: who}
strata: [sex]
image: {model: MODEL, template: "{sex} of {age}", sampler: {steps: 2}}
rewards: ["JUDGE:score"]
gates: [blank, {gate: reward, reward: "JUDGE:score", at_least: -1000}]
"""
PEOPLE = "who,sex,age\na,f,30\nb,m,41\nc,f,52\nd,m,63\n"
JUDGE = """
def score(samples):
    return [float(sample.seed % 7) for sample in samples]
"""
AXES = """name: balls
cases: 4
axes: {colour: [red, green]}
image: {model: MODEL, template: "a {colour} ball", sampler: {steps: 2}}
"""
EVALUATION = {
    "rewards": {
        "compressibility": {"before": {"mean": -3, "ci95": [-4, -2], "n": 8}, "after": {"mean": -2, "ci95": [-3, -1],
         "n": 8}, "difference": {"mean": 1, "ci95": [0.5, 1.5]}, "trained_on": True},
        "compressibility/part": {"before": {"mean": 0}},
    },
    "win_rate": {"value": 0.75, "ci95": [0.5, 0.9], "n": 8},
    "seconds": 3,
}  # fmt: skip


@pytest.fixture
def elsewhere(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder with a table, a model, a judge, and a specification that names them by their places."""
    there = tmp_path / "elsewhere"
    there.mkdir()
    shutil.copytree(tiny_folder, there / "drawer")
    (there / "people.csv").write_text(PEOPLE)
    (there / "judge.py").write_text(JUDGE)
    text = OF_A_TABLE.replace("MODEL", str(there / "drawer")).replace("JUDGE", str(there / "judge.py"))
    (there / "people.yaml").write_text(text)
    return there


def places(there: Path) -> list[str]:
    judge = f"{there / 'judge.py'}:score"
    return [f"table.file={there / 'people.csv'}", f"image.model={there / 'drawer'}", f"rewards.0={judge}",
            f"gates.1.reward={judge}"]  # fmt: skip


def test_a_dataset_of_a_table_is_made_again(tmp_path: Path, elsewhere: Path, capsys: Any) -> None:
    """What is missing is named with its hash and the option that gives it; with these the bytes are the same."""
    made = tmp_path / "made"
    assert generate.run(str(elsewhere / "people.yaml"), [], made) == 0
    facts = store.read_manifest(made)[0]
    hashes = [tables.sha256_of(elsewhere / "people.csv"), facts.models["image"]["sha256"].removeprefix("sha256:"),
              next(iter(facts.rewards.values()))["sha256"].removeprefix("sha256:")]  # fmt: skip
    with pytest.raises(NotFoundError) as caught:
        generate.run(str(made / "spec.yaml"), [], tmp_path / "again")
    said = str(caught.value)
    assert "\n" not in said and all(digits[:16] in said for digits in hashes)
    for field in ("table.file", "image.model", "rewards.0", "gates.1.reward"):
        assert f"--set {field}=PLACE" in said
    assert "people.csv" in said and "drawer" in said and "judge.py:score" in said
    with pytest.raises(NotFoundError, match=r"the table people.csv .*--set table.file=PLACE;? ") as caught:
        generate.plan(str(made), places(elsewhere)[1:])
    assert "drawer" not in str(caught.value)
    assert not (tmp_path / "again").exists()
    capsys.readouterr()
    assert generate.run(str(made), places(elsewhere), tmp_path / "again") == 0
    assert f"making {made} again: specification, models, rewards and gates are the same\n" in capsys.readouterr().out
    assert contents(made) == contents(tmp_path / "again")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("people.csv", r"people.csv is not the table that the specification names: its SHA-256 is [0-9a-f]{64}, and"),
        ("drawer/scheduler/more.json", r"made was made with other models: image.sha256 was .*--set name=ANOTHER"),
        ("judge.py", r"made was made with other rewards: .*sha256 was .*--set name=ANOTHER"),
    ],
)
def test_what_is_not_the_same_is_refused(tmp_path: Path, elsewhere: Path, file: str, said: str) -> None:
    """One byte more in the table, the model or the code of a reward; by another name it is another dataset."""
    made = tmp_path / "made"
    generate.run(str(elsewhere / "people.yaml"), [], made)
    changed = elsewhere / file
    changed.write_text((changed.read_text() if changed.exists() else "{}") + "\n")
    if file == "people.csv":
        changed.write_text(PEOPLE.replace("30", "31"))
    with pytest.raises((ConfigError, RefusedError), match=said):
        generate.run(str(made), places(elsewhere), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    more = ["name=other", *(["table.sha256=null"] if file == "people.csv" else [])]
    assert generate.run(str(made), [*places(elsewhere), *more], tmp_path / "other") == 0


def test_another_dataset_is_told(tmp_path: Path, elsewhere: Path, capsys: Any) -> None:
    """A model of another name gives other seeds: that is said, with what has changed."""
    made = tmp_path / "made"
    generate.run(str(elsewhere / "people.yaml"), [], made)
    (elsewhere / "drawer").rename(elsewhere / "painter")
    sets = [one.replace("drawer", "painter") for one in places(elsewhere)]
    assert generate.run(str(made), sets, tmp_path / "again") == 0
    said = capsys.readouterr().out
    assert f'another dataset than {made}: image.model was "drawer", and is "painter"' in said


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> Path:
    """The folder of a run that trained an adapter of random numbers."""
    folder = tmp_path / "runs" / "my-run"
    folder.mkdir(parents=True)
    policy = load_policy(str(tiny_folder), adapter=AdapterConfig(rank=2, alpha=2))
    for parameter in policy.trainable().values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    policy.save(folder)
    rewards = f"[{{reward: compressibility, weight: 2}}, {{reward: '{tmp_path}/mine.py:score'}}]"
    (folder / "config.yaml").write_text(
        f"name: trained\nseed: 5\nmodel: {tiny_folder}\nrewards: {rewards}\nprompts: {{source: emoji}}\n"
        "trainer: {epochs: 3}\n"
    )
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    return folder


def test_what_a_model_was_aligned_to(tmp_path: Path, run: Path, tiny_folder: Path) -> None:
    """By the run's own configuration and evaluation; nothing in it is a place."""
    found = aligned(run)
    assert str(tmp_path) not in json.dumps(found) and str(tiny_folder.parent) not in json.dumps(found)
    assert found == {
        "recipe": "trained", "base": "model", "objective": "ppo-clip", "experience": "rollouts", "seed": 5,
        "epochs": 3,
        "rewards": [{"reward": "compressibility", "weight": 2.0}, {"reward": "mine.py:score", "weight": 1.0}],
        "held_out": {"compressibility": EVALUATION["rewards"]["compressibility"]},  # type: ignore[index]
        "win_rate": EVALUATION["win_rate"],
    }  # fmt: skip
    assert Origin.of(str(run), None) == Origin(str(tiny_folder), run / "adapter", run)
    assert Origin.of(str(tiny_folder), str(run / "adapter")).run == run
    assert Origin.of("embedded:emoji", str(run / "adapter")).run is None
    assert Origin.of("embedded:emoji", str(tmp_path)).run is None
    (run / "evaluation.json").unlink()
    assert "held_out" not in aligned(run) and "win_rate" not in aligned(run)


def test_rewards_that_are_called_the_same_are_all_told(run: Path) -> None:
    """Two servers have no address in a dataset, and are two rewards all the same."""
    config = (run / "config.yaml").read_text()
    rewards = "[{reward: 'http://a:1', weight: 2}, {reward: 'http://b:2', weight: 0.5}]"
    (run / "config.yaml").write_text(re.sub(r"rewards: .*", f"rewards: {rewards}", config))
    found = aligned(run)
    assert found["rewards"] == [{"reward": "remote", "weight": 2.0}, {"reward": "remote", "weight": 0.5}]
    assert "to remote (weight 2) and remote (weight 0.5)" in alignment.sentence(found)


@pytest.mark.parametrize("config", ["r: 16\ntarget_modules: [to_q]\n", "- a\n- list\n", "name: [\n", ""])
def test_an_adapter_in_the_folder_of_another_tool(tmp_path: Path, run: Path, tiny_folder: Path, config: str) -> None:
    """A ``config.yaml`` that is no run's tells nothing; the dataset is made."""
    (run / "config.yaml").write_text(config)
    (tmp_path / "spec.yaml").write_text(AXES.replace("MODEL", str(tiny_folder)))
    made, adapter = tmp_path / "made", f"image.adapter={run / 'adapter'}"
    assert generate.run(str(tmp_path / "spec.yaml"), [adapter], made) == 0
    facts = store.read_manifest(made)[0].models["image"]
    assert "aligned" not in facts and facts["adapter"]["name"] == "adapter"


def test_a_plan_of_a_run(tmp_path: Path, run: Path, capsys: Any) -> None:
    """What is looked up is the model below the run."""
    (tmp_path / "spec.yaml").write_text(AXES.replace("MODEL", str(run)))
    generate.plan(str(tmp_path / "spec.yaml"), [])
    assert not_looked_up(capsys) == "nothing: all that is named is here"


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("compressibility", ""),
        ("clip?model=hf-hub:laion/nothing-here", "hf-hub:laion/nothing-here of clip?model=hf-hub:laion/nothing-here, "),
        ("hpsv2?weights=hf-hub:org/none/a.pt", "hf-hub:org/none/a.pt of hpsv2?weights=hf-hub:org/none/a.pt, "),
        ("http://127.0.0.1:9", "the server of http://127.0.0.1:9, "),
    ],
)
def test_a_plan_says_what_rewards_may_lack(
    tmp_path: Path, tiny_folder: Path, capsys: Any, reward: str, said: str
) -> None:
    """Weights that are not on this machine are named; what a reward finds by itself was not looked into."""
    (tmp_path / "spec.yaml").write_text(AXES.replace("MODEL", str(tiny_folder)) + f"rewards: ['{reward}']\n")
    generate.plan(str(tmp_path / "spec.yaml"), [])
    absent = "which is not on this machine, " if "hf-hub" in reward else ""
    assert not_looked_up(capsys) == f"{said}{absent}what rewards load by themselves"


def not_looked_up(capsys: Any) -> str:
    lines = (line.partition(":") for line in capsys.readouterr().out.splitlines())
    return next(value.strip() for name, _, value in lines if name == "not looked up")


def test_what_has_no_hash_is_said_not_to_be_checked(tmp_path: Path, elsewhere: Path, capsys: Any) -> None:
    """A model of the hub that is not here, a server, and a reward that asks one: nothing of them was compared."""
    made = tmp_path / "made"
    generate.run(str(elsewhere / "people.yaml"), [], made)
    facts = store.read_manifest(made)[0]
    models = {"image": {**facts.models["image"], "sha256": "not hashed", "base": "org/name"}}
    more = {
        "served": {"spec": "remote", "sha256": "not hashed"},
        "judge": {"spec": "judge?url=remote&model=small", "sha256": "diffalign 1, model not hashed"},
    }
    now = replace(facts, models=models, rewards={**facts.rewards, **more})
    store.write_manifest(made, now, complete=True)
    spec = generate.load(str(elsewhere / "people.yaml"), [])
    capsys.readouterr()
    generate_again.compare(spec, now, made)
    assert capsys.readouterr().out.strip() == (
        f"making {made} again: specification, models, rewards and gates are the same, as far as they have hashes;"
        " not checked: image.model org/name, reward served (remote), reward judge (judge?url=remote&model=small)"
    )


def test_a_dataset_of_a_run_is_made_again(tmp_path: Path, run: Path, tiny_folder: Path) -> None:
    """The manifest tells what the model was aligned to; a run that was evaluated later is the same run."""
    (tmp_path / "spec.yaml").write_text(AXES.replace("MODEL", str(run)))
    made = tmp_path / "made"
    assert generate.run(str(tmp_path / "spec.yaml"), [], made) == 0
    facts = store.read_manifest(made)[0].models["image"]
    assert facts["aligned"] == aligned(run)
    digits = facts["adapter"]["sha256"].removeprefix("sha256:")[:16]
    with pytest.raises(NotFoundError, match=rf"image.model my-run \(a run: adapter sha256:{digits}…, on model sha256:"):
        generate.run(str(made), [], tmp_path / "again")
    assert generate.run(str(made), [f"image.model={run}"], tmp_path / "again") == 0
    assert contents(made) == contents(tmp_path / "again")
    (run / "evaluation.json").unlink()
    assert generate.run(str(made), [f"image.model={run}"], made, resume=True) == 0
    plain = tmp_path / "plain.yaml"
    plain.write_text(AXES.replace("MODEL", str(tiny_folder)))
    generate.run(str(plain), [], tmp_path / "plain")
    assert "aligned" not in store.read_manifest(tmp_path / "plain")[0].models["image"]


def test_rows_of_another_version_are_not_gone_on_with(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the rows that were written down are not those that would be drawn now."""
    path = tmp_path / "spec.yaml"
    path.write_text(AXES.replace("MODEL", str(tiny_folder)))
    spec, made = generate.load(str(path), []), tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(generate_models.Makers, "duplicates", property(lambda self: _stop()))
        with pytest.raises(KeyError):
            generate.run(str(path), [], made)
    journal = beginning.Journal(made / store.JOURNAL, writable=True)
    row = next(iter(beginning.rows.rows(spec)))
    other = {"colour": "green" if row.cells["colour"] == "red" else "red"}
    journal.record([(beginning.Row(0, row.id, other, row.stratum, row.split), "", "")], [])
    journal.close()
    with pytest.raises(RefusedError, match=r"by another version of diffalign, which drew other rows: row 0 was"):
        generate.run(str(path), [], made, resume=True)


def _stop() -> None:
    raise KeyError


@pytest.mark.parametrize(
    "change",
    ["strata=[colours]", "image.template='{size}'", "image.model=embedded:emojis", "rewards=[clipp]", "cases=0", "."],
)
def test_what_is_wrong_is_told_before_torch_is_imported(tmp_path: Path, tiny_folder: Path, change: str) -> None:
    """A wrong specification, name, or folder to write to: in the time that Python itself takes, not seconds later."""
    (tmp_path / "spec.yaml").write_text(AXES.replace("MODEL", str(tiny_folder)))
    code = (
        "import sys\nfrom pathlib import Path\nfrom apps import generate\nfrom diffalign.errors import UserError\n"
        f"change = {change!r}\nchanges, out = ([change], 'out') if '=' in change else ([], change)\n"
        "try:\n    generate.run('spec.yaml', changes, Path(out))\n"
        "except UserError as error:\n    print(error)\n"
        "sys.exit(3 if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr


def test_a_plan_begins_with_what_matters(tmp_path: Path, elsewhere: Path, capsys: Any) -> None:
    """Cases, splits, strata, attempts and what is not here, then the rest; of a dataset, how many attempts it took."""
    made = tmp_path / "made"
    generate.run(str(elsewhere / "people.yaml"), [], made)
    capsys.readouterr()
    generate.plan(str(elsewhere / "people.yaml"), [])
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines[:7] == ["cases", "splits", "strata", "attempts", "gates", "time", "not looked up"]
    assert lines.index("work") < lines.index("cases by stratum") < lines.index("every field")
    generate.plan(str(made), places(elsewhere))
    assert f"about 4, as {made} took for 4 cases; at most 8 a case" in capsys.readouterr().out
