"""Rewards over HTTP: a real server on a free port, and servers that misbehave."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.types import Prompt, Reward, Sample, Scores
from diffalign.worlds import emoji
from rewards import line, serve, wire
from rewards.combine import Combined
from rewards.emoji_checker import EmojiChecker
from rewards.jpeg import Compressibility
from rewards.line import UnreachableError
from rewards.registry import load
from rewards.remote import RemoteReward

ROOT = Path(__file__).resolve().parent.parent
Serve = Callable[..., AbstractContextManager[serve.Server]]


@contextmanager
def served(reward: Reward, **options: Any) -> Iterator[serve.Server]:
    server = serve.Server(reward, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shades(*levels: int) -> list[Sample]:
    return [Sample(Prompt("a shade"), Image.new("RGB", (8, 8), (n, n, n)), seed=n) for n in levels]


LENGTH = len(wire.pack(shades(1)[0])) + 64
"""Bytes that a sample of one shade takes in a request, as a client reckons."""


class Shade:
    """The red of the first pixel, NaN for 0 and infinite for 255; it keeps what it was asked."""

    name, modality, unit, range, higher_is_better = "shade", "image", "levels", (0.0, math.inf), True

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[list[Sample]] = []
        self.seconds, self.entered = seconds, threading.Event()

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        self.asked.append(list(samples))
        self.entered.set()
        time.sleep(self.seconds)
        levels = [float(s.image.getpixel((0, 0))[0]) if s.image else math.nan for s in samples]  # type: ignore[index]
        table = {0.0: math.nan, 255.0: math.inf}
        total = torch.tensor([table.get(level, level) for level in levels], dtype=torch.float32)
        return Scores(total, {"half": total / 2})


# -- a server that is well ----------------------------------------------------------------------------------------


def test_it_scores_as_the_reward_itself() -> None:
    local = EmojiChecker(graded=True)
    scenes = [emoji.scene(seed) for seed in range(6)]
    samples = [Sample(scenes[i].prompt, scenes[i - i % 2].image, seed=i) for i in range(6)]
    samples[4] = replace(samples[4], image=None)
    with served(local) as server:
        reward = load(f"{server.url}?batch_size=4")
        assert isinstance(reward, Reward)
        facts = ("name", "modality", "unit", "range", "higher_is_better")
        assert [getattr(reward, fact) for fact in facts] == [getattr(local, fact) for fact in facts]
        there, here = reward(samples), local(samples)
        empty = reward([])
    torch.testing.assert_close(there.total, here.total, rtol=0, atol=0, equal_nan=True)
    assert there.total.isnan().tolist() == [False] * 4 + [True, False]
    assert set(there.parts) == set(here.parts)
    for name, part in here.parts.items():
        torch.testing.assert_close(there.parts[name], part, rtol=0, atol=0, equal_nan=True)
    assert empty.total.shape == (0,) and there.total.dtype == torch.float32


def test_everything_about_a_sample_arrives() -> None:
    reward = Shade()
    prompt = Prompt("ein Würfel ✓", "id-1", {"n": 3, "deep": {"list": [1.5, None, "a"]}}, "blurred")
    noisy = Image.effect_noise((9, 7), 80).convert("RGB")
    noisy.putpixel((0, 0), (90, 90, 90))  # 0 and 255 stand for what is not finite
    sent = [
        Sample(prompt, noisy, seed=2**62, evidence={"truth": [1, 2]}),
        Sample(Prompt("grey"), Image.effect_noise((9, 7), 80)),
        Sample(Prompt("no image")),
        Sample(Prompt("words"), text="five words and a ✓", seed=-1),
    ]
    with served(reward) as server:
        total = RemoteReward(server.url)(sent).total
    (got,) = reward.asked
    assert [(s.prompt, s.text, s.seed, dict(s.evidence)) for s in got] == [
        (s.prompt, s.text, s.seed, dict(s.evidence)) for s in sent
    ]
    assert got[0].image is not None and got[0].image.tobytes() == noisy.tobytes() and got[2].image is None
    assert got[1].image is not None and got[1].image.mode == "RGB"
    assert total.isnan().tolist() == [False, False, True, True]


def test_what_is_not_finite_is_nan_and_ends_without_bound_are_infinite() -> None:
    with served(Shade()) as server:
        reward = RemoteReward(server.url)
        scores = reward(shades(0, 7, 255))
    assert reward.range == (0, math.inf)
    assert scores.total.isnan().tolist() == [True, False, True]
    assert (scores.total[1], scores.parts["half"][1]) == (7, 3.5)


@pytest.mark.parametrize(
    ("options", "limits", "sizes"),
    [
        ({"batch_size": 2}, {}, [2, 2, 1]),
        ({}, {"max_pixels": 3 * 64}, [3, 2]),
        ({}, {"max_bytes": int(2.5 * LENGTH)}, [2, 2, 1]),
        ({}, {}, [5]),
    ],
)
def test_batches_fit_the_server(options: dict[str, int], limits: dict[str, int], sizes: list[int]) -> None:
    reward = Shade()
    with served(reward) as server:
        server.about.update(limits)
        total = RemoteReward(server.url, **options)(shades(1, 2, 3, 4, 5)).total  # type: ignore[arg-type]
    assert [len(batch) for batch in reward.asked] == sizes
    assert total.tolist() == [1, 2, 3, 4, 5]


def test_a_sample_that_never_fits_or_is_not_json_is_told() -> None:
    with served(Shade()) as server:
        server.about["max_pixels"] = 63
        with pytest.raises(InputError, match=r"'a shade' has \d+ bytes and 64 pixels, and http\S+ takes \d+ and 63"):
            RemoteReward(server.url)(shades(1))
        with pytest.raises(InputError, match="cannot be sent: its attributes or evidence are not JSON"):
            RemoteReward(server.url)([Sample(Prompt("a", attributes={"when": object()}))])


def test_it_may_be_renamed_for_a_combination_with_itself() -> None:
    with served(Compressibility()) as server:
        there = load(f"{server.url}?name=there")
        combined = Combined([(Compressibility(), 1.0, None), (there, -1.0, None)])
        assert combined(shades(3, 9)).total.tolist() == [0, 0]


def test_several_clients_take_turns() -> None:
    """The reward sees one request at a time: it would fail if it were entered twice."""
    busy = threading.Lock()

    class Alone(Shade):
        def __call__(self, samples: Sequence[Sample]) -> Scores:
            assert busy.acquire(blocking=False)
            time.sleep(0.02)
            busy.release()
            return super().__call__(samples)

    with served(Alone()) as server:
        reward, totals = RemoteReward(server.url), [0.0] * 6

        def ask(i: int) -> None:
            totals[i] = float(reward(shades(i + 1)).total)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert totals == [1, 2, 3, 4, 5, 6]


# -- a server that is not -----------------------------------------------------------------------------------------


class Fake:
    """Answers each connection with the next of its raw replies; None closes it without one."""

    def __init__(self, *replies: bytes | None) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.replies, self.requests = list(replies), 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        for reply in self.replies:
            connection = self.listener.accept()[0]
            with connection:
                self.requests += 1
                while select.select([connection], [], [], 0.05)[0] and connection.recv(2**16):
                    pass
                if reply is not None:
                    connection.sendall(reply)
        self.listener.close()


def answer(content: object, status: int = 200, *headers: str) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


ABOUT = {**wire.about(Shade()), "name": "fake"}
HELLO = answer(ABOUT)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of up to a hundredth of their length."""
    monkeypatch.setattr(line, "_FIRST_PAUSE", 0.005)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (answer({**ABOUT, "protocol": 2}), "speaks version 2 of the protocol, and this diffalign speaks 1"),
        (answer({}), "speaks version None"),
        (answer(b"<html>hello</html>"), "is no reward server for this version: the body is not JSON"),
        (answer([1]), "no JSON object"),
        (answer({**ABOUT, "range": [0, "high"]}), "does not describe a reward"),
        (answer({name: value for name, value in ABOUT.items() if name != "unit"}), "'unit' is missing"),
        (answer({**ABOUT, "modality": "sound"}), "neither image nor text"),
        (answer({**ABOUT, "name": "two\nlines"}), "no short texts"),
        (answer({"error": "no token"}, 401), "answered HTTP 401 to /v1/reward: no token"),
        (answer(b"gone", 404), "HTTP 404 to /v1/reward: it gave no reason"),
        (answer(b"", 302, "Location: http://elsewhere.example/"), "redirects to http://elsewhere.example/; redirects"),
        (answer({"error": "it broke"}, 500), "HTTP 500 to /v1/reward: it broke"),
    ],
)
def test_a_wrong_answer_is_told_at_once(reply: bytes, message: str) -> None:
    fake = Fake(reply)
    with pytest.raises(InputError, match=message) as caught:
        RemoteReward(fake.url)
    assert fake.requests == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"total": [1]}, "'total' is 1 numbers for 2 samples"),
        ({"total": 3}, "'total' is a int for 2 samples"),
        ({}, "'total' is a NoneType"),
        ({"total": [1, "2"]}, "'total' holds '2'"),
        ({"total": [1, True]}, "'total' holds True"),
        ({"total": [1, 10**400]}, "too large"),
        ({"total": [1, 2], "parts": {"a": [1]}}, r"'parts\.a' is 1 numbers"),
        ({"total": [1, 2], "parts": [1]}, '"parts" is no mapping'),
        ({"total": [1, math.nan]}, "not JSON"),
        ({"total": [1, 2], "name": "another"}, "served 'fake' and now serves 'another'"),
        ({"total": [1, 2], "protocol": 3}, "version 3"),
    ],
)
def test_wrong_scores_are_told(content: dict[str, object], message: str) -> None:
    fake = Fake(HELLO, answer({"protocol": 1, **content}))
    with pytest.raises(InputError, match=message) as caught:
        RemoteReward(fake.url)(shades(1, 2))
    assert fake.url in str(caught.value)


SCORED = answer({"protocol": 1, "total": [4.0]})


@pytest.mark.parametrize(
    "trouble",
    [
        [None],
        [answer({"error": "full"}, 503)],
        [answer(b"", 502), answer(b"", 504), answer(b"", 429)],
        [SCORED[:-4]],
        [b"nonsense\r\n\r\n"],
    ],
    ids=["closes", "busy", "gateways", "truncated", "no-http"],
)
def test_trouble_that_passes_is_waited_for_and_warned_of_once(
    trouble: list[bytes | None], caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake(HELLO, *trouble, SCORED)
    reward = RemoteReward(fake.url)
    with caplog.at_level(logging.WARNING):
        assert reward(shades(4)).total.tolist() == [4]
    assert fake.requests == 2 + len(trouble)
    assert len(caplog.records) == 1 and fake.url in caplog.text


def test_a_dead_server_stops_the_run_when_patience_ends(caplog: pytest.LogCaptureFixture) -> None:
    with served(Shade()) as server:
        reward = RemoteReward(server.url, patience=0.3)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            UnreachableError, match=r"no answer in \d+ tries over .*: connection refused; start it"
        ) as caught,
    ):
        reward(shades(1))
    assert isinstance(caught.value, RefusedError) and caught.value.exit_status == 2
    assert len(caplog.records) == 1 and "trying for 0 s" in caplog.text
    with pytest.raises(UnreachableError, match="in 3 tries"):
        RemoteReward(server.url, patience=60, retries=2)
    with pytest.raises(UnreachableError, match="in 1 tries"):
        RemoteReward(server.url, patience=0)


def test_a_server_that_comes_back_goes_on() -> None:
    with served(Shade()) as server:
        reward, port = RemoteReward(server.url), server.server_port
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(float(reward(shades(5)).total)))
    thread.start()
    time.sleep(0.1)
    with served(Shade(), port=port):
        thread.join(10)
    assert found == [5]


def test_a_slow_server_is_given_up_and_does_not_work_for_nobody() -> None:
    """The first request holds the reward; those that time out while they wait are not computed."""
    slow = Shade(1.5)
    with served(slow) as server:
        reward = RemoteReward(server.url, timeout=0.15, retries=2)
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"in 3 tries over .*: no answer within 0\.15 s; a larger timeout="):
            reward(shades(1))
        assert time.monotonic() - started < 1.5
        with server.lock:
            pass
        time.sleep(0.2)
        assert len(slow.asked) == 1


def test_a_server_that_drips_is_given_up() -> None:
    """A byte every 20 ms never trips the timeout of a single read."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def drip() -> None:
        connection = listener.accept()[0]
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
            while not done.is_set():
                try:
                    connection.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.02)

    threading.Thread(target=drip, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"no answer within 0\.2 s"):
        RemoteReward(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.2, retries=0)
    done.set()
    listener.close()
    assert time.monotonic() - started < 2


def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_BYTES", 1000)
    fake = Fake(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 5000)
    with pytest.raises(InputError, match="longer than 1000 bytes"):
        RemoteReward(fake.url)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with served(Shade()) as server:
        assert RemoteReward(server.url)(shades(2)).total.tolist() == [2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://", "no address of a reward"),
        ("http://a:b/", "is no address"),
        ("http://user:secret@host/", "must not hold a user or password"),
        ("http://host#part", "no address of a reward"),
        ("http://host?timeout=0", "timeout is 0; it is a number of seconds above 0"),
        ("http://host?timeout=nan", "timeout is nan"),
        ("http://host?timout=3", "no argument 'timout'; did you mean timeout"),
        ("http://host?batch_size=0", "batch_size is 0"),
        ("http://host?token_env=NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE, named by token_env, is not set"),
    ],
)
def test_a_wrong_address_is_told(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(spec)
    assert "secret" not in str(caught.value)


# -- the server's own guard ---------------------------------------------------------------------------------------


def call(
    server: serve.Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Content-Type": "application/json", **named})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def png(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and is not."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def row(**changes: object) -> dict[str, object]:
    return json.loads(wire.pack(shades(1)[0])) | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"samples": []}', "version None"),
        (b'{"protocol": 1}', '"samples" is a list'),
        (row(image="*"), "sample 0: \"image\" is not valid base64"),
        (row(image=base64.b64encode(b"GIF89a").decode()), "is not a PNG"),
        (row(image=base64.b64encode(png(8, 8)).decode()), "not an image that can be decoded"),
        (row(image=base64.b64encode(png(2**16, 2**16)).decode()), "more than 67108864 pixels together"),
        (row(image=5), "a PNG in base64, or null"),
        (row(prompt="a"), '"prompt" is an object'),
        (row(prompt={"text": 1}), '"prompt" is an object with a "text"'),
        (row(prompt={"text": "a", "id": 1}), "which are texts"),
        (row(seed="1"), '"seed" is a whole number'),
        (row(text="both"), "where there is no image"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told(content: object, message: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps({"protocol": 1, "samples": [content]}).encode()
    reward = Shade()
    with served(reward) as server:
        status, told = call(server, "POST", wire.SCORE, body)
        assert (status, reward.asked) == (400, [])
        assert message in told["error"]
        assert call(server, "POST", wire.SCORE, wire.body([]))[0] == 200


def test_other_requests_are_refused() -> None:
    with served(Shade()) as server:
        assert call(server, "GET", "/")[0] == 404
        assert call(server, "GET", wire.SCORE)[0] == 405
        assert call(server, "DELETE", wire.SCORE)[0] == 501
        assert call(server, "POST", wire.SCORE, b"{}", Content_Type="text/plain")[0] == 415
        assert call(server, "POST", wire.SCORE, None, Content_Length=str(wire.MAX_BYTES + 1))[0] == 413
        assert call(server, "POST", wire.SCORE, None, Content_Length="-1")[0] == 411


def test_a_reward_that_fails_is_told_with_its_reason() -> None:
    class Broken(Shade):
        def __call__(self, samples: Sequence[Sample]) -> Scores:
            if len(samples) == 1:
                raise RefusedError("it does not want to")
            if len(samples) == 2:
                raise ZeroDivisionError("by zero")
            return Scores(torch.zeros(1))

    with served(Broken()) as server:
        reward = RemoteReward(server.url)
        for count, message in (
            (1, "HTTP 422 to /v1/score: it does not want to"),
            (2, "HTTP 500 to /v1/score: the reward failed: ZeroDivisionError: by zero"),
            (3, r"HTTP 500 .* its total has shape \(1,\) for 3 samples"),
        ):
            with pytest.raises(InputError, match=message):
                reward(shades(*range(count)))


def test_a_token_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Shade(), token="open-sesame") as server:
        with pytest.raises(InputError, match=r"HTTP 401 .*asks for a token: write \?token_env=VARIABLE"):
            load(server.url)
        monkeypatch.setenv("MY_TOKEN", "wrong")
        with pytest.raises(InputError, match="HTTP 401"):
            load(f"{server.url}?token_env=MY_TOKEN")
        monkeypatch.setenv("MY_TOKEN", "open-sesame")
        assert load(f"{server.url}?token_env=MY_TOKEN")(shades(3)).total.tolist() == [3]
        assert call(server, "POST", wire.SCORE, wire.body([]))[0] == 401


def test_too_many_waiting_requests_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_WAITING", 1)
    slow = Shade(0.2)
    with served(slow) as server:
        reward = RemoteReward(server.url)
        first = threading.Thread(target=reward, args=(shades(1),))
        first.start()
        assert slow.entered.wait(5)
        assert call(server, "POST", wire.SCORE, wire.body([]))[0] == 503
        assert reward(shades(2)).total.tolist() == [2]
        first.join()


def test_a_server_that_ends_lets_no_waiting_request_begin() -> None:
    """One is being scored, another waits: that one is told, and never scored."""
    slow, status = Shade(0.5), list[int]()
    with served(slow) as server:
        first = threading.Thread(target=RemoteReward(server.url), args=(shades(1),))
        second = threading.Thread(target=lambda: status.append(call(server, "POST", wire.SCORE, wire.body([]))[0]))
        first.start()
        assert slow.entered.wait(5)
        second.start()
        server.ending.set()
        for one in (first, second):
            one.join()
        assert status == [503] and server.scored == 1


def test_a_port_that_is_taken_is_told() -> None:
    with (
        served(Shade()) as server,
        pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.server_port}"),
    ):
        serve.Server(Shade(), port=server.server_port)


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "give a --token"),
        ({"host": "example.org"}, "give a --token"),
        ({"token": "a", "without_token": True}, "not both"),
        ({"token": "a b"}, "without spaces"),
    ],
)
def test_what_others_could_reach_needs_a_token(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve.run("compressibility", **options)


def test_the_command_serves_until_ctrl_c() -> None:
    # Where the tests themselves run in the background, Ctrl-C is ignored, and so it would be by every child.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from apps.cli import main; main()"
    command = [sys.executable, "-c", code, "reward", "serve", "compressibility", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith("compressibility (image, in kB) is served at http://127.0.0.1:")
            spec = process.stdout.readline().strip().rpartition(" ")[2]
            assert torch.equal(load(spec)(shades(3, 4)).total, Compressibility()(shades(3, 4)).total)
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == "stopped after 2 samples\n"
            assert process.wait(10) == 0
        finally:
            process.kill()


COMPUTES = """
import time
import torch

def computes(samples):
    if samples[0].prompt.text:
        print("begun", flush=True)
        square, until = torch.ones(400, 400), time.monotonic() + 1
        while time.monotonic() < until:
            square @ square
    return [0.5 for _ in samples]
"""


def test_ctrl_c_lets_the_reward_end_what_it_computes(tmp_path: Path) -> None:
    """Torch aborts a process that ends while another of its threads computes."""
    (tmp_path / "reward.py").write_text(COMPUTES)
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from apps.cli import main; main()"
    command = [sys.executable, "-c", code, "reward", "serve", "reward.py:computes", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            reward = load(f"{process.stdout.readline().strip().rpartition(' ')[2]}?retries=0")
            client = threading.Thread(target=asked, args=(reward,))
            client.start()
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == "stopped after 1 sample\n"
            assert process.wait(60) == 0
        finally:
            process.kill()
    client.join()


def asked(reward: Reward) -> None:
    """The server may be gone before it has answered."""
    with suppress(UnreachableError):
        reward(shades(3))
