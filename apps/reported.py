"""What all commands share: errors as one message, and ``--set``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import click

from diffalign.errors import DiffalignError

OPTIONAL = dict.fromkeys(("argon2", "authlib", "fastapi", "gradio", "httpx", "uvicorn"), "label")
OPTIONAL |= {"psycopg": "postgresql", "mlcroissant": "datasets", "pydicom": "datasets"}
"""Packages that not every installation has, and the extra that brings them."""
SEVERAL = ("align", "generate")
"""Commands that several processes may run together."""


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turns our own errors into one message and their exit status."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
        logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own, and would say all twice
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command.__name__ not in SEVERAL:
            click.echo(
                f"error: of the commands only {' and '.join(SEVERAL)} run in several processes; start this one without"
                " 'accelerate launch' or torchrun",
                err=True,
            )
            sys.exit(2)
        try:
            command(*args, **options)
        except DiffalignError as error:
            click.echo(f"error: {printable(str(error))}", err=True)
            sys.exit(error.exit_status)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in OPTIONAL:
                raise
            click.echo(
                f"error: this needs the package {package}: pip install 'diffalign[{OPTIONAL[package]}]'", err=True
            )
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)

    return run


class Commands(click.Group):
    """The commands, of which a wrong word on the line is told in one sentence, as every other mistake is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click; what it finds wrong before the command ends here."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _end(error, ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """See click; what it finds wrong of the commands below this one ends here."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _end(error, ctx)


def _end(error: click.UsageError, ctx: click.Context) -> NoReturn:
    """Says what is wrong on the line and ends; a group alone on it shows its help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        raise error
    said = " ".join(error.format_message().split()).rstrip(".")
    own = error.ctx or ctx
    if isinstance(error, click.NoSuchOption) and isinstance(own.command, click.Group) and not error.possibilities:
        said += f": options stand behind their command, as in '{own.command_path} COMMAND ... {error.option_name}'"
    click.echo(f"error: {said[:1].lower()}{said[1:]} (see '{own.command_path} --help')", err=True)
    sys.exit(error.exit_code)


def printable(text: str) -> str:
    """The text as a terminal may see it: no control codes but the ends of lines, no halves of characters."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


SET = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change one field; may be repeated.")
