"""The commands of ``diffalign label``: a real server, simulated raters over HTTP, and what is said afterwards."""

from __future__ import annotations

import json
import math
import re
import shlex
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from apps.cli import main
from apps.label import accounts as accounts_module
from apps.label import care, demo, report, simulate
from apps.label.accounts import Accounts
from benchmarks import closed_loop
from diffalign.preferences.agreement import Estimate
from diffalign.study import Answer, Study, StudyPair
from diffalign.types import Sample
from diffalign.worlds import emoji
from tests.label_server import LEAN, ROOT, made, quick_protocol, serving, text_pairs
from tests.test_study_processes import postgresql  # noqa: F401

PAIRS = 16


def label(*words: object, status: int = 0, given: str | None = None) -> str:
    done = CliRunner().invoke(main, ["label", *map(str, words)], input=given)
    assert done.exit_code == status, done.output
    return done.output


def scenes(count: int) -> Iterator[StudyPair]:
    """What was asked for, drawn by the world itself, beside the scene of another prompt."""
    asked = emoji.prompts("train", count + 1)
    for number, prompt in enumerate(asked[:count]):
        right, wrong = (emoji.render(asked[i].attributes, seed=number).image for i in (number, number + 1))
        yield StudyPair(prompt, Sample(prompt, image=right), Sample(prompt, image=wrong), "right", "wrong")


def voted(folder: Path, pairs: Iterator[StudyPair], raters: int = 2, title: str = "", **rules: object) -> Study:
    study = made(folder, pairs, quick_protocol(**rules), title=title)
    for number in range(raters):
        study.add_rater(f"rater {number}")
        while (now := study.claim(f"rater {number}")) is not None:
            left = study.content(f"rater {number}", now.token, "left").startswith(b"one")
            study.vote(f"rater {number}", now.token, Answer("left" if left else "right"))
    return study


# --- simulated raters ---


def test_simulated_raters_vote_over_http_and_know_what_is_right(tmp_path: Path) -> None:
    """Of scenes that are drawn as asked beside others, raters that want what was asked for choose the former."""
    folder = tmp_path / "s"
    rules = quick_protocol(overlap=2, criteria="[{name: as asked, question: Which}]", criteria_required="true")
    made(folder, scenes(PAIRS), rules).close()
    with serving(folder, {"boss": "admin"}) as server:
        output = label("simulate", folder, "--url", server.url, "--rater", "emoji", "--raters", 3)
        assert server.client("boss").get("/api/study").status_code == 200
    assert f"{2 * PAIRS} votes by 3 simulated raters" in output
    assert "do not know 'as asked'" in output
    assert [account.name for account in Accounts.load(folder / "users.json").list()] == ["boss"]
    study = Study.open(folder)
    found = list(study.export())
    study.close()
    overall = [p.label for p in found if p.criterion == "overall"]
    assert len(overall) == 2 * PAIRS and sum(overall) / len(overall) > 0.85
    assert {p.criterion for p in found} == {"overall", "as asked"}
    assert {p.provenance["comment"] for p in found} == {"simulated by emoji.yaml"}
    assert {p.provenance["simulated"] for p in found} == {True}
    everybody = f"{2 * PAIRS} of {2 * PAIRS} votes are simulated"
    out = tmp_path / "made" / "by" / "export.parquet"
    assert everybody in label("export", folder, "--out", out) and everybody in label("stats", folder)
    assert json.loads(pq.read_metadata(out).metadata[b"diffalign"]) == {"rows": 4 * PAIRS, "simulated": 4 * PAIRS}
    inspected = CliRunner().invoke(main, ["preferences", "inspect", str(out), "--json"])
    data = json.loads(inspected.output)
    assert (data["pairs"], data["judgements"], data["simulated"]) == (PAIRS, 4 * PAIRS, 4 * PAIRS)
    assert len({p.rater for p in found}) == 3 and {p.provenance["left"] for p in found} == {"first", "second"}


def test_simulated_raters_answer_scales_and_leave_what_they_do_not_know(tmp_path: Path) -> None:
    """Raters of another world cannot judge the two pairs that they may have; the others judge all scenes, not texts."""
    folder = tmp_path / "s"
    scale = "[{name: quality, question: How, kind: scale, anchors: [a, b, c, d]}]"
    rules = quick_protocol(criteria=scale, criteria_required="true")
    made(folder, chain(scenes(8), text_pairs(2)), rules).close()
    with serving(folder) as server:
        command = ["simulate", folder, "--url", server.url]
        other = label(*command, "--rater", "brain-mr", "--raters", 1, "--votes", 2, status=2)
        assert "2 cannot judge" in other and "of a world that these raters know" in other
        output = label(*command, "--rater", "brain-mr", "--rater", "emoji", "--raters", 1)
        assert "8 votes by 1 simulated raters" in output
        assert "--raters 1" in label(*command, "--rater", "emoji", "--raters", 3, status=2)
    study = Study.open(folder)
    rows, left_out = list(study.scores()), study.export().left_out
    study.close()
    by_arm = {arm: [int(str(row["score"])) for row in rows if row["arm"] == arm] for arm in ("right", "wrong")}
    judged = len(by_arm["right"])
    assert judged == len(by_arm["wrong"]) >= 6 and left_out["cannot judge"] == 10 - judged
    assert sum(by_arm["right"]) > sum(by_arm["wrong"])
    assert {score for scores in by_arm.values() for score in scores} <= {1, 2, 3, 4}


def test_simulate_says_that_no_server_answers(tmp_path: Path) -> None:
    made(tmp_path / "s", text_pairs(1)).close()
    output = label("simulate", tmp_path / "s", "--url", "http://127.0.0.1:9", "--rater", "emoji", status=2)
    assert "no server answers" in output and not (tmp_path / "s" / "users.json").exists()


def test_simulate_refuses_an_account_that_is_there_and_a_study_that_is_not_served(tmp_path: Path) -> None:
    for name in ("s", "other"):
        made(tmp_path / name, scenes(2), title=name).close()
    people = {"simulated 1": "rater", "boss": "admin"}
    with serving(tmp_path / "s", people, code=LEAN) as server:
        command = ["--url", server.url, "--rater", "emoji", "--raters", 1]
        assert "is an account 'simulated 1' already" in label("simulate", tmp_path / "s", *command, status=2)
        assert {one.name for one in Accounts.load(tmp_path / "s" / "users.json").list()} == set(people)
        label("users", "remove", tmp_path / "s", "simulated 1")
        users = ["--users", tmp_path / "s" / "users.json"]
        said = label("simulate", tmp_path / "other", *command, *users, status=2)
        assert "the server serves another study than" in said
    for name in ("s", "other"):
        study = Study.open(tmp_path / name)
        assert study.stats().votes == 0
        study.close()


def test_a_utility_is_a_place_on_the_scale() -> None:
    """A quarter of the range each for four points; what lies outside counts as the end."""
    assert [simulate._point(u, 4) for u in (-1, 0, 0.24, 0.26, 0.74, 0.99, 1.0, 2)] == [1, 1, 1, 2, 3, 4, 4, 4]


# --- accounts ---


def test_accounts_are_added_listed_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    made(folder, text_pairs(1)).close()
    label("users", "add", folder, "ann", "--role", "admin", "--password-stdin", given="correct horse\n")
    label("users", "add", folder, "bob", "--password-stdin", given="battery staple\n")
    assert label("users", "list", folder).split() == ["admin", "ann", "rater", "bob"]
    assert stat.S_IMODE((folder / "users.json").stat().st_mode) == 0o600
    accounts = Accounts.load(folder / "users.json")
    found = accounts.verify("ann", "correct horse")
    assert found is not None and found.role == "admin" and accounts.verify("ann", "correct horse\n") is None
    label("users", "remove", folder, "bob")
    assert "bob" not in label("users", "list", folder)
    assert "no account" in label("users", "remove", folder, "bob", status=2)
    assert "--password-stdin" in label("users", "add", folder, "eve", status=2)
    assert "10 to" in label("users", "add", folder, "eve", "--password-stdin", given="short\n", status=2)
    assert "is no study" in label("users", "add", tmp_path, "eve", "--password-stdin", given="x" * 12, status=2)


def test_a_package_that_is_not_there_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "s", text_pairs(1)).close()
    accounts_module._hasher.cache_clear()
    monkeypatch.setitem(sys.modules, "argon2", None)
    output = label("users", "add", tmp_path / "s", "ann", "--password-stdin", given="x" * 12, status=2)
    assert output == "error: this needs the package argon2: pip install 'diffalign[label]'\n"


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    made(folder, text_pairs(1)).close()
    assert "has no accounts; add one by: diffalign label users add" in label("users", "list", folder)
    assert "note     no accounts: add one by: diffalign label users add" in label("doctor", folder)
    folder.chmod(0o755)
    assert "PROBLEM  folder" in label("doctor", folder, status=1)
    (folder / "users.json").write_text("{}")
    (folder / "users.json").chmod(0o600)
    assert "KeyError" not in label("users", "list", folder, status=2)


# --- flags ---


def test_a_flagged_pair_is_listed_and_taken_back(tmp_path: Path) -> None:
    study = made(tmp_path / "s", text_pairs(3))
    study.add_rater("ann")
    now = study.claim("ann")
    assert now is not None
    study.flag("ann", now.token, "two <b>heads</b>")
    (flag,) = study.stats().flags
    page = report.html(study)
    study.close()
    assert "two &lt;b&gt;heads&lt;/b&gt;" in page and "Flagged pairs" in page
    assert "two <b>heads</b>" in label("stats", tmp_path / "s")
    assert f"{flag.pair}  {flag.rater}  two <b>heads</b>" in label("unflag", tmp_path / "s")
    assert "pair 99 is not flagged" in label("unflag", tmp_path / "s", "--pair", 99, status=2)
    assert "is in the study again" in label("unflag", tmp_path / "s", "--pair", flag.pair)
    assert "no pair is flagged" in label("unflag", tmp_path / "s")
    label("doctor", tmp_path / "s")


def test_a_new_version_keeps_the_name(tmp_path: Path) -> None:
    made(tmp_path / "s", text_pairs(1)).close()
    (tmp_path / "p.yaml").write_text("name: another\nversion: 2\n")
    said = label("revise", tmp_path / "s", "--protocol", tmp_path / "p.yaml", status=2)
    assert "is called another, and the study goes by test" in said


# --- numbers ---


def test_stats_as_table_json_and_page(tmp_path: Path) -> None:
    title = "<script>alert(1)</script> {{ title }} \0\ud800"
    voted(tmp_path / "s", text_pairs(12), title=title, overlap=2).close()
    table = label("stats", tmp_path / "s", "--html", tmp_path / "r.html")
    assert "12 of 12 have the 2 votes" in table and "24 by 2 raters" in table
    found = json.loads(label("stats", tmp_path / "s", "--json"))
    assert (found["pairs"], found["complete"], found["votes"], len(found["raters"])) == (12, 12, 24, 2)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "{{ title }}" in page
    assert "default-src 'none'" in page and 'href="http' not in page
    for name in (row["rater"] for row in found["raters"]):
        assert name in page and name in table
    assert "rater 0" not in page, "names stay in the study"
    assert "Back to the pairs" not in page, "a file has no pairs beside it"
    assert ".html" in label("stats", tmp_path / "s", "--html", tmp_path / "r.txt", status=2)
    assert "exists already" in label("stats", tmp_path / "s", "--html", tmp_path / "r.html", status=2)
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page


def test_a_fresh_study_has_a_page(tmp_path: Path) -> None:
    study = made(tmp_path / "s", text_pairs(2))
    page = report.html(study)
    study.close()
    assert "Nobody has voted yet" in page and "There is no ranking" in page and "nan" not in page


def test_the_served_page_leads_back_to_the_pairs(tmp_path: Path) -> None:
    made(tmp_path / "s", text_pairs(1)).close()
    with serving(tmp_path / "s", {"boss": "admin"}, code=LEAN) as server, closing(server.client("boss")) as client:
        page = client.get("/results").text
        (link,) = re.findall(r'<a href="([^"]*)">Back to the pairs</a>', page)
        pairs = client.get(link, follow_redirects=False)
        assert pairs.is_redirect and pairs.headers["location"].rstrip("/") == "/rate"


def test_one_is_told_otherwise_than_many(tmp_path: Path) -> None:
    """One rater without a vote, then two; one pair and one vote in the table of counts."""
    study = voted(tmp_path / "s", text_pairs(1), raters=1)
    study.add_rater("idle")
    one = report.html(study)
    study.add_rater("idle too")
    two = report.html(study)
    study.close()
    assert " 1 rater has not voted.</p>" in one and " 2 raters have not voted.</p>" in two
    assert "1 of 1 has the 1 vote" in one and "0 pairs on which" in one


def test_each_alpha_is_named_by_its_kind(tmp_path: Path) -> None:
    """That of a question of sides is the nominal one of the table below, to the digit, and says so.

    The headline's is ordinal, and higher: one rater calls every third pair a tie, which is near to both sides.
    """
    study = made(tmp_path / "s", text_pairs(12), quick_protocol(overlap=2))
    for number in range(2):
        study.add_rater(f"rater {number}")
        while (now := study.claim(f"rater {number}")) is not None:
            word, place = study.content(f"rater {number}", now.token, "left").decode().split()[:2]
            left = (word == "one") == (int(place) % 2 == 0)
            tie = number == 1 and int(place) % 3 == 0
            study.vote(f"rater {number}", now.token, Answer("tie_good" if tie else "left" if left else "right"))
    context, page = report.context(study), report.html(study)
    study.close()
    (overall,) = context["questions"]
    values = {name: value for name, value, _ in context["agreement"]}
    assert overall[1] == f"{values['alpha, nominal']}, nominal" and overall[1] in page
    assert values["alpha, nominal"] != values["alpha, ordinal (a tie lies between)"]


def test_the_page_ranks_arms_and_marks_a_side_bias(tmp_path: Path) -> None:
    """One rater knows the better one 9 times in 10, the other always takes the left side."""
    study = made(tmp_path / "s", text_pairs(40), quick_protocol(overlap=2))
    for rater in ("knows", "lefty"):
        study.add_rater(rater)
        count = 0
        while (now := study.claim(rater)) is not None:
            count += 1
            one_left = study.content(rater, now.token, "left").startswith(b"one")
            left = rater == "lefty" or one_left == (count % 10 != 0)
            study.vote(rater, now.token, Answer("left" if left else "right"))
    context = report.context(study)
    page = report.html(study)
    study.close()
    (group,) = context["rankings"]
    assert (
        group["name"] == "" and [row[1] for row in group["standings"]] == ["base", "tuned"] and 'class="forest"' in page
    )
    assert sorted(row["biased"] for row in context["raters"]) == [False, True] and "(side bias)" in page
    biased = next(row for row in context["raters"] if row["biased"])
    assert biased["left"]["value"] == "100 %"


@pytest.mark.parametrize(
    ("alpha", "equal", "kind", "words"),
    [
        ((0.9, 0.85, 0.95), 0.95, "good", "are reliable"),
        ((0.75, 0.7, 0.85), 0.9, "good", "tentative"),
        ((0.7, 0.5, 0.85), 0.8, "unknown", "interval holds 0.667"),
        ((0.2, 0.1, 0.3), 0.5, "alarm", "below the 0.667"),
        ((-0.01, math.nan, math.nan), 0.97, "unknown", "nearly all pairs"),
        ((0.3, math.nan, math.nan), 0.6, "unknown", "0.30 on 30 pairs"),
        ((math.nan, math.nan, math.nan), math.nan, "unknown", "by two raters"),
    ],
)
def test_agreement_in_words(
    tmp_path: Path, alpha: tuple[float, float, float], equal: float, kind: str, words: str
) -> None:
    study = made(tmp_path / "s", text_pairs(1))
    stats = study.stats()
    study.close()
    changed = replace(
        stats, alpha_ordinal=Estimate(*alpha, 30), agreement=Estimate(equal, equal - 0.1, equal + 0.1, 30)
    )
    found, _, text = report.agreement(changed)
    assert found == kind and words in text


# --- looking after a study ---


def test_doctor_finds_what_was_changed(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    voted(folder, text_pairs(3)).close()
    assert "all is well" in label("doctor", folder)
    (folder / "users.json").write_text('{"version": 1, "users": {}}')
    (folder / "users.json").chmod(0o644)
    output = label("doctor", folder, status=1)
    assert "chmod 600" in output and "1 problem" in output
    (folder / "users.json").chmod(0o600)
    next(path for path in (folder / "files").rglob("*") if path.is_file()).write_bytes(b"other")
    assert "PROBLEM" in label("doctor", folder, status=1)
    assert "is no study" in label("doctor", tmp_path, status=2)


def test_a_file_system_over_a_network_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = made(tmp_path / "s", text_pairs(1))
    assert care.filesystem(tmp_path)
    monkeypatch.setattr(care, "filesystem", lambda folder: "nfs4")
    wrong = [finding for finding in care.surroundings(study) if not finding.ok]
    study.close()
    assert [finding.what for finding in wrong] == ["file system"] and "local disk" in wrong[0].detail


def test_a_backup_opens_and_is_whole(tmp_path: Path) -> None:
    voted(tmp_path / "s", text_pairs(3)).close()
    label("backup", tmp_path / "s", tmp_path / "b")
    assert "all is well" in label("doctor", tmp_path / "b")
    assert json.loads(label("stats", tmp_path / "b", "--json"))["votes"] == 3
    assert "is there already" in label("backup", tmp_path / "s", tmp_path / "b", status=2)


def test_a_protocol_is_revised(tmp_path: Path) -> None:
    voted(tmp_path / "s", text_pairs(2)).close()
    (tmp_path / "p.yaml").write_text("name: test\nversion: 2\nquestion: Which now?\n")
    assert "version 2 (before: test version 1)" in label("revise", tmp_path / "s", "--protocol", tmp_path / "p.yaml")
    study = Study.open(tmp_path / "s")
    assert study.protocol().rules.question == "Which now?" and study.stats().votes == 2
    study.close()
    assert "has had this protocol" in label("revise", tmp_path / "s", "--protocol", tmp_path / "p.yaml", status=2)


@pytest.mark.parametrize("command", ["stats", "doctor", "serve", "export"])
def test_what_is_no_study_is_one_sentence(tmp_path: Path, command: str) -> None:
    words = ["--out", tmp_path / "x.parquet"] if command == "export" else []
    output = label(command, tmp_path / "none", *words, status=2)
    assert output.startswith("error: ") and output.count("\n") == 1


@pytest.mark.slow
def test_every_command_takes_a_postgresql_study(tmp_path: Path, postgresql: str) -> None:  # noqa: F811
    rows = [{"prompt": f"p{i}", "text_0": f"one {i}", "text_1": f"two {i}"} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.yaml").write_text("name: test\nversion: 1\nmin_view_seconds: 0\n")
    where = ["--database", postgresql]
    label("init", tmp_path / "s", "--from", tmp_path / "t.jsonl", "--protocol", tmp_path / "p.yaml", *where)
    with serving(tmp_path / "s", {"ann": "rater"}, database=postgresql) as server:
        client = server.client("ann")
        turn = client.get("/api/turn").json()
        while turn["now"]:
            turn = client.post("/api/vote", json={"token": turn["now"]["token"], "choice": "left"}).json()
    assert "3 by 1 rater" in label("stats", tmp_path / "s", *where)
    assert "3 rows" in label("export", tmp_path / "s", "--out", tmp_path / "v.parquet", *where)
    assert "all is well" in label("doctor", tmp_path / "s", *where)
    assert "give its URL" in label("stats", tmp_path / "s", status=2)
    assert "pg_dump" in label("backup", tmp_path / "s", tmp_path / "b", *where, status=2)
    (tmp_path / "p.yaml").write_text("name: test\nversion: 2\n")
    assert "version 2" in label("revise", tmp_path / "s", "--protocol", tmp_path / "p.yaml", *where)


# --- the demonstration ---


def test_the_sentences_of_the_demonstration_are_what_they_claim() -> None:
    """Gold: the first says the row's side and the second the other one. Ordinary pairs: both say all of the row."""
    from diffalign.worlds import brain_mr

    found = list(demo.sentences())
    assert [pair.expected for pair in found] == ["first"] * demo.GOLD + [None] * demo.PAIRS
    for pair in found:
        first, second = (brain_mr.parse(sample.text or "") for sample in (pair.first, pair.second))
        assert first == pair.prompt.attributes
        changed = {name for name in first or {} if (second or {})[name] != (first or {})[name]}
        assert changed == ({"side"} if pair.expected else set())


def test_the_accounts_of_the_demonstration_are_made_once_and_private(tmp_path: Path) -> None:
    made(tmp_path / "s", text_pairs(1)).close()
    passwords = demo.accounts(tmp_path / "s")
    assert demo.accounts(tmp_path / "s") == passwords and set(passwords) == {"demo-rater", "demo-admin"}
    assert stat.S_IMODE((tmp_path / "s" / demo.KEPT).stat().st_mode) == 0o600
    accounts = Accounts.load(tmp_path / "s" / "users.json")
    found = {name: accounts.verify(name, password) for name, password in passwords.items()}
    assert [account.role for account in found.values() if account] == ["rater", "admin"]


# --- the tutorial ---


def test_the_tutorial_says_what_the_benchmark_runs() -> None:
    """All its commands, word by word, with the folder ``loop``; the server's and the looks in between are its own."""
    text = (ROOT / "docs" / "tutorial-closed-loop.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    said = [sorted(shlex.split(line)[1:]) for block in blocks for line in block.splitlines()]
    run = closed_loop.commands("loop", "http://127.0.0.1:8000", 384, 10)
    for command in run.values():
        assert sorted(command) in said, command
    own = [line for line in said if line not in map(sorted, run.values())]
    assert {word for line in own for word in ("users", "serve", "stats", "inspect", "init") if word in line} == {
        "users", "serve", "stats", "inspect", "init",
    }  # fmt: skip
    assert len(own) == 5


def test_the_page_of_the_loop_is_that_of_the_recorded_results() -> None:
    results = json.loads(closed_loop.RESULTS.read_text())
    assert closed_loop.page(results) == closed_loop.PAGE.read_text()
