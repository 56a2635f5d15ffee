"""``make label-demo``: a study of embedded samples with two accounts, made once and served at a printed address."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from apps import build, evaluate
from apps.label import serve
from apps.label.accounts import Accounts
from apps.label.settings import Role
from apps.progress import Status
from diffalign import prompts as prompt_sources
from diffalign.errors import DiffalignError
from diffalign.seeds import derive
from diffalign.study import Protocol, Study, StudyPair
from diffalign.types import Prompt, Sample
from diffalign.worlds import brain_mr

FOLDER = Path("runs/label-demo")
PORT = 8000
WORLDS = ("emoji", "brain-mr")
STEPS = (4, 20)
"""Denoising steps of the two arms: fewer are coarser, which one can see."""
PAIRS = 16
"""Pairs of images of each world, and of texts."""
GOLD = 6
KEPT = "demo-accounts.json"
ACCOUNTS: dict[str, Role] = {"demo-rater": "rater", "demo-admin": "admin"}


def main(arguments: list[str]) -> int:
    """Makes the study if there is none, prints the accounts, and serves until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="label-demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the study is, or will be")
    parser.add_argument("--port", type=int, default=PORT, help="another one is taken if this is in use")
    given = parser.parse_args(arguments)
    try:
        if not (given.folder / "study.json").is_file():
            make(given.folder)
        click.echo(f"The study is {given.folder}; delete the folder to begin anew.")
        for name, password in accounts(given.folder).items():
            click.echo(f"  log in as  {name:<11} password  {password}")
        serve.run(given.folder, port=given.port if _free(given.port) else 0, say=click.echo)
    except DiffalignError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_status
    return 0


def make(folder: Path) -> None:
    """The study: pictures of both worlds by few and by many steps, and sentences, with gold among them."""
    click.echo("Making a study of embedded samples: about half a minute, once.")
    with Status() as status:
        made = Study.create(folder, Protocol.load("general"), pairs(status), "Demonstration: pictures and sentences")
        made.close()


def pairs(status: Status) -> Iterator[StudyPair]:
    """Everything that can be judged."""
    for world in WORLDS:
        status(f"sampling {world}", 0, 1)
        yield from pictures(world)
        status(f"sampling {world}", 1, 1)
    yield from sentences()


def pictures(world: str) -> Iterator[StudyPair]:
    """The same prompts and seeds with few and with many steps."""
    config = build.standard(f"embedded:{world}")
    assert config is not None, world
    asked = prompt_sources.load(config.prompts, config.seed)[1][:PAIRS]
    seeds = [derive(0, "label-demo", prompt.key) for prompt in asked]
    samples = []
    for steps in STEPS:
        chosen = config.model_copy(update={"sampler": config.sampler.model_copy(update={"steps": steps})})
        samples.append(evaluate.sampler(config.model, chosen).rollout(asked, seeds).samples)
    first, second = (f"{steps} steps" for steps in STEPS)
    for few, many in zip(*samples, strict=True):
        yield StudyPair(few.prompt, few, many, first, second)


def sentences() -> Iterator[StudyPair]:
    """A table row, and two sentences: two wordings of it, or, as gold, one of them with the wrong side."""
    for number, prompt in enumerate(brain_mr.prompts("held-out", PAIRS + GOLD, task="lesion")):
        facts = {name: str(value) for name, value in prompt.attributes.items()}
        row = ", ".join(f"{name} {value}" for name, value in facts.items())
        asked = Prompt(f"Say in one sentence: {row}", f"sentence-{number}", facts)
        right = brain_mr.caption(facts, 1)
        if number >= GOLD:
            other = brain_mr.caption(facts, 2)
            yield StudyPair(asked, Sample(asked, text=right), Sample(asked, text=other), "wording 1", "wording 2")
            continue
        sides = brain_mr.SIDES[facts["plane"]]
        wrong = brain_mr.caption({**facts, "side": next(side for side in sides if side != facts["side"])}, 1)
        texts = (Sample(asked, text=right), Sample(asked, text=wrong))
        yield StudyPair(asked, *texts, "right side", "wrong side", "first")


def accounts(folder: Path) -> dict[str, str]:
    """Names and passwords of the demonstration, made once. They are kept beside it, readable by their owner alone."""
    kept = folder / KEPT
    if kept.is_file():
        found: dict[str, str] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    passwords = {name: secrets.token_urlsafe(9) for name in ACCOUNTS}
    users = Accounts.load(folder / serve.USERS)
    for name, password in passwords.items():
        users.add(name, ACCOUNTS[name], password)
    users.save()
    with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(passwords, file)
    return passwords


def _free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
