"""A rater's page in a real browser, for tests: Chromium under Playwright, against a real server process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from diffalign.study import Study, database
from diffalign.study.schema import AssignmentRow, VoteRow
from tests.label_server import Server

CHROMIUM = Path(os.environ.get("DIFFALIGN_TEST_CHROMIUM", "/usr/bin/chromium"))
REQUIRED = "browser" in os.environ.get("DIFFALIGN_TEST_REQUIRE", "")
LAPTOP = {"width": 1366, "height": 768}
PROBES = re.sub(r";\s*$", "", Path(__file__).with_name("label_probes.js").read_text(encoding="utf-8").split("\n", 1)[1])
PATIENCE = 15_000
"""Milliseconds that a test waits for the page."""


def lacking(what: str) -> None:
    """Skips, or fails where the environment says that a browser has to be there."""
    if REQUIRED:
        pytest.fail(f"{what}, and DIFFALIGN_TEST_REQUIRE asks for the browser tests")
    pytest.skip(f"{what}; the browser tests need Playwright and Chromium")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("Playwright is not installed")
    if not CHROMIUM.is_file():
        lacking(f"there is no {CHROMIUM.name}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


class Seat:
    """A browser window of one rater, logged in."""

    def __init__(self, browser: Any, server: Server, name: str | None, **options: Any) -> None:
        self.server = server
        self.context = browser.new_context(**{"viewport": LAPTOP, **options})
        self.context.set_default_timeout(PATIENCE)
        self.log_in(name)
        self.errors: list[str] = []
        self.page = self.tab()

    def log_in(self, name: str | None) -> None:
        """Gives the window the cookie of a session; None for a server without accounts."""
        if name is None:
            return
        with closing(self.server.client(name)) as client:
            jar = [{"name": one.name, "value": str(one.value), "url": self.server.url} for one in client.cookies.jar]
        self.context.add_cookies(jar)

    def tab(self) -> Any:
        """Another tab; what fails in its scripts is kept in ``errors``."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        return page

    def open(self, page: Any = None, where: str = "/rate/") -> Seat:
        """Goes to the page, past the guideline where it is shown, to the first pair."""
        page = page or self.page
        page.goto(self.server.url + where)
        page.wait_for_selector("#pane dialog[open], #pane[data-state=ready], #pane[data-state=over]")
        if page.query_selector("#pane dialog[open]"):
            page.keyboard.press("Enter")
        page.wait_for_selector("#pane[data-state=ready], #pane[data-state=over]")
        return self

    def token(self, page: Any = None) -> str:
        """What the server calls the pair on the screen."""
        token: str = (page or self.page).get_attribute("#pane", "data-token")
        return token

    def act(self, key: str) -> str:
        """Presses a key and waits for another pair; returns the token of the one that was there."""
        before = self.token()
        self.page.keyboard.press(key)
        self.another(before)
        return before

    def another(self, before: str) -> None:
        """Waits until another pair than that can be answered, or all are done."""
        self.page.wait_for_selector(f"#pane[data-state=ready]:not([data-token='{before}']), #pane[data-state=over]")

    def digits(self, whose: str) -> None:
        """Waits until the digits answer "questions", or the "pair"."""
        self.page.wait_for_selector(f"#pane[data-digits={whose}]")

    def said(self) -> str:
        """The quiet sentence about what was saved."""
        text: str = self.page.text_content("#pane .said")
        return text

    def script(self, code: str, argument: object = None) -> Any:
        """What a script in the page returns."""
        return self.page.evaluate(code, argument)

    def probe(self, name: str, argument: object = None) -> Any:
        """What a function of ``label_probes.js`` says about the page."""
        return self.page.evaluate(f"(argument) => {PROBES}['{name}'](argument)", argument)

    def close(self) -> None:
        """Closes the window; what failed in a script fails the test."""
        self.context.close()
        assert not self.errors, self.errors


@dataclass(frozen=True)
class Kept:
    """A vote as the database has it."""

    token: str
    choice: str
    strength: int | None
    criteria: Mapping[str, Any]
    points: list[Mapping[str, Any]]
    comment: str
    seconds: float


def votes(study: Study, *tokens: str) -> list[Kept]:
    """The votes that live, in the order in which they came; of these assignments, or of all."""
    query = select(
        VoteRow.id, VoteRow.undoes, VoteRow.choice, VoteRow.strength, VoteRow.answers, VoteRow.points, VoteRow.comment,
        VoteRow.shown_at, VoteRow.decided_at, AssignmentRow.token,
    ).join(AssignmentRow, AssignmentRow.id == VoteRow.assignment_id).order_by(VoteRow.id)  # fmt: skip
    with database.reading(study.engine) as connection:
        rows = connection.execute(query).all()
    undone = {row.undoes for row in rows}
    return [
        Kept(row.token, row.choice, row.strength, row.answers, row.points, row.comment, row.decided_at - row.shown_at)
        for row in rows
        if row.undoes is None and row.id not in undone and (not tokens or row.token in tokens)
    ]


def state(study: Study, token: str) -> str:
    """What became of an assignment."""
    with database.reading(study.engine) as connection:
        found: str = connection.execute(select(AssignmentRow.state).where(AssignmentRow.token == token)).scalar_one()
    return found
