"""What a person reads in a browser where a request is refused; programs get the same sentence as JSON."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Template

TITLES = {403: "This page is not open to you", 404: "There is no such page"}


def page(status: int, reason: str, name: str | None) -> bytes:
    """A page that says why, and leads back to the pairs who is logged in (``name``)."""
    sentence = f"{reason[:1].upper()}{reason[1:].rstrip('.')}."
    text = _template().render(title=TITLES.get(status, "That did not work"), sentence=sentence, name=name)
    return text.encode("utf-8", "replace")


@cache
def _template() -> Template:
    templates = Path(__file__).with_name("templates")
    return Environment(loader=FileSystemLoader(templates), autoescape=True).get_template("refused.html")
