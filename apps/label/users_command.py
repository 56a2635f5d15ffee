"""``diffalign label users``: who may log in."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from apps.label.accounts import Accounts
from apps.label.settings import Role
from diffalign.errors import ConfigError, NotFoundError


def path(study: Path, users: Path | None) -> Path:
    """The accounts file of a study."""
    if users is None and not (study / "study.json").is_file():
        raise NotFoundError(f"{study} is no study: it has no study.json")
    return users or study / "users.json"


def add(file: Path, name: str, role: Role, from_stdin: bool) -> None:
    """Adds somebody; the password is asked for, or is the first line of the standard input."""
    accounts = Accounts.load(file)
    accounts.add(name, role, _password(from_stdin))
    accounts.save()
    click.echo(f"{name} may log in as {role}")


def remove(file: Path, name: str) -> None:
    """Takes somebody's account away; their votes stay."""
    accounts = Accounts.load(file)
    accounts.remove(name)
    accounts.save()
    click.echo(f"{name} can no longer log in; votes of theirs stay")


def show(file: Path) -> None:
    """Prints names and roles."""
    found = Accounts.load(file).list()
    for account in found:
        click.echo(f"{account.role:<12} {account.name}")
    if not found:
        click.echo(f"{file} has no accounts; add one by: diffalign label users add {file.parent} NAME")


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise ConfigError("a password is typed at a terminal; otherwise send it as a line and say --password-stdin")
    given: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    return given
