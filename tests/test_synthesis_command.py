"""``diffalign generate``: from the command line to a dataset, with tiny models of the real classes."""

from __future__ import annotations

import getpass
import io
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from apps import generate, generate_models, generate_names, listing
from apps.cli import main
from diffalign.config import AdapterConfig, SamplerConfig
from diffalign.errors import ConfigError, NotFoundError, RefusedError, UserError
from diffalign.synthesis import engine
from diffalign.synthesis.store import Generated
from diffalign.types import Prompt
from pipelines.diffusion import DiffusionPolicy
from pipelines.loading import load_adapter, load_policy
from tests.synthesis_stubs import contents

ROOT = Path(__file__).resolve().parent.parent
SPEC = """name: tiny
cases: 7
axes: {colour: [red, green, blue], thing: [ball, cube]}
strata: [colour]
image: {model: MODEL, template: "a {colour} {thing}", sampler: {steps: 3, batch_size: 3}}
rewards: [compressibility]
gates: [blank]
chunk: 4
"""


@pytest.fixture
def tiny(tmp_path: Path, tiny_folder: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC.replace("MODEL", str(tiny_folder)))
    return path


def test_a_dataset_from_the_command_line(tmp_path: Path, tiny: Path, tiny_folder: Path) -> None:
    """Twice the same bytes, of which none names this machine; every record says what it was made with."""
    for name in ("one", "two"):
        assert generate.run(str(tiny), [], tmp_path / name) == 0
    whole = contents(tmp_path / "one")
    assert whole == contents(tmp_path / "two") and "report.html" in whole
    # Letters of an embedded picture can be any short name by chance.
    found = {name: re.sub(rb"base64,[\w+/=%]+", b"", data) for name, data in whole.items()}
    places = [str(tmp_path), str(tiny_folder.parent), str(Path.home()), socket.gethostname()]
    for place in [*places, *([f"/{getpass.getuser()}/"])]:
        assert not [name for name, data in found.items() if place.encode() in data], place
    dataset = Generated.open(tmp_path / "one")
    model = dataset.manifest.models["image"]
    assert model["name"] == "model" and model["sha256"].startswith("sha256:")
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= set(model["parts"])
    assert (model["steps"], model["eta"], model["guidance_scale"], model["scheduler"]) == (3, 1.0, 1.0, "DDIMScheduler")
    assert dataset.manifest.rewards["compressibility"]["range"] == [None, 0.0]
    policy = load_policy(str(tiny_folder), sampler=SamplerConfig(steps=3))
    for case in dataset.cases():
        sample = policy.rollout([Prompt(case.prompt)], [case.provenance["seed"]]).samples[0]
        pixels = np.asarray(Image.open(io.BytesIO(dataset.image(case.image or ""))), dtype=int)
        assert np.abs(pixels - np.asarray(sample.image, dtype=int)).max() <= 1
        assert case.text is None and set(case.row) == {"colour", "thing"}
    assert generate.run(str(tmp_path / "one" / "spec.yaml"), [f"image.model={tiny_folder}"], tmp_path / "one",
                        resume=True) == 0  # fmt: skip
    assert contents(tmp_path / "one") == whole


def test_another_batch_size_makes_the_same_images_to_a_level(tmp_path: Path, tiny: Path) -> None:
    pixels = []
    for size in (1, 4):
        generate.run(str(tiny), [f"image.sampler.batch_size={size}"], tmp_path / str(size))
        dataset = Generated.open(tmp_path / str(size))
        images = [Image.open(io.BytesIO(dataset.image(case.image or ""))) for case in dataset.cases()]
        pixels.append(np.stack([np.asarray(image, dtype=int) for image in images]))
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_adapters(
    tmp_path: Path, tiny_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of an adapter changes the images as the training policy that saved it does. Nothing is said of it."""
    settings = AdapterConfig(rank=2, alpha=2)
    trained = load_policy(str(tiny_folder), adapter=settings, sampler=SamplerConfig(steps=2))
    assert isinstance(trained, DiffusionPolicy)
    for parameter in trained.trainable().values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    folder = trained.save(tmp_path)
    again = load_policy(str(tiny_folder), adapter=settings, sampler=SamplerConfig(steps=2))
    load_adapter(again, folder)
    plain = load_policy(str(tiny_folder), sampler=SamplerConfig(steps=2))

    def asked(policy: Any) -> Any:
        return np.asarray(policy.rollout([Prompt("a red ball")], [3]).samples[0].image)

    before = asked(plain)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    generate_models.attach(plain, folder)
    assert not caplog.records
    logging.getLogger("diffusers.loaders.lora_base").warning("No LoRA keys associated to anything")
    assert caplog.records
    assert np.array_equal(asked(plain), asked(again)) and not np.array_equal(asked(plain), before)
    with pytest.raises(NotFoundError, match="there is no adapter folder"):
        generate_models.attach(plain, tmp_path / "none")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["image.condition=table"], r"condition table: .* has no table encoder"),
        (["image.model=embedded:findings-lm"], r"image.model: embedded:findings-lm makes no images"),
        (["image.model=embedded:none"], r"there is no embedded model 'none'"),
        (["image.adapter=nowhere"], r"there is no adapter folder nowhere"),
        (["rewards=[readability]"], r"rewards: readability judges texts, and none are made"),
        (["rewards=[comp]"], r"there is no reward 'comp'"),
        (["gates=[{gate: memorised, images: nowhere}]"], r"memorised.images: there is no folder nowhere"),
        (["device=tpu9"], r"device 'tpu9' cannot be used here"),
        (
            [
                "rewards=[emoji-checker]",
                "gates=[blank, {gate: reward, reward: emoji-checker, part: cuont, at_least: 1}]",
            ],
            r"gates.1.part: the reward emoji-checker has no part 'cuont'; did you mean count\? its parts .* everything",
        ),
        (
            ["gates=[{gate: reward, reward: compressibility, part: everything, at_least: 1}]"],
            r"gates.0.part: the reward compressibility has no part 'everything'; it has none",
        ),
    ],
)
def test_what_cannot_be_loaded_is_told_before_anything_is_written(
    tmp_path: Path, tiny: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        generate.run(str(tiny), overrides, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["image.model=embedded:emojis"], r"there is no embedded model 'emojis'"),
        (["image.model=embedded:findings-lm"], r"image.model: embedded:findings-lm makes no images"),
        (["image.model=nowhere"], r"no model folder nowhere"),
        (["image.adapter=nowhere"], r"there is no adapter folder nowhere"),
        (["rewards=[clipp]"], r"there is no reward 'clipp'; did you mean clip\?"),
        (["rewards=['clip?modell=x']"], r"has no argument 'modell'"),
        (["rewards=['nowhere.py:score']"], r"there is no file nowhere.py"),
        (["gates=[{gate: memorised, images: nowhere}]"], r"memorised.images: there is no folder nowhere"),
    ],
)
def test_a_dry_run_knows_the_names(tiny: Path, overrides: list[str], said: str, monkeypatch: Any) -> None:
    """And loads nothing for it."""

    def load(*args: object, **options: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(generate_models, "load_policy", load)
    monkeypatch.setattr(generate_models, "load_reward", load)
    generate.plan(str(tiny), [])
    with pytest.raises(UserError, match=rf"^--set .*{said}"):
        generate.plan(str(tiny), overrides)


def test_a_dry_run_warns_of_a_split_that_is_too_small(tiny: Path, capsys: Any) -> None:
    """7 rows of 3 colours: a tenth of them is one row, of one colour."""
    generate.plan(str(tiny), ["splits={train: 0.9, test: 0.1}"])
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: split test has 1 of the 7 rows, and none with colour \w+, colour \w+\n", said)


def test_a_recipe_goes_on_with_the_specification_of_the_folder(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What --set gave need not be given again; a file of one's own, or another recipe, is told the command."""
    out = tmp_path / "out"
    (tmp_path / "tiny").mkdir()
    monkeypatch.setattr(generate, "dataset_recipes", lambda: {"tiny": tiny, "other": tmp_path / "other.yaml"})
    (tmp_path / "other.yaml").write_text(tiny.read_text().replace("name: tiny", "name: other"))
    monkeypatch.setattr(generate_names, "check", lambda spec: None)  # the model of this recipe does not ship
    monkeypatch.setattr(generate_models.Makers, "__init__", stop)
    for recipe, seed in (("tiny", 3), ("other", 0), (str(tiny), 0)):
        out.mkdir(exist_ok=True)
        (out / "spec.yaml").write_text(generate.load("tiny", ["seed=3"]).dump())
        with pytest.raises(Stopped) as caught:
            generate.run(recipe, [], out, resume=True)
        assert caught.value.args[0].seed == seed
    with pytest.raises(Stopped) as caught:
        generate.run("tiny", ["attempts=99"], out, resume=True)
    assert (caught.value.args[0].seed, caught.value.args[0].attempts) == (3, 99)


class Stopped(Exception):
    """With the specification for which something was to be loaded."""


def stop(self: object, spec: object) -> None:
    raise Stopped(spec)


def test_a_place_that_cannot_be_written(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a folder cannot be made, and where it may not: one sentence with the reason, which is no full disk."""
    if sys.platform == "linux":
        with pytest.raises(RefusedError, match=r"cannot write /proc/dataset: no such file or directory"):
            generate.run(str(tiny), [], Path("/proc/dataset"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(RefusedError, match=r"cannot write .*/file/out: not a directory"):
        generate.run(str(tiny), [], tmp_path / "file" / "out")

    def forbidden(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(1, os.strerror(1), str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(RefusedError, match=r"cannot write .*/out: operation not permitted"):
        generate.run(str(tiny), [], tmp_path / "out")


def test_a_bad_specification_ends_with_status_2_and_one_line(tmp_path: Path, tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("red", "red, red"))
    done = CliRunner().invoke(main, ["generate", str(tiny), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    assert done.output == f"error: {tiny}:3: axes.colour: the value 'red' stands there twice\n"
    assert CliRunner().invoke(main, ["generate", "brain-dataset"]).exit_code == 2
    done = CliRunner().invoke(main, ["generate", str(tiny), "--out", str(tmp_path / "out"), "--export", "png"])
    assert done.exit_code == 2 and "so add --allow-unsafe" in done.output and not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, ["generate", str(tiny), "--resume"])
    assert done.output == "error: --resume needs --out: the folder of the dataset to continue\n"


def test_interrupted(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Ctrl-C in the second chunk: 130, and the words to go on with, which end in the bytes of a run left alone."""
    chunk, calls = engine.Engine._chunk, list[int]()

    def stopped(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        chunk(*args)

    monkeypatch.setattr(engine.Engine, "_chunk", stopped)
    assert generate.run(str(tiny), ["seed=3"], tmp_path / "out") == 130
    hint = f"diffalign generate {tiny} --set 'seed=3' --resume --out {tmp_path / 'out'}"
    assert hint in capsys.readouterr().err
    with pytest.raises(ConfigError, match="not empty: choose another --out, or continue it with --resume"):
        generate.run(str(tiny), ["seed=3"], tmp_path / "out")
    out = tmp_path / "out"
    command = f"'diffalign generate {out} --resume --out {out}'"
    with pytest.raises(RefusedError, match=rf"seed was 3, and is 0.*{re.escape(command)}"):
        generate.run(str(tiny), [], out, resume=True)
    whole = f"{out} is not finished: continue it with {command}"
    for looked_at in (["verify"], ["evaluate", "--against", "."], ["export", "--format", "png", "--allow-unsafe"]):
        done = CliRunner().invoke(main, [*looked_at, str(out)])
        assert done.exit_code == 2 and done.output.splitlines()[-1] == f"error: {whole}", done.output
    monkeypatch.undo()
    assert generate.run(str(tiny), ["seed=3"], tmp_path / "out", resume=True) == 0
    assert generate.run(str(tiny), ["seed=3"], tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_model_does_not_go_on_with_a_dataset(tmp_path: Path, tiny: Path, tiny_folder: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The folder has the same name, and other weights in it."""
    monkeypatch.setattr(engine.Engine, "run", lambda self: None)
    generate.run(str(tiny), [], tmp_path / "out")
    other = tmp_path / "model"
    shutil.copytree(tiny_folder, other)
    (other / "scheduler" / "more.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"begun with other models: image.sha256 was"):
        generate.run(str(tiny), [f"image.model={other}"], tmp_path / "out", resume=True)


def test_the_plan_loads_no_model(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """7 cases of 3 steps: 21 calls of the denoiser, up to 8 attempts each; by largest remainder 3 + 2 + 2."""
    monkeypatch.setattr(generate_models, "Makers", None)
    generate.plan(str(tiny), [])
    said = " ".join(capsys.readouterr().out.split())
    assert "cases: 7, each of an image and a table row" in said and "3 red 2 green 2 blue" in said
    assert "images to make: 7 to 56" in said and "denoiser calls: 21 to 168" in said
    assert "gates: blank time: not known, but these are few" in said


def test_the_plan_names_what_it_will_judge_by(tiny: Path, capsys: Any) -> None:
    """Two gates of rewards are told apart; of many cases it says how to find out how long they take."""
    gate = "{gate: reward, reward: emoji-checker, part: PART, at_least: 0.5}"
    judged = f"gates=[blank, {gate.replace('PART', 'count')}, {gate.replace('part: PART, ', '')}]"
    generate.plan(str(tiny), ["cases=700", "rewards=[emoji-checker]", judged])
    said = " ".join(capsys.readouterr().out.split())
    assert "gates: blank, emoji-checker/count >= 0.5, emoji-checker >= 0.5 time:" in said
    assert "--set cases=20 --out FOLDER makes few, and says how many seconds an attempt took" in said


def test_the_seconds_of_an_attempt(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    """They are those of the work divided by all attempts, which are 7 here where nothing is rejected."""
    generate.run(str(tiny), ["gates=[]"], tmp_path / "out")
    found = re.search(r"7 cases by 7 attempts in ([\d.]+) s, ([\d.e-]+) s an attempt", capsys.readouterr().out)
    assert found and float(found[1]) > 0 and abs(float(found[2]) * 7 - float(found[1])) <= 0.1


def test_recipes_are_listed(capsys: Any) -> None:
    listing.show("recipes")
    assert "brain-mr-dataset (generate)" in capsys.readouterr().out


LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def launched(script: Path | str, *arguments: str) -> subprocess.Popen[str]:
    """Two processes of a module or a script, in a session of their own."""
    module = [] if isinstance(script, Path) else ["-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *LAUNCH, *module, str(script), *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def ended(run: subprocess.Popen[str], seconds: float) -> str:
    """What was said by the end, which comes within so many seconds."""
    try:
        return run.communicate(timeout=seconds)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def until(there: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    """Waits for something that the processes do; loading takes a while on a busy machine."""
    deadline = time.monotonic() + 300
    while not there():
        if run.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(ended(run, 0))
        time.sleep(0.1)


def attempts(folder: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{folder / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
            return int(journal.execute("SELECT count(*) FROM attempt").fetchone()[0])
    except sqlite3.Error:
        return 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(tmp_path: Path, tiny: Path, rank: int) -> None:
    """The other one ends within a minute, with a message; what was made is kept, and goes on to the same bytes."""
    out, more = tmp_path / "out", ["cases=64", "image.sampler.steps=20"]
    sets = [word for one in more for word in ("--set", one)]
    run = launched("apps.cli", "generate", str(tiny), *sets, "--out", str(out))
    until(lambda: attempts(out) >= 4, run)
    ranks = {_rank(pid): pid for pid in _children(run.pid)}
    os.kill(ranks[str(rank)], signal.SIGKILL)
    said = ended(run, 60)
    assert run.returncode and "SIGKILL" in said, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert 0 < attempts(out) < 64
    assert generate.run(str(tiny), more, out, resume=True) == 0
    assert generate.run(str(tiny), more, tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _rank(pid: int) -> str:
    facts = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((fact[5:].decode() for fact in facts if fact.startswith(b"RANK=")), "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", ["1", "01"])
def test_processes_that_refuse_while_loading(tmp_path: Path, tiny: Path, ranks: str) -> None:
    """One process alone says why, and both end within a minute; where both refuse, the first speaks."""
    script = tmp_path / "refusing.py"
    script.write_text(
        "import os\n"
        "from apps import generate_models\n"
        "from apps.cli import main\n"
        "from diffalign.errors import InputError\n"
        "def refuse(self):\n"
        f"    open({str(tmp_path / 'refused')!r}, 'a').close()\n"
        "    raise InputError('the weights cannot be read here')\n"
        f"if os.environ['RANK'] in {ranks!r}:\n"
        "    generate_models.Makers.makers = refuse\n"
        "main()\n"
    )
    run = launched(script, "generate", str(tiny), "--out", str(tmp_path / "out"))
    until((tmp_path / "refused").exists, run)
    said = ended(run, 60)
    assert run.returncode and said.count("error: the weights cannot be read here") == 1, said
    assert "exitcode  : 2" in said


ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", [LAUNCH, ACCELERATE])
def test_two_processes_make_the_same_bytes(tmp_path: Path, tiny: Path, launcher: list[str]) -> None:
    """By each launcher, as docs/generate.md has it, without a configuration file of accelerate."""
    command = ["-m", "apps.cli", "generate", str(tiny), "--out"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    two = subprocess.run([sys.executable, *launcher, *command, str(tmp_path / "two")], cwd=ROOT, check=True,
                         env=environment, timeout=300, capture_output=True, text=True)  # fmt: skip
    assert two.stdout.count("writing to") == 1
    subprocess.run([sys.executable, *command, str(tmp_path / "one")], cwd=ROOT, check=True, timeout=300)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
