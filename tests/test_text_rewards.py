"""Rewards of texts: each formula against a hand computation, each judge against a real server."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Prompt, Reward, Sample, Scores
from diffalign.worlds import findings
from rewards import sentiment
from rewards.findings_checker import FindingsChecker
from rewards.findings_gold import FindingsGold
from rewards.judge import Judge, read_answer, read_principles
from rewards.line import UnreachableError
from rewards.readability import count, grade_level, reading_ease, syllables
from rewards.registry import load

ROW = {"plane": "axial", "contrast": "T2", "level": "ventricles", "lesion": "present", "side": "left", "size": "large"}
ASKED = findings.prompt(ROW, "findings")
NAMED = [
    "findings-checker", "findings-gold", "readability", "readability?measure=grade", "length?target=10",
    "length?max=10", "format?pattern=.*[.]",
]  # fmt: skip


def texts(*found: str | None) -> list[Sample]:
    return [Sample(ASKED, text=text) for text in found]


@pytest.mark.parametrize("spec", NAMED)
def test_every_text_reward_keeps_the_promises(spec: str) -> None:
    """One, none, empty and missing texts; the range; the batch plays no part."""
    reward = load(spec)
    assert isinstance(reward, Reward) and reward.modality == "text" and reward.unit
    samples = texts("Axial T2, ventricles: large left lesion.", "No.", "", None, "It is seen. " * 40)
    scores = reward(samples)
    assert scores.total.dtype == torch.float32 and scores.total.shape == (5,)
    assert scores.total[3].isnan() and scores.total[[0, 1, 4]].isfinite().all()
    assert all(part.shape == (5,) and part.dtype == torch.float32 for part in scores.parts.values())
    told = scores.total[scores.total.isfinite()]
    assert (told >= reward.range[0]).all() and (told <= reward.range[1]).all()
    alone = torch.cat([reward([sample]).total for sample in samples])
    assert torch.equal(alone.nan_to_num(-9), scores.total.nan_to_num(-9))
    assert reward([]).total.shape == (0,)


SYLLABLES = """
1 the cat brain spot bright scan front lobe lobes used looked moved slice through large small shapes asked helped whole
2 little image lesion people fluid region signal tiny focal steady wanted needed boxes faces pieces middle science being
2 picture towards forehead something sided level doctor nothing table
3 area axial coronal sagittal hemisphere previous beautiful visible putamen abnormal cerebral occupied obvious radio
3 idea video period creation sizeable oedema vertices thalamus
4 cerebellum posterior anterior hyperintense unusual demonstrated transaxial parenchymal recommended occipital
4 ventricular information occupying voluminous
5 examination abnormality associated appreciated intracranial subcentimetre university interpretation
2 T1 MR
3 MRI
1 FLAIR
"""


def test_syllables_of_words_that_one_can_count() -> None:
    for line in SYLLABLES.split("\n")[1:-1]:
        number, *words = line.split()
        assert {word: syllables(word) for word in words} == dict.fromkeys(words, int(number))


def test_readability_by_hand() -> None:
    """Two sentences, 9 words: The brain looks fine. There is an abnormal area.

    Syllables 1+1+1+1 and 1+1+1+3+3 = 13. Ease 206.835 - 1.015*4.5 - 84.6*13/9 = 80.067; grade 0.39*4.5 + 11.8*13/9 -
    15.59 = 3.209.
    """
    text = "The brain looks fine. There is an abnormal area."
    assert (count(text).words, count(text).sentences, count(text).syllables) == (9, 2, 13)
    assert reading_ease(text) == pytest.approx(206.835 - 4.5675 - 122.2)
    assert grade_level(text) == pytest.approx(1.755 + 17.0444 - 15.59, abs=1e-3)
    assert reading_ease("Go.") == pytest.approx(121.22)
    assert count("It is 2.5 mm wide").sentences == 1
    assert math.isnan(reading_ease(" ... "))
    parts = load("readability")(texts(text)).parts
    assert parts["words a sentence"][0] == 4.5 and parts["words"][0] == 9


def test_plain_words_are_easier() -> None:
    plain = "There is a large bright spot on the left side of the brain."
    jargon = (
        "A voluminous hyperintense focal parenchymal abnormality is demonstrated within the left cerebral hemisphere."
    )
    assert reading_ease(plain) > 80 and reading_ease(jargon) < 30
    assert load("readability?measure=grade").higher_is_better is False


def test_length() -> None:
    """Of 4 and 12 words: 10 wanted is missed by 6 and 2; at most 10 are passed by 0 and 2."""
    samples = texts("one two three four", "word " * 12, "")
    assert load("length?target=10")(samples).total.tolist() == [-6, -2, -10]
    assert load("length?max=10")(samples).total.tolist() == [0, -2, 0]
    assert load("length?max=10")(samples).parts["words"].tolist() == [4, 12, 0]
    for spec in ("length", "length?target=3&max=4"):
        with pytest.raises(ConfigError, match="either a target or a max"):
            load(spec)
    with pytest.raises(ConfigError, match="0 or more"):
        load("length?max=-1")


def test_format() -> None:
    samples = texts("Findings: none.", "  Findings: two\nlines. ", "none", "")
    assert load(r"format?pattern=Findings: .*\.")(samples).total.tolist() == [1, 1, 0, 0]
    with pytest.raises(ConfigError, match="no regular expression"):
        load("format?pattern=(")


def test_gold_is_the_product_of_its_parts() -> None:
    """The padded text says one sentence six times: six right facts, five repeats, 6/11."""
    good = findings.realise(ASKED.attributes, 3, findings.Style(0.0, 0.0))
    wrong = "Axial T2 at the ventricles. There is a large bright spot on the right."
    padded = good + " Ask your doctor what this means for you." * 6
    scores = load("findings-gold")(texts(good, wrong, padded, ""))
    parts = scores.parts
    assert torch.allclose(scores.total, parts["consistency"] * (1 + parts["ease"]) / 2 * parts["brevity"])
    assert parts["consistency"].tolist() == pytest.approx([1, 5 / 6, 6 / 11, 0])
    assert scores.total[0] > scores.total[1] + 0.05
    assert scores.total[2] < 0.6 and parts["brevity"][2] < 0.6
    assert scores.total[3] == 0
    plain = findings.prompt(ROW, "findings").attributes
    assert parts["brevity"][2] == pytest.approx(findings.reference_words(plain) / len(padded.split()))


def test_gold_needs_a_task() -> None:
    with pytest.raises(ConfigError, match="findings, explain"):
        FindingsGold()([Sample(Prompt("", attributes=ROW), text="No.")])


def test_plain_right_texts_are_gold_and_leaving_a_fact_out_does_not_pay() -> None:
    """For some 40 rows: flawless plain texts score more than the same texts with a fact missing, on average."""
    drawn = [findings.example(5 * 10**9 + i) for i in range(60)]
    rows = [(one.prompt, i) for i, one in enumerate(drawn) if one.prompt.attributes["lesion"] == "present"]
    style = findings.Style(0.2, 0.2)
    whole = [Sample(p, text=findings.realise(p.attributes, i, style)) for p, i in rows]
    less = [
        Sample(p, text=findings.realise(p.attributes, i, style, [findings.Flaw("missing", "size")])) for p, i in rows
    ]
    gold = FindingsGold()
    assert gold(whole).total.mean() > gold(less).total.mean() + 0.05
    assert FindingsChecker()(whole).total.min() == 1


def test_word_lists_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(sentiment, "import_module", missing)
    for spec, package in (("sentiment", "vaderSentiment"), ("profanity", "better-profanity")):
        reward = load(spec)  # naming it loads nothing
        assert reward([]).total.shape == (0,) and reward(texts(None)).total.isnan().all()
        with pytest.raises(NotFoundError, match=rf"needs the package {package}.*diffalign\[text\]"):
            reward(texts("A text."))


def test_sentiment() -> None:
    pytest.importorskip("vaderSentiment")
    scores = load("sentiment")(
        texts("This is wonderful, I love it!", "This is terrible and sad.", "The slice is axial.", "")
    )
    good, bad, plain, empty = scores.total.tolist()
    assert good > 0.5 and bad < -0.5 and plain == empty == 0
    assert set(scores.parts) == {"positive", "neutral", "negative"}


def test_profanity() -> None:
    pytest.importorskip("better_profanity")
    scores = load("profanity")(texts("You are a stupid shit.", "You are sh1t.", "The brain looks normal.", ""))
    assert scores.total.tolist() == [1, 1, 0, 0]


# The judge: a server that answers by what it is asked.

Reply = Callable[[dict[str, Any]], tuple[int, object]]


class ChatServer(ThreadingHTTPServer):
    """Answers chat completions by a function of the request, and keeps the requests."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.reply, self.requests, self.headers = reply, list[dict[str, Any]](), list[dict[str, str]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class ChatHandler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({**request, "path": self.path})
        self.server.headers.append(dict(self.headers))
        status, answer = self.server.reply(request)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with suppress(OSError):  # who asked may have given up
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def chat(reply: Reply) -> Iterator[ChatServer]:
    server = ChatServer(reply)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(text: str, told: dict[str, float] | None = None) -> tuple[int, object]:
    """A completion, with the probabilities of the first token where they are given."""
    choice: dict[str, object] = {"index": 0, "message": {"role": "assistant", "content": text}}
    if told is not None:
        top = [{"token": token, "logprob": math.log(p)} for token, p in told.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}
    return 200, {"object": "chat.completion", "choices": [choice]}


def question(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


def shorter(request: dict[str, Any]) -> tuple[int, object]:
    """Prefers the shorter answer."""
    a, b = question(request).partition("Answer A:\n")[2].partition("\n\nPrinciple")[0].split("\n\nAnswer B:\n")
    return said("A" if len(a) < len(b) else "B")


def pair(first: str = "short", second: str = "a much longer text") -> list[tuple[Sample, Sample]]:
    return [(texts(first)[0], texts(second)[0])]


def judge(server: ChatServer, **settings: Any) -> Judge:
    return Judge(server.url, "tiny", **settings)


def test_both_orders_are_asked_and_the_content_decides(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("- It is short.\n- It is kind.\n- It is true.\n")
    with chat(shorter) as server:
        one = load(f"judge?url={server.url}/v1&model=tiny&principles={tmp_path / 'p.yaml'}")
        assert isinstance(one, Judge) and isinstance(one, Reward)
        (better,), (worse,) = one.judge(pair(), 1), one.judge(pair("a much longer text", "short"), 1)
    assert (better.label, worse.label) == (1.0, 0.0)
    assert better.provenance["labels"] == [1.0, 1.0, 1.0] and better.provenance["nonsense"] == 0
    assert len(server.requests) == one.asked == 12
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["model"] == "tiny" and request["temperature"] == 0
    assert ASKED.text in question(request) and "It is short." in question(request)
    assert question(request).index("short") < question(request).index("a much longer")
    assert question(server.requests[1]).index("a much longer") < question(server.requests[1]).index("Answer B:\nshort")


def test_a_judge_who_prefers_a_place_says_nothing() -> None:
    with chat(lambda _: said("A")) as server:
        assert judge(server).judge(pair())[0].label == 0.5


def test_labels_are_soft_where_probabilities_are_told() -> None:
    """In the first order A has .6 of .8 = 3/4; in the second B has .9, so the first has .9: mean (.75 + .9) / 2."""

    def reply(request: dict[str, Any]) -> tuple[int, object]:
        first = "Answer A:\nshort" in question(request)
        told = {"A": 0.6, " B": 0.2, "the": 0.1} if first else {"a": 0.1, "B": 0.5, "b": 0.4}
        return said("A" if first else "B", told if "logprobs" in request else None)

    with chat(reply) as server:
        assert judge(server).judge(pair())[0].label == pytest.approx((0.75 + 0.9) / 2)
        assert server.requests[0]["logprobs"] is True
        assert judge(server, logprobs=False).judge(pair())[0].label == 1.0
        assert "logprobs" not in server.requests[-1]


def test_nonsense_is_a_tie_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with chat(lambda _: said("As a language model I like A and B.")) as server:
        one = judge(server)
        found = one.judge(pair())[0]
    assert found.label == 0.5 and found.provenance["nonsense"] == 4 and one.nonsense == one.asked == 4
    assert sum("was asked a or b" in record.getMessage() for record in caplog.records) == 1


def test_as_a_reward_it_is_the_probability_of_yes() -> None:
    """Two principles: .8 / (.8 + .2) and a plain no: .4. Nonsense to one is NaN for that sample alone."""

    def reply(request: dict[str, Any]) -> tuple[int, object]:
        if "odd" in question(request):
            return said("perhaps")
        return said("Yes", {"Yes": 0.8, "No": 0.2}) if "correctly" in question(request) else said("no.")

    with chat(reply) as server:
        one = judge(server)
        scores: Scores = one(texts("good", "odd", None))
    assert scores.total[0] == pytest.approx(0.4) and scores.total[1:].isnan().all()
    assert scores.parts["principle 1"][0] == pytest.approx(0.8) and scores.parts["principle 2"][0] == 0
    assert len(server.requests) == 4 and one.nonsense == 2


@pytest.mark.parametrize(
    ("text", "first"),
    [("A", 1.0), ("b.", 0.0), ("**B**", 0.0), ("Answer: A", 1.0), ("", None), ("A or B", None), ("neither", None)],
)
def test_replies(text: str, first: float | None) -> None:
    assert read_answer({"message": {"content": text}}, ("a", "b")).first == first
    broken = {"message": {"content": text}, "logprobs": {"content": [{"token": "A", "top_logprobs": "x"}, 3, None]}}
    assert (read_answer(broken, ("a", "b")).first is None) == (first is None)


@pytest.mark.parametrize("choice", [{}, {"message": None}, {"message": {"content": None}}, {"message": {"content": 3}}])
def test_choices_without_a_text_are_nonsense(choice: dict[str, object]) -> None:
    assert read_answer(choice, ("a", "b")).first is None


def test_a_server_that_hangs_is_an_error_in_time() -> None:
    released = threading.Event()

    def hang(_: dict[str, Any]) -> tuple[int, object]:
        released.wait(20)
        return said("A")

    with chat(hang) as server:
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"the judge http://127.* no answer in 2 tries .*--resume"):
            judge(server, timeout=0.3, retries=1).judge(pair())
        assert time.monotonic() - started < 10
        released.set()


def test_a_busy_server_is_asked_again() -> None:
    answers: Iterator[tuple[int, object]] = iter([(503, {}), said("A"), said("B"), said("A"), said("B")])
    with chat(lambda _: next(answers)) as server:
        assert judge(server, timeout=5).judge(pair())[0].label == 1.0
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (400, {"error": {"message": "no logprobs here"}}, "HTTP 400 .* no logprobs here"),
        (404, {"error": "unknown model"}, "HTTP 404 .* unknown model"),
        (500, b"oops", "HTTP 500 .* it gave no reason"),
        (200, b"<html>", "no chat endpoint: .* no JSON"),
        (200, {"choices": []}, "no chat endpoint: .* no choices"),
        (301, b"", "redirects to nowhere"),
    ],
)
def test_wrong_endpoints_are_told_at_once(status: int, body: object, why: str) -> None:
    with chat(lambda _: (status, body)) as server, pytest.raises(InputError, match=why):
        judge(server).judge(pair())
    assert len(server.requests) == 1


def test_nobody_there() -> None:
    with chat(shorter) as server:
        url = server.url
    with pytest.raises(UnreachableError, match="the judge"):
        Judge(url, "tiny", timeout=1, retries=0).judge(pair())


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat(shorter) as server:
        with pytest.raises(ConfigError, match="CHAT_KEY"):
            judge(server, token_env="CHAT_KEY")
        monkeypatch.setenv("CHAT_KEY", "abc")
        judge(server, token_env="CHAT_KEY").judge(pair())
        assert server.headers[0]["Authorization"] == "Bearer abc"


def test_pairs_that_cannot_be_compared() -> None:
    with chat(shorter) as server:
        other = Sample(Prompt("another"), text="x")
        with pytest.raises(InputError, match="one prompt"):
            judge(server).judge([(texts("a")[0], other)])
        with pytest.raises(InputError, match="has none"):
            judge(server).judge([(texts("a")[0], texts(None)[0])])


@pytest.mark.parametrize("content", ["", "a: b", "- 1", "[]", "- ''", "{", "- - x"])
def test_files_that_hold_no_principles(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(InputError, match=r"p\.yaml"):
        read_principles(tmp_path / "p.yaml")
    with pytest.raises(NotFoundError, match=r"none\.yaml"):
        read_principles(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"timeout": 0}, "timeout"), ({"patience": math.inf}, "patience"), ({"retries": -1}, "retries"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Judge("http://127.0.0.1:1", "tiny", **settings)


def test_answers_are_of_the_same_length_as_the_question() -> None:
    """The judge is a judge of pairs as the engine wants it: ``(pairs, seed) -> preferences`` in their order."""
    several: Sequence[tuple[Sample, Sample]] = [*pair(), *pair("a much longer text", "short")]
    with chat(shorter) as server:
        found = judge(server).judge(several, 3)
    assert [one.label for one in found] == [1.0, 0.0]
    assert [(one.first, one.second) for one in found] == several
