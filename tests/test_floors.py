"""The four floors and the rules of the house: who may import whom, how large a file gets, what no file may hold."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("diffalign", "rewards", "pipelines", "apps")
MODEL_FAMILIES = {"diffusers", "open_clip", "peft", "timm", "tokenizers", "transformers"}
FORBIDDEN = {
    "diffalign": {"rewards", "pipelines", "apps"} | MODEL_FAMILIES,
    "rewards": {"pipelines", "apps"},
    "pipelines": {"rewards", "apps"},
    "apps": set[str](),
}
HEAVY = {"accelerate", "diffusers", "gradio", "matplotlib", "open_clip", "peft", "scipy", "torch", "torchvision"}
HEAVY |= {"transformers"}
LONGEST_FILE = 450

MODULES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
EVERY_MODULE = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Top-level package and line of every import in a module: nested, for types only, and by name, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], node.lineno
        elif isinstance(node, ast.Call) and node.args and called(node) in ("import_module", "__import__"):
            name = node.args[0]
            if isinstance(name, ast.JoinedStr) and name.values:
                name = name.values[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value.partition(".")[0], node.lineno


def called(node: ast.Call) -> str:
    """The last name of what is called: ``import_module`` for ``importlib.import_module(...)``."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def files() -> Iterator[Path]:
    """Every file of the tree, without environments, caches and what programs write."""
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder)
        skipped = {".git", "__pycache__", "node_modules"}
        if here == ROOT:
            skipped |= {"build", "dist", "runs", "site"}
        folders[:] = sorted(
            name
            for name in folders
            if name not in skipped
            and not name.endswith((".egg-info", "cache"))
            and name != ".hypothesis"
            and not (here / name / "pyvenv.cfg").exists()
        )
        yield from (here / name for name in sorted(names) if name != ".git")


def test_the_scan_sees_every_kind_of_import() -> None:
    source = """
import a.b, c
from d.e import f
from . import sibling
def function():
    import g
    importlib.import_module("h.i")
    __import__("j")
    import_module(f"k.{name}")
if TYPE_CHECKING:
    from l import m
"""
    assert sorted(name for name, _ in imported(ast.parse(source))) == ["a", "c", "d", "g", "h", "j", "k", "l"]


@EVERY_MODULE
def test_arrows_point_downward(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [f"{path.name}:{line} imports {name}" for name, line in imported(tree) if name in FORBIDDEN[floor]]
    assert not wrong, f"{floor}/ must not import that: {'; '.join(wrong)}"


@EVERY_MODULE
def test_every_public_module_says_what_it_is(path: Path) -> None:
    if path.stem.startswith("_") and path.stem != "__init__":
        return
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a module starts with a docstring"


@EVERY_MODULE
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines; a file has up to {LONGEST_FILE}: split it by what it is about"


def test_no_file_names_a_machine_or_a_package_index() -> None:
    """Absolute paths of somebody's home or workplace, and host names of package indexes, belong into no file."""
    # Not after a letter, so that the path of a web address or of a repository passes.
    place = re.compile(rb"(?<![\w.~/-])/(?:home|root|work|Users)/[\w.-]")
    host = re.compile(
        rb"(?:pypi|pythonhosted|npmjs|anaconda|yarnpkg)\.(?:org|com)|download\.pytorch\.org", re.IGNORECASE
    )
    found = []
    for path in files():
        with path.open("rb") as file:
            data = file.read(1_000_000)  # whole texts, and the headers of weights
        hits = [match[0] for pattern in (place, host) for match in pattern.finditer(data)]
        found += [f"{path.relative_to(ROOT)}: {hit.decode(errors='replace')}" for hit in hits]
    assert not found, "\n".join(found)


def test_constraints_pin_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line)]
    assert pins
    assert not wrong


HELP = """
import sys
import click
from apps.cli import main

def walk(command, parent=None, name="diffalign"):
    context = command.context_class(command, parent, info_name=name, **command.context_settings)
    command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            walk(command.get_command(context, child), context, child)

walk(main)
print(*sorted({module.partition(".")[0] for module in sys.modules}))
"""


def test_help_of_every_command_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_help_answers_at_once() -> None:
    """Under a second on an idle machine; the best of three tries may take 3 s on a busy one."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "apps.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "align" in done.stdout
        if seconds[-1] < 3:
            break
    assert min(seconds) < 3


LOOP = ["trainer", "lessons", "steps", "actor_critic", "credit", "experience", "evaluation", "checks", "methods"]
LOOP_FILES = [ROOT / "diffalign" / f"{name}.py" for name in LOOP]
LOOP_FILES += sorted((ROOT / "diffalign" / "objectives").glob("*.py"))


def looks_at_the_modality(tree: ast.AST) -> Iterator[int]:
    """Lines that compare something with the name of a modality, or reach for a sample's image or text."""
    for node in ast.walk(tree):
        names = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
        compares = isinstance(node, ast.Compare | ast.MatchValue) and bool(names & {"image", "text"})
        if compares or (isinstance(node, ast.Attribute) and node.attr in ("image", "text")):
            yield node.lineno


def test_the_scan_sees_a_branch_on_the_modality() -> None:
    source = 'if policy.modality == "text": pass\nx = sample.image\nmatch kind:\n    case "image": pass\n'
    assert sorted(looks_at_the_modality(ast.parse(source))) == [1, 2, 4]


@pytest.mark.parametrize("path", LOOP_FILES, ids=lambda path: path.name)
def test_the_training_engine_has_no_branch_on_modality(path: Path) -> None:
    """Images and texts go through the same loop: what differs is in the policy, and in tables by modality."""
    assert not list(looks_at_the_modality(ast.parse(path.read_text(encoding="utf-8"))))
