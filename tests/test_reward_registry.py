"""Names of rewards, and users' own rewards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.experience import Rollouts
from diffalign.types import Prompt, Reward, Sample
from rewards import registry
from rewards.registry import load

Write = Callable[..., str]
ROOT = Path(__file__).resolve().parent.parent


def shades(*levels: int) -> list[Sample]:
    return [Sample(Prompt("a shade", attributes={"level": n}), Image.new("L", (8, 8), n)) for n in levels]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_every_name_has_a_line_and_the_contract_is_kept() -> None:
    assert list(registry.names()) == [
        "compressibility", "incompressibility", "clip", "emoji-checker", "brain-mr-checker", "findings-checker",
        "findings-gold", "readability", "length", "format", "sentiment", "profanity", "judge", "hidden-utility",
        "preference", "clinician", "language-reward", "aesthetic", "pickscore", "hpsv2", "imagereward", "biomedclip",
        "xray-findings", "mr-artefact",
    ]  # fmt: skip
    assert all(line and "\n" not in line for line in registry.names().values())


@pytest.mark.parametrize("name", ["compressibility", "incompressibility", "emoji-checker"])
def test_a_name_gives_the_reward_of_that_name(name: str) -> None:
    reward = load(name)
    assert isinstance(reward, Reward)
    assert reward.name == name


def test_arguments_are_typed_by_the_constructor() -> None:
    assert load("emoji-checker?graded=true").graded is True  # type: ignore[attr-defined]
    assert load("emoji-checker?graded=false").graded is False  # type: ignore[attr-defined]
    clip = load("clip?model=ViT-B-32&pretrained=laion2b_s34b_b79k&name=laion")
    assert (clip.model, clip.pretrained, clip.name) == ("ViT-B-32", "laion2b_s34b_b79k", "laion")  # type: ignore[attr-defined]
    assert load("clip?model=ViT-B-32?pretrained=openai").pretrained == "openai"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("compresibility", "did you mean compressibility"),
        ("emoji-checker?grade=true", "did you mean graded"),
        ("emoji-checker?graded=maybe", "graded='maybe' cannot be used"),
        ("compressibility?quality=3", "takes no arguments"),
        ("emoji-checker?graded", "'graded' is not an argument"),
        ("emoji-checker?graded=1&graded=0", "gives graded twice"),
        ("aesthetic", "needs its weights"),
        ("preference", "needs the argument folder"),
        ("mine.py", "names a file but no function"),
        ("", "no reward ''"),
    ],
)
def test_a_name_that_means_nothing_is_told(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_listing_the_names_imports_nothing_heavy() -> None:
    code = "import sys, rewards.registry; rewards.registry.names(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "PIL", "numpy", "pydantic"} & set(done.stdout.split())


def test_a_function_of_the_samples(write: Write) -> None:
    path = write("def level(samples):\n    return [s.prompt.attributes['level'] for s in samples]\n")
    reward = load(f"{path}:level")
    assert isinstance(reward, Reward)
    assert reward.name == "level"
    assert reward(shades(3, 5)).total.tolist() == [3, 5]
    assert reward([]).total.shape == (0,)


def test_the_signature_of_other_toolkits(write: Write) -> None:
    """A shade of 51 of 255 is a mean of 0.2 in [0, 1]; its level is in the metadata, its text has 7 letters."""
    path = write(
        "def three(images, prompts, metadata):\n"
        "    assert images.shape[1:] == (3, 8, 8)\n"
        "    scores = images.mean((1, 2, 3)).numpy()\n"
        "    return scores, {'level': [m['level'] for m in metadata], 'note': 'not a score', 'texts': list(prompts)}\n"
        "def two(images, prompts):\n    return [len(p) for p in prompts]\n"
        "def one(images):\n    return images.amax((1, 2, 3), keepdim=False)[:, None]\n"
        "def defaults(images, prompts, metadata=None, scale=2):\n    return [scale * len(metadata)] * len(prompts)\n"
        "def threshold(samples, limit=5):\n    return [limit] * len(samples)\n"
        "def anything(*args):\n    return [len(args)] * len(args[1])\n"
    )
    scores = load(f"{path}:three")(shades(51, 102))
    torch.testing.assert_close(scores.total, torch.tensor([0.2, 0.4]))
    assert list(scores.parts) == ["level"]
    assert scores.parts["level"].tolist() == [51, 102]
    expected = {"two": [7, 7], "one": [1, 0], "defaults": [4, 4], "threshold": [5, 5], "anything": [3, 3]}
    assert {name: load(f"{path}:{name}")(shades(255, 0)).total.tolist() for name in expected} == expected


def test_images_of_several_sizes_come_in_groups(write: Write) -> None:
    path = write("def f(images, prompts, metadata):\n    return [images.shape[-1]] * len(prompts)\n")
    samples = [Sample(Prompt(""), Image.new("RGB", (n, 8))) for n in (8, 16, 8)] + [Sample(Prompt(""), None)]
    total = load(f"{path}:f")(samples).total
    assert total[:3].tolist() == [8, 16, 8]
    assert total[3].isnan()


def test_none_is_nan_and_a_pair_of_numbers_is_two_scores(write: Write) -> None:
    path = write("def f(samples):\n    return (None, True) if len(samples) == 2 else [1.5]\n")
    total = load(f"{path}:f")(shades(1, 2)).total
    assert total.isnan().tolist() == [True, False]
    assert total[1] == 1
    assert total.dtype == torch.float32


CLASS = """
import torch
from diffalign.types import Scores

class Contrast:
    name = "contrast"
    modality = "image"
    unit = "levels"
    range = (0.0, 255.0)
    higher_is_better = True

    def __init__(self, scale: float = 1.0, twice: bool = False):
        self.scale = scale * (2 if twice else 1)

    def __call__(self, samples):
        return Scores(torch.full((len(samples),), self.scale))

ready = Contrast(7.0)

class Bare:
    def __call__(self, samples):
        return [9] * len(samples)

class Needy:
    def __init__(self, folder):
        raise OSError(f"no {folder}")
"""


def test_classes_and_objects(write: Write) -> None:
    path = write(CLASS)
    assert load(f"{path}:Contrast?scale=1.5&twice=true")(shades(1)).total.tolist() == [3]
    assert load(f"{path}:ready")(shades(1)).total.tolist() == [7]
    assert load(f"{path}:Bare")(shades(1)).total.tolist() == [9]
    with pytest.raises(ConfigError, match=r"no argument 'scales'; did you mean scale\?"):
        load(f"{path}:Contrast?scales=2")
    with pytest.raises(ConfigError, match="scale='big' cannot be used"):
        load(f"{path}:Contrast?scale=big")
    with pytest.raises(ConfigError, match="needs the argument folder"):
        load(f"{path}:Needy")
    with pytest.raises(ConfigError, match=r"could not be built at .*mine\.py, line 26: OSError: no x"):
        load(f"{path}:Needy?folder=x")
    with pytest.raises(ConfigError, match="takes no arguments"):
        load(f"{path}:ready?scale=2")


def test_a_file_may_import_its_neighbour(write: Write) -> None:
    write("LEVEL = 4\n", "a_neighbour_of_mine.py")
    path = write("from a_neighbour_of_mine import LEVEL\ndef f(samples):\n    return [LEVEL] * len(samples)\n")
    assert load(f"{path}:f")(shades(1)).total.tolist() == [4]


def test_a_module_that_is_installed() -> None:
    assert load("tests.test_reward_registry:always_one")(shades(1, 2)).total.tolist() == [1, 1]


def always_one(samples: list[Sample]) -> list[int]:
    return [1] * len(samples)


def test_what_cannot_be_loaded_is_told_with_file_and_line(write: Write, tmp_path: Path) -> None:
    path = write("import os\n\ndef broken(samples:\n    pass\n")
    with pytest.raises(ConfigError, match=r"mine\.py, line 3, is not valid Python"):
        load(f"{path}:broken")
    path = write("def f(samples):\n    return []\n\nraise KeyError('later')\n", "raises.py")
    with pytest.raises(ConfigError, match=r"at .*raises\.py, line 4: KeyError"):
        load(f"{path}:f")
    path = write("def g(samples):\n    return []\nNUMBER = 3\ndef h(a, b, c, d):\n    pass\n", "other.py")
    with pytest.raises(ConfigError, match=r"has no 'f'; it has g, h"):
        load(f"{path}:f")
    with pytest.raises(ConfigError, match=r"NUMBER is 3 \(int\)"):
        load(f"{path}:NUMBER")
    with pytest.raises(ConfigError, match=r"h\(a, b, c, d\) cannot be called"):
        load(f"{path}:h")
    with pytest.raises(NotFoundError, match="there is no file"):
        load(f"{tmp_path / 'none.py'}:f")
    with pytest.raises(NotFoundError, match="no module 'no_such_module' is installed"):
        load("no_such_module:f")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "1 scores for 2 samples"),
        ("return 3", r"returned 3 \(int\)"),
        ("return None", "returned None"),
        ("return {'a': 1, 'b': 2}", "return a list"),
        ("return ['high', 'low']", "the text 'high'"),
        ("return [1.0, [2.0]]", r"returned \[2.0\] \(list\) as a score"),
        ("import torch; return torch.ones(2, 2)", r"shape \(2, 2\) for 2 samples"),
        ("import numpy; return numpy.array(['a', 'b'])", "the text 'a'"),
        ("return [1 / 0]", r"failed at .*mine\.py, line 2: ZeroDivisionError"),
    ],
)
def test_a_wrong_answer_is_told(write: Write, body: str, message: str) -> None:
    path = write(f"def wrong(samples):\n    {body}\n")
    with pytest.raises(InputError, match=message) as caught:
        load(f"{path}:wrong")(shades(1, 2))
    assert "wrong" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_function_of_a_script_is_a_reward() -> None:
    """As the command takes it from a file: both signatures, objects, attributes; a fault names its line."""

    def first(samples: Sequence[Sample]) -> list[float]:
        return [float(np.asarray(sample.image)[0, 0]) for sample in samples]

    def redness(images: Any, prompts: Any, metadata: Any) -> Any:
        return images[:, 0].mean((1, 2))

    class Judge:
        unit = "grey"

        def __call__(self, samples: Sequence[Sample]) -> list[float]:
            return [1 / 0 for _ in samples]

    assert load(first)(shades(1, 2)).total.tolist() == [1, 2] and load(first).name == "first"
    torch.testing.assert_close(load(redness)(shades(51, 102)).total, torch.tensor([0.2, 0.4]))
    made = load(Judge())
    assert (made.name, made.unit, load(made)) == ("Judge", "grey", made)
    with pytest.raises(
        InputError, match=r"the reward Judge failed at .*test_reward_registry\.py, line \d+: ZeroDivision"
    ):
        made(shades(1))
    with pytest.raises(ConfigError, match="give an object of it"):
        load(Judge)
    with pytest.raises(ConfigError, match=r"Judge does not say .* rewards\.load_reward makes one"):
        Rollouts(Judge(), [Prompt("a")])  # type: ignore[arg-type]
