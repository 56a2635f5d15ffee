"""Writes docs/cli.md from the ``--help`` of every command: ``python docs/make_cli.py``.

With ``--check`` nothing is written, and the exit status is 1 if the page is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from pages import publish

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 100
HEAD = """# Command line

<!-- Written by `make docs` from the commands themselves; change their help texts, not this page. -->

Exit status: 0 done; 2 a mistake that you can mend, told in one message; 1 anything else; 130 interrupted, with the
state saved.
"""


def commands(command: click.Command, parent: click.Context | None, name: str) -> Iterator[click.Context]:
    """A context for the command and, below a group, for every visible command in the group's order."""
    settings = command.context_settings | {"terminal_width": WIDTH, "max_content_width": WIDTH, "color": False}
    context = command.context_class(command, parent, info_name=name, **settings)
    yield context
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from commands(found, context, child)


def page(group: click.Command, name: str = "diffalign") -> str:
    """The whole page, one section per command."""
    sections = [HEAD]
    for context in commands(group, None, name):
        depth = context.command_path.count(" ")
        help_text = "\n".join(line.rstrip() for line in context.get_help().splitlines())
        sections.append(f"{'#' * (2 + min(depth, 2))} {context.command_path}\n\n```text\n{help_text}\n```\n")
    return "\n".join(sections)


def made() -> str:
    """The page of the command that is here."""
    from apps.cli import main

    return page(main)


if __name__ == "__main__":
    sys.exit(publish(PAGE, made, str(__doc__)))
