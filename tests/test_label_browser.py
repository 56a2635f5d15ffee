"""The rating page in a real browser: every vote is about what was on the screen, is kept once, and is never lost."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select

from diffalign.study import Protocol, Study, StudyPair, database
from diffalign.study.schema import SampleRow
from diffalign.types import Prompt, Sample
from tests.label_browser import Seat, chromium, state, votes
from tests.label_server import Server, made, serving, write_users

PAIRS = 320
RATERS = [f"rater {number}" for number in range(20)]
ACCOUNTS = {**dict.fromkeys(RATERS, "rater"), "judge": "adjudicator", "chief": "admin"}
PROTOCOL = """
name: browser
version: 1
question: Which one?
guideline: |
  Look at both.
  - one: a line
criteria:
  - {name: anatomy, question: "Which anatomy is better?"}
  - {name: realism, question: "How real is each?", kind: scale, anchors: [not at all, somewhat, fully]}
points: [artefact, wrong finding]
overlap: 20
min_view_seconds: 0
"""
STATIC = Path(__file__).resolve().parent.parent / "apps" / "label" / "static"
CHOICE_OF_KEY = {
    "1": "left", "ArrowLeft": "left", "2": "right", "ArrowRight": "right", "3": "tie_good", "4": "tie_bad",
    "0": "cannot_judge",
}  # fmt: skip


def grey(value: int, size: int = 32) -> Image.Image:
    """An image of one grey."""
    return Image.new("RGB", (size, size), (value, value, value))


def alike() -> tuple[Image.Image, Image.Image]:
    """Noise twice, with one corner pixel changed."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    other = pixels.copy()
    other[0, 0] = 255 - other[0, 0]
    return Image.fromarray(pixels), Image.fromarray(other)


def mixed_pairs(count: int) -> Iterator[StudyPair]:
    """Pairs of grey images, every fifth one of texts, every tenth one of noise."""
    for i in range(count):
        asked = Prompt(f"what was asked for in pair {i}")
        if i % 10 == 3:
            asked, (one, two) = Prompt(f"alike {i}"), alike()
            yield StudyPair(asked, Sample(asked, image=one), Sample(asked, image=two), "base", "tuned")
        elif i % 5 == 4:
            yield StudyPair(asked, Sample(asked, text=f"first {i}"), Sample(asked, text=f"second {i}"), "base", "tuned")
        else:
            one, two = grey(60 + i % 100), grey(61 + i % 100)
            yield StudyPair(asked, Sample(asked, image=one), Sample(asked, image=two), "base", "tuned")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that is large enough for all tests; each has a rater of its own."""
    return made(
        tmp_path_factory.mktemp("browser") / "study", mixed_pairs(PAIRS), Protocol.parse(PROTOCOL), title="Greys"
    )


@pytest.fixture(scope="module")
def server(study: Study, browser: Any) -> Iterator[Server]:
    """Its server."""
    with serving(study.folder, ACCOUNTS) as running:
        yield running


Sit = Callable[..., Seat]


@pytest.fixture
def sit(browser: Any) -> Iterator[Sit]:
    """Opens windows, and closes them after the test."""
    opened: list[Seat] = []

    def open_one(server: Server, name: str | None, where: str = "/rate/", **options: Any) -> Seat:
        seat = Seat(browser, server, name, **options)
        opened.append(seat)
        return seat.open(where=where)

    yield open_one
    for seat in opened:
        seat.close()


def to_greys(seat: Seat) -> None:
    """Goes on to a pair of grey images."""
    while seat.page.get_attribute("#pane", "data-kind") != "image" or "alike" in seat.page.inner_text(".prompt"):
        seat.act("0")


# --- answering ---


def test_two_hundred_pairs_by_keyboard(sit: Sit, server: Server, study: Study) -> None:
    """What was pressed for each pair is what the database has for it, and the page never showed a pair twice."""
    seat = sit(server, RATERS[0])
    chance = np.random.default_rng(4)
    pressed = {}
    for _ in range(200):
        key = str(chance.choice(list(CHOICE_OF_KEY)))
        pressed[seat.act(key)] = CHOICE_OF_KEY[key]
    assert len(pressed) == 200
    assert {vote.token: vote.choice for vote in votes(study, *pressed)} == pressed
    assert seat.page.inner_text(".count") == f"200 done · about {PAIRS - 200} left"


def test_undo_gives_the_pair_back_with_the_answer_and_the_last_answer_counts(
    sit: Sit, server: Server, study: Study
) -> None:
    seat = sit(server, RATERS[1])
    seat.page.keyboard.press("k")
    seat.page.keyboard.press("c")
    seat.page.keyboard.type("1 is hard to tell")
    seat.page.keyboard.press("Escape")
    seat.page.click("[data-criterion=anatomy] label:nth-child(3)")
    token = seat.act("ArrowLeft")
    following = seat.act("u")
    assert seat.token() == token
    assert votes(study, token) == []
    assert seat.page.get_attribute("[data-choice=left]", "data-before") is not None
    assert seat.page.get_attribute(".strength button:nth-child(2)", "aria-pressed") == "true"
    assert seat.page.input_value("#comment") == "1 is hard to tell"
    assert seat.page.is_checked("[data-criterion=anatomy] label:nth-child(3) input")
    seat.act("2")
    (vote,) = votes(study, token)
    assert (vote.choice, vote.strength, vote.criteria) == ("right", 2, {"anatomy": "right"})
    assert seat.token() == following


def test_skip_and_flag_put_a_pair_aside(sit: Sit, server: Server, study: Study) -> None:
    seat = sit(server, RATERS[2])
    skipped = seat.act("s")
    flagged = seat.token()
    seat.page.keyboard.press("f")
    seat.page.wait_for_selector("dialog[open]")
    seat.page.fill("#reason", "1 f s")
    seat.page.click("dialog .danger")
    seat.another(flagged)
    assert [state(study, token) for token in (skipped, flagged)] == ["skipped", "flagged"]
    assert votes(study, skipped, flagged) == []


def test_a_flag_needs_a_reason_and_undo_takes_it_back(sit: Sit, server: Server, study: Study) -> None:
    """F and Enter, as often as one likes, flag nothing. After a flag, U takes that back, not the vote before it, and so
    it is when the page was reloaded."""
    seat = sit(server, RATERS[0])
    voted = seat.act("1")
    token = seat.token()
    seat.page.keyboard.press("f")
    for _ in range(3):
        seat.page.keyboard.press("Enter")
    assert seat.page.inner_text("dialog [role=alert]") == "Choose a reason, or write one."
    seat.page.keyboard.press("Escape")
    seat.page.wait_for_selector("dialog", state="detached")
    assert (seat.token(), state(study, token)) == (token, "open")
    for key in ("f", "2"):
        seat.page.keyboard.press(key)
    assert seat.page.is_checked("dialog .reason:nth-child(2) input")
    assert seat.act("Enter") == token
    assert state(study, token) == "flagged"
    assert "Undo flag" in seat.page.inner_text("[data-action=undo]")
    seat.page.reload()
    seat.page.wait_for_selector("#pane[data-state=ready]")
    seat.act("u")
    assert state(study, token) != "flagged"
    assert [vote.choice for vote in votes(study, voted)] == ["left"]
    assert "Undo flag" not in seat.page.inner_text("[data-action=undo]")
    while seat.token() != voted:
        seat.act("u")
    assert votes(study, voted) == [], "the next one takes back the vote"


def test_reload_shows_the_same_pair_and_keeps_what_was_written(sit: Sit, server: Server, study: Study) -> None:
    seat = sit(server, RATERS[3])
    seat.act("1")
    token = seat.token()
    seat.page.fill("#comment", "half a sentence")
    seat.page.keyboard.press("Escape")
    seat.page.reload()
    seat.page.wait_for_selector("#pane[data-state=ready]")
    assert (seat.token(), seat.page.input_value("#comment")) == (token, "half a sentence")
    seat.act("2")
    assert [vote.comment for vote in votes(study, token)] == ["half a sentence"]


def test_a_killed_server_loses_nothing(sit: Sit, server: Server, study: Study) -> None:
    """An answer given while the server is away waits on the screen, and is kept once when the server is back."""
    seat = sit(server, RATERS[4])
    saved = seat.act("1")
    token = seat.token()
    server.kill()
    seat.page.keyboard.press("2")
    seat.page.wait_for_selector(".notice:visible")
    assert "Not saved yet" in seat.page.inner_text(".notice")
    assert seat.token() == token
    server.start()
    seat.another(token)
    assert seat.page.is_hidden(".notice")
    assert [(vote.token, vote.choice) for vote in votes(study, saved, token)] == [(saved, "left"), (token, "right")]


@pytest.mark.parametrize("arrived", [False, True], ids=["request lost", "answer lost"])
def test_a_failing_network_keeps_the_answer_and_saves_it_once(
    arrived: bool, sit: Sit, server: Server, study: Study
) -> None:
    seat = sit(server, RATERS[5])
    token = seat.token()
    sent: list[str] = []
    down = True

    def fail(route: Any) -> None:
        sent.append(route.request.post_data)
        if not down:
            route.continue_()
            return
        if arrived:
            route.fetch()
        route.abort()

    seat.page.route("**/api/vote*", fail)
    seat.page.keyboard.press("1")
    seat.page.wait_for_selector(".notice:visible")
    assert seat.token() == token
    while len(sent) < 2:
        seat.page.click(".notice button")
    down = False  # from here on it is sent again by the page itself
    seat.another(token)
    assert seat.page.is_hidden(".notice")
    assert set(sent) == {sent[0]}, "the same answer is sent again"
    assert [vote.choice for vote in votes(study, token)] == ["left"]


def test_an_answer_outlives_a_reload_while_the_network_is_down(sit: Sit, server: Server, study: Study) -> None:
    seat = sit(server, RATERS[6])
    token = seat.token()
    seat.page.route("**/api/vote*", lambda route: route.abort())
    seat.page.keyboard.press("4")
    seat.page.wait_for_selector(".notice:visible")
    seat.page.unroute("**/api/vote*")
    seat.page.on("dialog", lambda dialog: dialog.accept())  # "leave the page?"
    seat.page.reload()
    seat.another(token)
    assert [vote.choice for vote in votes(study, token)] == ["tie_bad"]


# --- one vote, about what was on the screen ---


def test_double_clicks_and_contradicting_keys_are_one_vote(sit: Sit, server: Server, study: Study) -> None:
    """A second press within 100 ms is no answer to the pair that has just come up, and no second one to the old."""
    seat = sit(server, RATERS[7])
    expected = []
    for choice, hasty in (
        ("right", lambda: seat.page.dblclick("[data-choice=right]")),
        ("left", lambda: seat.page.dblclick("[data-choice=left]", delay=20)),
        ("left", lambda: (seat.page.keyboard.press("ArrowLeft"), seat.page.keyboard.press("ArrowRight"))),
        *(("right", lambda ms=ms: seat.probe("hasty", ["2", "1", ms, "the first key"])) for ms in (10, 40, 60, 80, 95)),
        *(("left", lambda ms=ms: seat.probe("hasty", ["1", "2", ms, "the next pair"])) for ms in (10, 40, 60, 80, 95)),
    ):
        token = seat.token()
        took = hasty()
        seat.another(token)
        seat.page.wait_for_timeout(200)
        seat.page.wait_for_selector("#pane[data-state=ready]")
        if not isinstance(took, float | int) or took <= 100:  # else the machine was too busy to be hasty
            expected.append((token, choice))
    assert len(expected) > 3
    answered = {token for token, _ in expected}
    assert seat.token() not in answered
    assert [(vote.token, vote.choice) for vote in votes(study, *answered, seat.token())] == expected


def test_two_tabs_show_one_pair_and_give_one_vote(sit: Sit, server: Server, study: Study) -> None:
    seat = sit(server, RATERS[8])
    token = seat.token()
    other = seat.tab()
    seat.open(other)
    assert seat.token(other) == token
    seat.page.bring_to_front()
    seat.act("1")
    following = seat.token()
    # The other tab still shows the old pair, unless the browser has told it that it came to the front.
    other.keyboard.press("2")
    other.wait_for_selector(f"#pane[data-state=ready][data-token='{following}']")
    assert [vote.choice for vote in votes(study, token)] == ["left"]
    assert votes(study, following) == []


def test_the_least_time_of_looking_holds(tmp_path: Path, sit: Sit) -> None:
    """Keys within the time do nothing; what comes after it is a vote of at least that time."""
    rules = Protocol.parse(
        "name: slow\nversion: 1\nmin_view_seconds: 1\ncriteria_required: true\n"
        "criteria: [{name: a b, question: Which one}]\n"
    )
    study = made(tmp_path / "study", mixed_pairs(2), rules, title="Slow")
    with serving(study.folder) as server:
        seat = sit(server, None)
        seat.page.click("[data-criterion] label:nth-child(1)")
        first = seat.token()
        seat.page.keyboard.press("1")
        seat.page.wait_for_selector(f"#pane[data-state=waiting]:not([data-token='{first}'])")
        second = seat.token()
        for key in ("1", "2", "3", "4", "0"):
            seat.page.keyboard.press(key)
        assert "You can answer in 1 s" in seat.page.inner_text(".hold"), "said at the buttons"
        above, buttons = (seat.page.locator(one).bounding_box() for one in (".hold", ".votes"))
        assert 0 <= buttons["y"] - (above["y"] + above["height"]) < 20
        assert seat.page.get_attribute("[data-choice=left]", "aria-disabled") == "true"
        assert votes(study, second) == []
        seat.page.wait_for_selector("#pane[data-state=ready]")
        seat.page.keyboard.press("1")
        assert "a b" in seat.said(), "a question that must be answered is named"
        assert votes(study, second) == []
        assert seat.page.get_attribute("#pane", "data-digits") == "questions", "its keys answer it"
        seat.page.click("[data-criterion] label:nth-child(3)")
        seat.digits("pair")  # a pointer does not leave the keys there
        assert seat.said() == ""
        seat.page.keyboard.press("1")
        seat.page.wait_for_selector("#pane[data-state=over]")
        assert "All done" in seat.page.inner_text(".over")
        assert "2 pairs" in seat.page.inner_text(".over")
        kept = votes(study)
        assert [(vote.token, vote.criteria) for vote in kept] == [(first, {"a b": "left"}), (second, {"a b": "right"})]
        assert all(vote.seconds >= 0.95 for vote in kept)
        seat.page.keyboard.press("u")
        seat.page.wait_for_selector(f"#pane[data-state=ready][data-token='{second}']")
        assert seat.page.is_checked("[data-criterion] label:nth-child(3) input"), "the questions are there again"
        assert [vote.token for vote in votes(study)] == [first]


def test_keys_are_not_commands_while_typing_in_dialogs_or_with_modifiers(
    sit: Sit, server: Server, study: Study
) -> None:
    seat = sit(server, RATERS[9])
    token = seat.token()
    seat.page.keyboard.press("c")
    seat.page.keyboard.type("1 2 3 4 0 u s f ? i")
    seat.page.keyboard.press("ArrowLeft")
    assert seat.page.input_value("#comment") == "1 2 3 4 0 u s f ? i"
    seat.page.keyboard.press("Escape")
    for key in ("Control+1", "Alt+2", "Meta+1", "Control+ArrowLeft"):
        seat.page.keyboard.press(key)
    seat.page.keyboard.press("?")
    seat.page.wait_for_selector("dialog[open]")
    seat.page.keyboard.press("1")
    seat.page.keyboard.press("Escape")
    seat.script("() => document.dispatchEvent(new KeyboardEvent('keydown', {key: '1', code: 'Digit1', repeat: true}))")
    seat.page.wait_for_timeout(200)
    assert seat.token() == token
    assert votes(study, token) == []
    seat.act("1")
    assert len(votes(study, token)) == 1, "the same key is a command once nothing is in the way"


def test_a_session_that_ends_keeps_the_answer(sit: Sit, server: Server, study: Study) -> None:
    seat = sit(server, RATERS[10])
    token = seat.token()
    seat.context.clear_cookies()
    seat.page.keyboard.press("3")
    seat.page.wait_for_selector("dialog.login[open]")
    seat.page.keyboard.press("Escape")
    assert seat.page.is_visible("dialog.login"), "the answer waits for the login"
    assert votes(study, token) == []
    seat.log_in(RATERS[10])
    seat.page.click("dialog.login button")
    seat.another(token)
    assert [vote.choice for vote in votes(study, token)] == ["tie_good"]


def test_a_removed_account_is_told_what_to_do_and_loses_nothing(sit: Sit, server: Server, study: Study) -> None:
    seat = sit(server, RATERS[10])
    token = seat.token()
    seat.page.fill("#comment", "hard to tell")
    seat.page.keyboard.press("Escape")
    write_users(study.folder / "users.json", {name: role for name, role in ACCOUNTS.items() if name != RATERS[10]})
    seat.page.keyboard.press("2")
    seat.page.wait_for_selector("dialog.login[open]")
    said = seat.page.inner_text("dialog.login")
    for part in ("changed or removed", "not saved yet", "kept in this tab", "ask whoever runs the study"):
        assert part in said
    seat.page.click("dialog.login button")
    seat.page.wait_for_selector("dialog.login [role=alert]:text('still logged out')")
    assert votes(study, token) == []
    write_users(study.folder / "users.json", ACCOUNTS)
    seat.log_in(RATERS[10])
    seat.page.click("dialog.login button")
    seat.another(token)
    assert [(vote.choice, vote.comment) for vote in votes(study, token)] == [("right", "hard to tell")]


def test_an_answer_is_never_sent_as_somebody_else(sit: Sit, server: Server, study: Study) -> None:
    """Another rater logs in at the same window while an answer waits: it is dropped, not attributed to them."""
    seat = sit(server, RATERS[11])
    token = seat.token()
    seat.context.clear_cookies()
    seat.page.keyboard.press("1")
    seat.page.wait_for_selector("dialog.login[open]")
    seat.log_in(RATERS[12])
    seat.page.on("dialog", lambda dialog: dialog.accept())
    seat.page.click("dialog.login button")
    seat.another(token)
    assert votes(study, token, seat.token()) == []
    assert seat.page.inner_text(".account bdi") == RATERS[12]


# --- what is seen, marked and asked ---


def test_window_level_and_inversion_change_what_is_shown(sit: Sit, server: Server) -> None:
    """A grey v is shown as (v - (level - window / 2)) / window * 255, as in any viewer; at first as itself.

    A drag of 127 to the left sets the window from 255 to 128: the lowest grey is then 127.5 - 64 = 63.5.
    """
    seat = sit(server, RATERS[13])
    to_greys(seat)
    plain = [pixel[0] for pixel in seat.probe("colours", [0.5, 0.5])]
    assert abs(plain[0] - plain[1]) == 1
    assert 60 <= min(plain) <= 160
    box = seat.page.locator(".picture.left").bounding_box()
    start = (box["x"] + box["width"] / 2 + 100, box["y"] + box["height"] / 2)
    seat.page.keyboard.down("Shift")
    seat.page.mouse.move(*start)
    seat.page.mouse.down()
    seat.page.mouse.move(start[0] - 7, start[1])
    seat.page.mouse.move(start[0] - 127, start[1])
    seat.page.mouse.up()
    seat.page.keyboard.up("Shift")
    expected = [min(255, max(0, (value - 63.5) / 128 * 255)) for value in plain]
    shown = [pixel[0] for pixel in seat.probe("colours", [0.5, 0.5])]
    assert shown == pytest.approx(expected, abs=1)
    assert seat.page.inner_text(".altered") == "Window 128, level 128", "what is shown is not what came, and says so"
    seat.page.keyboard.press("i")
    assert "Inverted" in seat.page.inner_text(".altered")
    assert [pixel[0] for pixel in seat.probe("colours", [0.5, 0.5])] == pytest.approx(
        [255 - value for value in expected], abs=1
    )
    seat.page.keyboard.press("r")
    assert [pixel[0] for pixel in seat.probe("colours", [0.5, 0.5])] == plain
    assert seat.page.is_hidden(".altered")
    assert seat.page.locator(".mark").count() == 0, "a drag is no mark"


def test_a_double_click_shows_the_whole_picture_and_leaves_the_marks(sit: Sit, server: Server) -> None:
    """On a free place, whose first click sets a mark, and on a mark, which the first click removes."""
    seat = sit(server, RATERS[18])
    to_greys(seat)
    box = seat.page.locator(".picture.left").bounding_box()
    place = (box["x"] + box["width"] - 40, box["y"] + box["height"] / 2)
    seat.page.mouse.click(*place)
    seat.page.wait_for_selector(".mark")
    free = (place[0] - 100, place[1] + 60)
    for target in ("free place", "mark"):
        for _ in range(3):
            seat.page.keyboard.press("+")
        seat.page.wait_for_selector(".tools .scale:text('195 %')")
        mark = seat.page.locator(".mark").bounding_box()
        middle = (mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
        seat.page.wait_for_timeout(600)  # else it is a third click of the one before
        seat.page.mouse.dblclick(*(free if target == "free place" else middle))
        seat.page.wait_for_selector(".tools .scale:text('100 %')")
        assert seat.page.locator(".mark").count() == 1
    seat.page.wait_for_timeout(600)
    seat.page.mouse.click(*place)
    seat.page.wait_for_selector(".mark", state="detached")


def test_zoom_and_pan_hold_for_both_sides(sit: Sit, server: Server) -> None:
    """Two pictures alike but for a corner pixel: whatever is done on one side, both show the same, and it moves."""
    seat = sit(server, RATERS[18])
    while "alike" not in seat.page.inner_text(".prompt"):
        seat.act("0")

    def seen() -> list[list[int]]:
        left, right = seat.probe("grid", 40)
        assert left == right
        shown: list[list[int]] = left
        return shown

    seat.page.keyboard.press("x")  # single pixels, so that equal places have equal values
    box = seat.page.locator(".picture.right").bounding_box()
    start = (box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.6)
    seat.page.mouse.move(*start)
    for _ in range(3):
        seat.page.mouse.wheel(0, -200)
    # A wheel event of 200 is a factor of e^0.4, so three are one of 3.32.
    seat.page.wait_for_selector(".tools .scale:text('332 %')")
    zoomed = seen()
    assert len({tuple(colour) for colour in zoomed}) > 20, "many pixels are seen"
    seat.page.mouse.down()
    seat.page.mouse.move(start[0] + 90, start[1] + 70, steps=4)
    seat.page.mouse.up()
    assert seen() != zoomed
    seat.page.keyboard.press("z")
    assert seat.page.inner_text(".tools .scale") == "100 %"


def test_marks_and_questions_arrive_as_they_were_given(sit: Sit, server: Server, study: Study) -> None:
    """A click at a quarter and three quarters of the picture; five steps of 0.02 to the right of the middle by keys."""
    seat = sit(server, RATERS[14])
    to_greys(seat)
    box = seat.page.locator(".picture.left").bounding_box()
    side = min(box["width"], box["height"])  # a square, at the inner edge of its half
    left, top = box["x"] + box["width"] - side, box["y"] + (box["height"] - side) / 2
    seat.page.mouse.click(left + 0.25 * side, top + 0.75 * side)
    seat.page.mouse.click(left + 0.5 * side, top + 0.25 * side)
    seat.page.keyboard.press("p")
    seat.page.focus(".picture.right")
    for _ in range(5):
        seat.page.keyboard.press("ArrowRight")
    seat.page.keyboard.press("Enter")
    seat.page.keyboard.press("Escape")
    assert seat.page.locator(".mark").count() == 3
    seat.page.click(".picture.left .mark >> nth=1")
    seat.page.click("[data-criterion=anatomy] label:nth-child(2)")
    seat.page.focus("[data-criterion=realism] .cell.left input")
    seat.page.keyboard.press("Space")
    seat.page.keyboard.press("ArrowDown")
    seat.page.keyboard.press("ArrowDown")
    seat.page.keyboard.press("Escape")
    seat.digits("pair")
    seat.page.keyboard.press("1")
    assert "realism" in seat.said(), "one side of a scale is half an answer"
    seat.page.click("[data-criterion=realism] .cell.right >> nth=1")
    seat.digits("pair")
    seat.page.keyboard.press("l")
    token = seat.act("1")
    (vote,) = votes(study, token)
    assert (vote.choice, vote.strength) == ("left", 3)
    assert vote.criteria == {"anatomy": "tie", "realism": {"left": 3, "right": 2}}
    first, second = vote.points
    assert (first["side"], first["label"]) == ("left", "artefact")
    assert (first["x"], first["y"]) == pytest.approx((0.25, 0.75), abs=2 / side)
    assert second == {"side": "right", "x": pytest.approx(0.6), "y": 0.5, "label": "wrong finding"}
    assert seat.page.locator(".mark").count() == 0, "the next pair starts without marks"


def test_digits_answer_the_questions_while_the_keys_are_there(sit: Sit, server: Server, study: Study) -> None:
    """Q goes into them, each digit answers one and goes on, and after the last the digits are the pair's again; one
    pressed once too often at the end is no vote. 0 is no answer, Backspace takes one back, Escape leaves."""
    seat = sit(server, RATERS[15])

    def given() -> list[str]:
        found: list[str] = seat.script(
            "() => [...document.querySelectorAll('.criterion :checked')].map((one) => one.getAttribute('aria-label'))"
        )
        return found

    token = seat.token()
    assert seat.page.is_visible("[data-choice=left] kbd")
    assert seat.page.locator(".dot").all_inner_texts() == ["1", "1", "2", "2", "3", "3"]
    seat.page.keyboard.press("q")
    seat.digits("questions")
    assert "Digits answer here" in seat.page.inner_text(".mode")
    assert not seat.page.is_visible("[data-choice=left] kbd"), "the keys stand where they count"
    keys = "[data-criterion=anatomy] .segment kbd"
    assert [one for one in seat.page.locator(keys).all_inner_texts() if seat.page.is_visible(keys)] == ["1", "3", "2"]
    for key in ("2", "3", "9", "1", "1"):  # anatomy; realism of the left, nothing, and of the right; once too often
        seat.page.keyboard.press(key)
    seat.digits("pair")
    real = "How real is each? "
    first = ["Which anatomy is better? Right", real + "Left: 3, fully", real + "Right: 1, not at all"]
    assert sorted(given()) == sorted(first)
    for key in ("q", "0", "Enter", "Backspace", "Escape"):
        seat.page.keyboard.press(key)
    seat.digits("pair")
    assert given() == [real + "Left: 3, fully"]
    seat.page.keyboard.press("q")
    seat.page.keyboard.press("3")  # anatomy, which has no answer now
    seat.page.keyboard.press("Escape")
    seat.digits("pair")
    seat.page.click("[data-criterion=realism] .cell.right >> nth=1")
    assert seat.page.get_attribute("#pane", "data-digits") == "pair", "a pointer leaves the keys with the pair"
    assert votes(study, token) == []
    assert seat.act("2") == token
    (vote,) = votes(study, token)
    assert (vote.choice, vote.criteria) == ("right", {"anatomy": "tie", "realism": {"left": 3, "right": 2}})


def test_escape_out_of_the_questions_gives_the_digits_back_at_once(sit: Sit, server: Server, study: Study) -> None:
    """Within a question and after the last one. A digit too many after the last is not taken, and the page says so."""
    seat = sit(server, RATERS[15])
    given = {"anatomy": "left", "realism": {"left": 3, "right": 2}}
    for keys in (["q", "1", "3", "2", "2", "Escape", "l", "2"], ["q", "1", "3", "2", "q", "Escape", "l", "2"]):
        token = seat.token()
        longest = seat.probe("typed", [keys, 60])
        if longest < 200:  # else the machine was too busy to be hasty, and a second 2 is a vote
            seat.another(token)
            (vote,) = votes(study, token)
            assert (vote.choice, vote.strength, vote.criteria) == ("right", 3, given)
        else:
            seat.another(token)
    token = seat.token()
    longest = seat.probe("typed", [["q", "1", "3", "2", "2"], 30])
    if longest < 200:
        assert seat.page.inner_text(".hold") == "Not taken: it came right after the last question. Press it again"
        assert (seat.token(), votes(study, token)) == (token, [])
        seat.digits("pair")
        seat.page.wait_for_selector(".hold", state="hidden")
        seat.act("2")
    seat.another(token)
    assert [vote.choice for vote in votes(study, token)] == ["right"]


def test_a_scale_counts_when_both_sides_are_rated(tmp_path: Path, sit: Sit) -> None:
    """The counter, and the word beside a question that must be answered."""
    rules = Protocol.parse(PROTOCOL + "criteria_required: true\n")
    with serving(made(tmp_path / "study", mixed_pairs(1), rules).folder) as server:
        seat = sit(server, None)
        seat.page.click("[data-criterion=anatomy] label:nth-child(1)")
        seat.page.keyboard.press("1")
        seat.page.wait_for_selector("[data-criterion=realism][data-missing]")
        seat.page.click("[data-criterion=realism] .cell.left >> nth=1")
        assert seat.page.inner_text(".answered") == "1/2"
        assert seat.page.is_visible("[data-criterion=realism][data-missing]")
        seat.page.click("[data-criterion=realism] .cell.right >> nth=1")
        assert seat.page.inner_text(".answered") == "2/2"
        assert not seat.page.is_visible("[data-criterion=realism][data-missing]")


def test_undo_is_off_while_there_is_nothing_to_take_back(tmp_path: Path, sit: Sit) -> None:
    """At first; not after an answer or a flag; again when that was taken back. Sentences begin with a capital."""
    with serving(made(tmp_path / "study", mixed_pairs(3)).folder) as server:
        seat = sit(server, None)

        def off() -> bool:
            return bool(seat.page.get_attribute("[data-action=undo]", "aria-disabled") == "true")

        assert off()
        seat.page.keyboard.press("u")
        assert seat.said() == "There is nothing to take back"
        seat.act("1")
        assert not off()
        seat.act("u")
        assert off()
        for key in ("f", "1"):
            seat.page.keyboard.press(key)
        seat.act("Enter")
        assert not off()
        seat.page.route("**/api/skip*", lambda route: route.fulfill(status=409, json={"error": "no, says the server"}))
        seat.page.keyboard.press("s")
        seat.page.wait_for_selector(".said:text-is('No, says the server')")


def test_marks_show_their_kind(sit: Sit, server: Server) -> None:
    """A ring in the colour that the legend over the pair gives to the kind, and its name while it is looked at."""
    seat = sit(server, RATERS[18])
    to_greys(seat)
    box = seat.page.locator(".picture.left").bounding_box()
    seat.page.mouse.click(box["x"] + box["width"] - 40, box["y"] + box["height"] / 2)
    seat.page.keyboard.press("p")
    assert seat.page.inner_text(".legend [data-now]") == "wrong finding"
    seat.page.mouse.click(box["x"] + box["width"] - 140, box["y"] + box["height"] / 2)
    ring = "(one) => getComputedStyle(one).borderColor"
    dot = "(one) => getComputedStyle(one, '::before').borderColor"
    rings = [seat.page.locator(".mark .number").nth(i).evaluate(ring) for i in range(2)]
    assert rings == [seat.page.locator(".legend li").nth(i).evaluate(dot) for i in range(2)]
    assert rings[0] != rings[1]
    assert seat.page.locator(".legend li").all_inner_texts() == ["artefact", "wrong finding"]
    seat.page.hover(".mark >> nth=0")
    assert [seat.page.locator(".mark .name").nth(i).is_visible() for i in range(2)] == [True, False]


def test_the_list_of_keys_has_every_key(sit: Sit, server: Server) -> None:
    """What a key does stands in the list that ? opens, as does the mouse."""
    seat = sit(server, RATERS[15])
    seat.page.keyboard.press("?")
    listed = seat.page.locator("dialog kbd").all_inner_texts()
    source = (STATIC / "keys.js").read_text(encoding="utf-8")
    (table,) = re.findall(r"const BY_KEY = \{(.*?)\};", source, re.DOTALL)
    letters = re.findall(r"\b([a-z]): ", table)
    assert len(letters) > 12
    assert {letter.upper() for letter in letters} | set("01234?") <= set(listed)
    said = seat.page.inner_text("dialog")
    for gesture in ("Wheel", "Drag", "Shift + drag", "Double click", "right button", "Mark a place"):
        assert gesture in said


def test_a_strength_goes_with_a_side_alone(sit: Sit, server: Server, study: Study) -> None:
    seat = sit(server, RATERS[15])
    seat.page.keyboard.press("j")
    tie = seat.act("3")
    plain = seat.act("1")
    seat.page.keyboard.press("j")
    slight = seat.act("2")
    assert [vote.strength for vote in votes(study, tie, plain, slight)] == [None, None, 1]


def test_a_strength_is_set_again_by_its_key_and_taken_back_by_its_button(
    sit: Sit, server: Server, study: Study
) -> None:
    """Who gives an answer again, after an undo or because a question was missing, presses the same keys again."""
    seat = sit(server, RATERS[15])
    seat.page.keyboard.press("k")
    seat.act("1")
    seat.act("u")
    seat.page.keyboard.press("k")
    again = seat.act("1")
    for _ in range(2):
        seat.page.click(".strength button:nth-child(2)")
    without = seat.act("1")
    assert [vote.strength for vote in votes(study, again, without)] == [2, None]


# --- room, names and contrast ---


@pytest.mark.parametrize(
    ("width", "height", "least"),
    [(1093, 614, 360), (1024, 640, 340), (1366, 768, 480), (820, 1180, 380), (1920, 1080, 700), (768, 1024, 350)],
)
def test_everything_fits_without_scrolling(width: int, height: int, least: int, sit: Sit, server: Server) -> None:
    """1093 x 614 is a laptop of 1366 x 768 at 125 %. ``least`` is the edge of a square picture, in CSS pixels."""
    seat = sit(server, RATERS[16], viewport={"width": width, "height": height})
    to_greys(seat)
    found = seat.probe("room")
    assert (found["outside"], found["cut"], found["scrolls"]) == ([], [], False)
    assert found["pictures"][0] == found["pictures"][1], "both sides have the same size"
    assert min(found["pictures"][0]) >= least


@pytest.mark.parametrize(("width", "height", "least"), [(390, 844, 180), (360, 740, 150), (844, 390, 190)])
def test_a_phone_shows_the_pair_while_its_questions_are_answered(
    width: int, height: int, least: int, sit: Sit, server: Server
) -> None:
    """Side by side, as the answers say, and in reach of the finger while the page scrolls through the questions."""
    seat = sit(server, RATERS[16], viewport={"width": width, "height": height}, has_touch=True, is_mobile=True)
    to_greys(seat)
    seat.page.wait_for_selector("#pane .panel-opener")
    if width <= 640:
        left, right = (seat.page.locator(f".picture.{side}").bounding_box() for side in ("left", "right"))
        assert left["y"] == right["y"]
        assert min(left["width"], left["height"]) >= least
        seat.page.click(".panel-opener")
    tools, stage = (seat.page.locator(one).bounding_box() for one in (".tools", ".stage"))
    assert tools["y"] + tools["height"] <= stage["y"] + 1, "the pair covers no tool"
    assert seat.script("() => document.querySelector('#pane').scrollWidth") == width
    seat.script("() => document.querySelector('#comment').scrollIntoView({block: 'end'})")
    stage, comment = (seat.page.locator(one).bounding_box() for one in (".stage", "#comment"))
    assert stage["y"] >= 0
    assert min(stage["height"], stage["width"] / 2) >= least
    assert stage["y"] + stage["height"] <= comment["y"] < comment["y"] + comment["height"] <= height
    assert seat.probe("small") == []


def test_pictures_above_each_other_stand_in_the_middle(sit: Sit, server: Server) -> None:
    """A narrow, high window: the pictures are less wide than their boxes, and leave as much on either side."""
    seat = sit(server, RATERS[16], viewport={"width": 430, "height": 1300})
    to_greys(seat)
    boxes = [seat.page.locator(f".picture.{side}").bounding_box() for side in ("left", "right")]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    assert boxes[0]["width"] > boxes[0]["height"] + 12
    for place in (0.01, 0.99):
        assert [colour[3] for colour in seat.probe("colours", [place, 0.5])] == [0, 0]
    assert [colour[3] for colour in seat.probe("colours", [0.5, 0.5])] == [255, 255]


def test_a_small_window_says_that_the_questions_go_on_below(tmp_path: Path, sit: Sit) -> None:
    """With the questions of ``general`` the panel is longer than the window: it fades out, until its end is reached."""
    rules = Protocol.load("general")
    with serving(made(tmp_path / "study", mixed_pairs(1), rules).folder) as server:
        seat = sit(server, None, viewport={"width": 1024, "height": 640})
        seat.page.wait_for_selector(".side[data-more]")
        found = seat.probe("room")
        assert (found["outside"], found["cut"], found["scrolls"]) == ([], [], False)
        assert seat.page.is_visible(".strength .hint")
        rows = [seat.page.locator(one).bounding_box() for one in (".strength", ".actions")]
        assert rows[1]["y"] < rows[0]["y"] + rows[0]["height"], "side by side"
        for vote in seat.page.locator(".vote").all():
            words = vote.locator(".words").bounding_box()
            assert words["width"] + 20 <= vote.bounding_box()["width"]
        seat.page.focus("#comment")
        seat.script("() => document.querySelector('.side').scrollTo(0, 10000)")
        seat.page.wait_for_selector(".side:not([data-more])")


def test_no_keys_are_printed_for_fingers(sit: Sit, server: Server) -> None:
    seat = sit(server, RATERS[16], viewport={"width": 820, "height": 1180}, has_touch=True, is_mobile=True)
    to_greys(seat)
    assert seat.page.locator("#pane kbd").count() > 15
    assert [one.inner_text() for one in seat.page.locator("#pane kbd").all() if one.is_visible()] == []
    seat.page.click("[data-action=flag]")
    assert not seat.page.is_visible("dialog .reason kbd")


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_auto_is_what_the_browser_prefers_whatever_the_pair(scheme: str, sit: Sit, server: Server) -> None:
    """For texts, pictures and the login; pictures stand in a dark surround. What is chosen holds for the login, too."""
    seat = sit(server, RATERS[17], color_scheme=scheme)
    seen: set[str] = set()
    while seen != {"image", "text"}:
        assert seat.page.get_attribute("#pane", "data-theme") == scheme
        seen.add(seat.page.get_attribute("#pane", "data-kind"))
        if seat.page.query_selector(".picture"):
            room = seat.script("() => getComputedStyle(document.querySelector('.picture')).backgroundColor")
            assert max(int(part) for part in re.findall(r"\d+", room)) < 50
        seat.act("0")
    other = {"dark": "light", "light": "dark"}[scheme]
    while seat.page.get_attribute(".theme", "aria-label") != f"Appearance: {other.title()}. Press to change.":
        seat.page.click(".theme")
    seat.context.clear_cookies()
    seat.page.goto(f"{server.url}/login")
    seat.page.wait_for_selector(f":root[data-theme={other}]")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    chosen = seat.script(ground)
    seat.script("() => localStorage.clear()")
    seat.page.reload()
    assert (sum(map(int, re.findall(r"\d+", chosen))) > 600) == (other == "light")
    assert (sum(map(int, re.findall(r"\d+", seat.script(ground)))) > 600) == (scheme == "light")


def test_the_login_lets_in_who_is_logged_in_and_asks_nothing_that_is_refused(browser: Any, server: Server) -> None:
    """Who comes from elsewhere brings no cookie with the first request, but has one. No error in the console."""
    seat = Seat(browser, server, None)
    said: list[str] = []
    statuses: list[tuple[str, int]] = []
    seat.page.on("console", lambda message: said.append(message.text))
    seat.page.on("response", lambda answer: statuses.append((urlsplit(answer.url).path, answer.status)))
    with seat.page.expect_event("requestfinished", lambda request: request.resource_type == "fetch"):
        seat.page.goto(f"{server.url}/login")
    assert (said, [status for _, status in statuses if status != 200]) == ([], [])
    assert [path for path, _ in statuses].count("/login") == 2, "it asks again, from here"
    seat.log_in(RATERS[16])
    first: list[int] = []

    def bare(route: Any) -> None:
        headers = dict(route.request.headers)
        if route.request.is_navigation_request() and not first:
            answer = route.fetch(headers={**headers, "cookie": "diffalign=none"}, max_redirects=0)
            first.append(answer.status)
            route.fulfill(response=answer)
        else:
            route.continue_()

    seat.page.route("**/login", bare)
    seat.page.goto(f"{server.url}/login")
    seat.page.wait_for_url("**/rate*/**", wait_until="commit")
    assert first == [200], "the form came first"
    seat.close()


def test_touch_targets_are_large_on_a_tablet(sit: Sit, server: Server) -> None:
    seat = sit(server, RATERS[16], viewport={"width": 820, "height": 1180}, has_touch=True, is_mobile=True)
    to_greys(seat)
    assert seat.probe("small") == []


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_controls_have_names_and_texts_contrast(scheme: str, sit: Sit, server: Server) -> None:
    """WCAG 2.2: every control has a name, and every text a contrast of 4.5 at least, in both appearances."""
    seat = sit(server, RATERS[17])
    to_greys(seat)
    while seat.page.get_attribute("#pane", "data-theme") != scheme:
        seat.page.click(".theme")
    seat.page.click(".who")
    for opened in (None, "?", "g"):
        if opened:
            seat.page.keyboard.press(opened)
            seat.page.wait_for_selector("dialog[open]")
        names = seat.probe("names")
        assert names["nameless"] == []
        assert names["count"] > 30
        contrasts = seat.probe("contrasts")
        assert len(contrasts) > 30
        assert [text for text in contrasts if text[1] < 4.5] == []
        if opened:
            seat.page.keyboard.press("Escape")
    seat.page.reload()
    seat.page.wait_for_selector("#pane[data-state=ready]")
    assert seat.page.get_attribute("#pane", "data-theme") == scheme, "the choice is remembered"


def test_the_tab_key_comes_through_everything_and_out_again(sit: Sit, server: Server) -> None:
    seat = sit(server, RATERS[17])
    to_greys(seat)
    order = []
    for _ in range(60):
        seat.page.keyboard.press("Tab")
        order.append(seat.probe("focus"))
    first = order.index(order[0], 1)
    assert len(set(order[:first])) == first, "each once a round"
    for name in (
        "Left better, key 1",
        "Cannot judge, key 0",
        "Undo, key U",
        "comment",
        "Window",
        "Which anatomy is better? Left",
    ):
        assert name in order[:first], order[:first]
    assert order.index("Left better, key 1") < order.index("Undo, key U")


def test_a_dialog_gives_the_focus_back(sit: Sit, server: Server) -> None:
    seat = sit(server, RATERS[17])
    seat.page.focus("[data-action=help]")
    seat.page.keyboard.press("Enter")
    seat.page.wait_for_selector("dialog[open]")
    seat.page.keyboard.press("Escape")
    seat.page.wait_for_selector("dialog", state="detached")
    assert seat.script("() => document.activeElement.dataset.action") == "help"


def test_fingers_zoom_and_mark(sit: Sit, server: Server) -> None:
    """Two fingers that part from 60 to 120 CSS pixels double the size; a tap marks."""
    seat = sit(server, RATERS[18], viewport={"width": 820, "height": 1180}, has_touch=True, is_mobile=True)
    to_greys(seat)
    box = seat.page.locator(".picture.left").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    fingers = seat.context.new_cdp_session(seat.page)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": left, "y": top, "id": number} for number, (left, top) in enumerate(places)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (x - 30, y), (x + 30, y))
    touch("touchMove", (x - 45, y), (x + 45, y))
    touch("touchMove", (x - 60, y), (x + 60, y))
    touch("touchEnd")
    seat.page.wait_for_selector(".tools .scale:text('200 %')")
    assert seat.page.locator(".mark").count() == 0
    seat.page.wait_for_timeout(500)  # a tap at once would be a part of the gesture, of which the browser makes no click
    seat.page.touchscreen.tap(x, y)
    seat.page.wait_for_selector(".mark")
    seat.page.wait_for_timeout(100)
    assert seat.page.locator(".mark").count() == 1, "the click that follows a touch does not remove it again"
    seat.page.touchscreen.tap(x, y)
    seat.page.wait_for_selector(".mark", state="detached")


@contextmanager
def pictures_damaged(seat: Seat, study: Study) -> Iterator[None]:
    """What comes for the left picture is none."""
    broken = {"body": b"no picture", "content_type": "image/png"}
    seat.page.route("**/api/image/*/left", lambda route: route.fulfill(**broken))
    yield
    seat.page.unroute("**/api/image/*/left")


@contextmanager
def pictures_missing(seat: Seat, study: Study) -> Iterator[None]:
    """The server has no left picture."""
    seat.page.route("**/api/image/*/left", lambda route: route.fulfill(status=404, json={}))
    yield
    seat.page.unroute("**/api/image/*/left")


@contextmanager
def texts_damaged(seat: Seat, study: Study) -> Iterator[None]:
    """The files of the texts are not what they were; afterwards they are again."""
    files = [path for path in (study.folder / "files").rglob("*") if path.is_file()]
    texts = {path: data for path in files if not (data := path.read_bytes()).startswith(b"\x89PNG")}
    assert texts
    for path in texts:
        path.write_bytes(b"something else")
    try:
        yield
    finally:
        for path, data in texts.items():
            path.write_bytes(data)


@contextmanager
def texts_missing(seat: Seat, study: Study) -> Iterator[None]:
    """The files of the texts are away for a while."""
    files, away = study.folder / "files", study.folder / "away"
    texts = [path for path in files.rglob("*") if path.is_file() and not path.read_bytes().startswith(b"\x89PNG")]
    assert texts
    away.mkdir()
    for path in texts:
        path.rename(away / path.name)
    try:
        yield
    finally:
        for path in texts:
            (away / path.name).rename(path)
        away.rmdir()


@pytest.mark.parametrize(
    ("kind", "harm", "key"),
    [
        ("image", pictures_damaged, "s"),
        ("image", pictures_missing, "s"),
        ("text", texts_damaged, "f"),
        ("text", texts_missing, "s"),
    ],
)
def test_what_cannot_be_shown_is_no_pair_to_judge(
    kind: str, harm: Callable[[Seat, Study], AbstractContextManager[None]], key: str, browser: Any, server: Server,
    study: Study,
) -> None:  # fmt: skip
    """It says so, takes no answer, and can be skipped or flagged."""
    seat = Seat(browser, server, RATERS[19])
    with harm(seat, study):
        seat.page.goto(f"{server.url}/rate/")
        seat.page.wait_for_selector("dialog[open], #pane[data-state]")
        if seat.page.query_selector("dialog[open]"):
            seat.page.keyboard.press("Enter")
        settled = ":is([data-state=ready], [data-state=broken])"
        seat.page.wait_for_selector(f"#pane{settled}")
        while seat.page.get_attribute("#pane", "data-state") == "ready":
            before = seat.token()
            seat.page.keyboard.press("0")
            seat.page.wait_for_selector(f"#pane{settled}:not([data-token='{before}'])")
        token = seat.token()
        assert seat.page.get_attribute("#pane", "data-kind") == kind
        assert seat.page.inner_text(".broken") == "This pair cannot be shown."
        seat.page.keyboard.press("1")
        seat.page.wait_for_timeout(200)
        assert votes(study, token) == []
        assert "Flag it, or skip it" in seat.said()
        seat.page.keyboard.press(key)
        if key == "f":
            seat.page.wait_for_selector("dialog[open]")
            seat.page.keyboard.press("1")
            seat.page.keyboard.press("Enter")
        seat.page.wait_for_selector(f"#pane:not([data-token='{token}'])")
        assert state(study, token) == {"s": "skipped", "f": "flagged"}[key]
    seat.close()


# --- roles ---


def test_an_adjudicator_sees_what_raters_said_and_decides(tmp_path: Path, sit: Sit) -> None:
    rules = Protocol.parse(
        "name: two\nversion: 1\nmin_view_seconds: 0\noverlap: 2\ncriteria: [{name: a, question: Which one}]\n"
    )
    study = made(tmp_path / "study", mixed_pairs(1), rules)
    with serving(study.folder, {"ann": "rater", "ben": "rater", "judge": "adjudicator", "chief": "admin"}) as server:
        for name in ("ann", "ben"):
            seat = sit(server, name)
            seat.page.fill("#comment", f"{name} <b>says</b>")
            # Opposite samples, whatever the sides: each rater prefers the darker or the brighter picture.
            dark = seat.probe("colours", [0.5, 0.5])
            left_is_dark = dark[0][0] < dark[1][0]
            seat.page.keyboard.press("Escape")
            seat.act("1" if left_is_dark == (name == "ann") else "2")
        seat = sit(server, "chief")
        assert seat.page.locator(".over a").all_inner_texts() == ["Judge the disputed pairs", "See the results"]
        assert seat.page.is_visible(".corner > a:text('Results')"), "not in the menu alone"
        seat = sit(server, "judge")
        assert "On 1 pair raters disagree" in seat.page.inner_text(".over")
        assert seat.page.is_visible(".corner > a:text('Disputed (1)')")
        assert not seat.page.is_visible("a:text('Results')")
        seat.page.click(".over a:text('Judge the disputed pairs')")
        seat.page.wait_for_selector("#pane[data-state=ready]")
        cards = seat.page.locator(".verdict")
        assert cards.count() == 2
        assert {"ann <b>says</b>", "ben <b>says</b>"} == set(seat.page.locator(".verdict .comment").all_inner_texts())
        assert set(seat.page.locator(".verdict .said").all_inner_texts()) == {"Left better", "Right better"}
        shown = seat.page.inner_text(".side")
        assert "ann" not in re.sub(r"(ann|ben) <b>says</b>", "", shown), "raters go by pseudonyms"
        token = seat.act("1")
        assert [vote.choice for vote in votes(study, token)] == ["left"]
        assert state(study, token) == "done"


def test_a_rater_who_asks_for_the_results_gets_a_page_with_a_sentence(sit: Sit, server: Server) -> None:
    """Not JSON; and a way back. The style of the page is applied."""
    seat = sit(server, RATERS[16])
    answer = seat.page.goto(f"{server.url}/results")
    assert (answer.status, answer.headers["content-type"]) == (403, "text/html; charset=utf-8")
    assert seat.page.inner_text("h1") == "This page is not open to you"
    assert "Only an admin sees the results." in seat.page.inner_text("main")
    assert seat.script("() => getComputedStyle(document.querySelector('main')).borderRadius") == "14px"
    seat.page.click("a")
    seat.page.wait_for_selector("#pane[data-state=ready]")


# --- hostile texts, and what must stay unknown ---

HOSTILE = {
    "script": "<script>window.fired = 1; alert(1)</script>",
    "handler": """<img src=x onerror="window.fired = 1; alert(2)"><svg onload='alert(3)'><b>bold</b>""",
    "braces": "{{constructor.constructor('window.fired = 1')()}} {{7*7}} ${window.fired = 1} <%= 7*7 %> #{7*7}",
    "link": """javascript:alert(4) <a href="javascript:alert(5)">x</a><iframe src="javascript:alert(6)">""",
    "right to left": "abc \u202e gnp.exe \u2066 \u05d0\u05d1\u05d2 \u0661",
    "zero": "a\x00b\x07c \ud800 d",
    "database": "'; DROP TABLE vote; -- \" OR 1=1",
    "formula": "=HYPERLINK(A1)\n+1+1\n-2\n@SUM(A1)\t=cmd|' /C calc'!A0",
    "way out": """"></textarea></title></div><style>*{display:none!important}</style>""",
    "megabyte": "a word and <i>another</i> " * 42_000,
}
NAME = """<img src=x onerror=alert(7)>{{7*7}}\u202e'; DROP TABLE rater;--"""
TITLE = """</title><script>window.fired = 1</script>${7*7}{{7*7}}"""
SECRETS = ("zebra4711", "quokka0815", "918273645", "827364519", "walrus-id", "hidden-file-17.png", "lynx-attribute")


def hostile_pairs() -> Iterator[StudyPair]:
    """A pair of texts for each hostile text, and some of images; models, files and seeds that one would recognise."""
    provenance = {side: {"file": "hidden-file-17.png"} for side in ("first", "second")}
    made_of = {"model": "lynx-attribute"}
    for number, text in enumerate(HOSTILE.values()):
        asked = Prompt(text, id=f"walrus-id-{number}", attributes=made_of)
        one, two = (
            Sample(asked, text=f"{side}: {text}", seed=seed) for side, seed in (("A", 918273645), ("B", 827364519))
        )
        yield StudyPair(asked, one, two, "zebra4711", "quokka0815", provenance=provenance)
    for number in range(4):
        asked = Prompt(f"a plain picture {number}", id=f"walrus-id-p{number}", attributes=made_of)
        pictures = [grey(90 + number), grey(190 + number)]
        for picture in pictures:
            picture.info["parameters"] = "model: zebra4711, seed: 918273645"
        one, two = (
            Sample(asked, image=picture, seed=seed)
            for picture, seed in zip(pictures, (918273645, 827364519), strict=True)
        )
        yield StudyPair(asked, one, two, "zebra4711", "quokka0815", provenance=provenance)


@pytest.fixture(scope="module")
def hostile_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose every text is an attack."""
    rules = Protocol.parse("name: hostile\nversion: 1\nmin_view_seconds: 0\noverlap: 2\n")
    return made(tmp_path_factory.mktemp("hostile") / "study", hostile_pairs(), rules, title=TITLE)


@pytest.fixture(scope="module")
def hostile_server(hostile_study: Study, browser: Any) -> Iterator[Server]:
    """Its server."""
    with serving(hostile_study.folder, {NAME: "rater", "ann": "rater"}) as running:
        yield running


def test_hostile_texts_are_shown_as_they_are_and_do_nothing(
    hostile_server: Server, hostile_study: Study, sit: Sit
) -> None:
    """Prompt, samples, comment, name of the rater and title: letter by letter on the screen and in the database."""
    seat = sit(hostile_server, NAME)
    fired = []
    seat.page.on("dialog", lambda dialog: (fired.append(dialog.message), dialog.dismiss()))

    def text(selector: str) -> str:
        """Of an element, through JSON: broken Unicode does not survive otherwise."""
        found: str = json.loads(
            seat.script("(one) => JSON.stringify(document.querySelector(one).textContent)", selector)
        )
        return found

    assert text("#pane h1") == TITLE
    assert text(".account bdi") == NAME
    expected, seen = {}, set()
    for _ in range(len(HOSTILE) + 4):
        token = seat.token()
        if seat.page.get_attribute("#pane", "data-kind") == "text":
            sheets = {text(".sheet[aria-label='Left text']"), text(".sheet[aria-label='Right text']")}
            (name,) = (name for name, content in HOSTILE.items() if sheets == {f"A: {content}", f"B: {content}"})
            seen.add(name)
            content = HOSTILE[name]
            assert text(".prompt") == (content if len(content) <= 600 else f"{content[:600]}…")
            if len(content) > 600:
                seat.page.click(".more")
                assert text("dialog .prose") == content
                seat.page.keyboard.press("Escape")
            comment = content[:20_000].replace("\ud800", "")
            seat.script(
                """(text) => {
                  const box = document.getElementById("comment");
                  box.value = text;
                  box.dispatchEvent(new Event("input"));
                }""",
                comment,
            )
            expected[token] = comment
        assert seat.script("() => document.querySelectorAll('#pane :is(img, script, iframe, style, b, i)').length") == 0
        seat.act("1")
    assert seen == set(HOSTILE)
    assert seat.page.is_visible(".over")
    assert seat.script("() => [typeof window.fired, document.title]") == ["undefined", TITLE]
    assert fired == []
    assert {vote.token: vote.comment for vote in votes(hostile_study, *expected)} == expected


def test_nothing_that_the_browser_receives_tells_where_a_sample_comes_from(
    hostile_server: Server, hostile_study: Study, browser: Any
) -> None:
    """Every byte of every response is searched for names, files, seeds and hashes, headers too; no other host is asked.

    A name may be coded with what stands around it: base64 has three forms then, by where in three bytes it begins.
    """
    text = b"abc " + SECRETS[0].encode() + b" def"
    for before in (b"", b"a", b"ab"):
        assert any(form in base64.b64encode(before + text).lower() for form in in_base64(SECRETS[0])), "it finds them"
    received: list[tuple[str, bytes]] = []
    hosts = set()

    def keep(route: Any) -> None:
        answer = route.fetch(max_redirects=0)
        headers = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
        received.append((route.request.url, headers.encode() + b"\n\n" + answer.body()))
        route.fulfill(response=answer)

    seat = Seat(browser, hostile_server, "ann")
    seat.context.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    seat.context.route("**/*", keep)
    sockets: list[str] = []
    seat.page.on("websocket", lambda socket: sockets.append(socket.url))
    seat.open()
    pictures = 0
    for key in ("1", "u", "2", "s", "3", "4", "0", "1", "1", "1", "1", "1", "1", "1", "1"):
        pictures += seat.page.get_attribute("#pane", "data-kind") == "image"
        seat.act(key)
        if seat.page.get_attribute("#pane", "data-state") == "over":
            break
    stored = seat.script(
        "() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.documentElement.outerHTML])"
    )
    received.append(("what the page keeps", stored.encode()))
    seat.close()
    assert pictures >= 3
    assert sockets == [], "the page opens no socket that would have to be searched, too"
    assert hosts == {urlsplit(hostile_server.url).netloc}
    everything = b"\n".join(body for _, body in received).lower()
    assert b"a plain picture" in everything, "the search sees what the page was told"
    for secret in SECRETS:
        for form in (secret.encode(), secret.encode("utf-16-le"), secret.encode("utf-16-be"), *in_base64(secret)):
            assert form not in everything, secret
    digests = hashes(hostile_study)
    assert len(digests) > 20
    for digest in digests:
        raw = bytes.fromhex(digest)
        for form in (digest.encode(), raw.lower(), *in_base64(raw)):
            assert form not in everything, digest
    images = [body for url, body in received if "/api/image/" in url]
    assert len(images) >= 6
    for body in images:
        head, data = body.split(b"\n\n", 1)
        assert b"no-store" in head
        assert set(chunks(data)) <= {b"IHDR", b"IDAT", b"IEND"}, "pixels and nothing else"


def in_base64(secret: str | bytes) -> Iterator[bytes]:
    """What of its base64, in small letters, does not depend on what stands before and after: one for each alignment.

    ``n`` bytes before it leave ``ceil(4 n / 3)`` characters that are theirs, too; the last ones depend on what follows.
    """
    data = secret.encode() if isinstance(secret, str) else secret
    for before in range(3):
        coded = base64.b64encode(bytes(before) + data)
        whole = (before + len(data)) * 8 // 6  # characters that hold its bits alone, counted from the start
        yield coded[-(-before * 8 // 6) : whole].lower()


def hashes(study: Study) -> set[str]:
    """The SHA-256 of every sample, by which the files of the study are named."""
    with database.reading(study.engine) as connection:
        return set(connection.execute(select(SampleRow.sha256)).scalars())


def chunks(png: bytes) -> Iterator[bytes]:
    """The kinds of the chunks of a PNG."""
    at = 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8]
        at += 12 + length


@pytest.mark.slow
def test_a_new_protocol_reaches_raters_who_are_at_work(tmp_path: Path, sit: Sit) -> None:
    """Pairs given out under the old questions are answered under them or go back; the new guideline is shown."""
    text = "name: changing\nversion: {}\nmin_view_seconds: 0\nquestion: Question {}?\n"
    study = made(tmp_path / "study", mixed_pairs(8), Protocol.parse(text.format(1, 1)))
    with serving(study.folder) as server:
        seat = sit(server, None)
        old = seat.act("1")
        study.revise(Protocol.parse(text.format(2, 2)))
        while not seat.page.query_selector("dialog[open]"):
            seat.page.keyboard.press("1")
            seat.page.wait_for_timeout(150)
        assert "Question 2?" in seat.page.inner_text("dialog")
        seat.page.keyboard.press("Enter")
        seat.page.wait_for_selector("#pane[data-state=ready]")
        assert seat.page.inner_text(".asked") == "Question 2?"
        while seat.page.get_attribute("#pane", "data-state") != "over":
            seat.act("2")
        assert len(votes(study)) == 8, "every pair is answered in the end"
        assert votes(study)[0].token == old
