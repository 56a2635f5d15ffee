"""A real server of the labelling app for tests: a process of its own on a free port.

::

    with serving(study.folder, {"ann": "rater", "eve": "admin"}) as server:
        client = server.client("ann")            # an httpx.Client that is logged in
        turn = client.get("/api/turn").json()
        client.post("/api/vote", json={"token": turn["now"]["token"], "choice": "left"})
        server.kill()                            # SIGKILL; server.start() starts it again on the same port
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from diffalign.study import Protocol, Study, StudyPair
from diffalign.types import Prompt, Sample

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 90
HEADERS = {"X-Diffalign": "1"}
# The JSON interface without the page, for tests that do not look at it: it starts in a third of the time.
_NO_PAGE = "import sys, types; sys.modules['apps.label.page'] = types.SimpleNamespace(mount=lambda app: app); "
RUN = "import sys, json; from apps.label.serve import run; run(*json.loads(sys.argv[1]), **json.loads(sys.argv[2]))"
LEAN = _NO_PAGE + RUN


def password(name: str) -> str:
    """The password of a test account."""
    return f"the password of {name}"


@cache
def _cheap_hash(text: str) -> str:
    """The costs are in the hash, so that tests with fifty accounts do not wait for them."""
    from argon2 import PasswordHasher

    return PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(text)


def write_users(path: Path, accounts: Mapping[str, str]) -> None:
    """A file of accounts, by name and role."""
    import json

    users = {name: {"role": role, "password": _cheap_hash(password(name))} for name, role in accounts.items()}
    path.write_text(json.dumps({"version": 1, "users": users}), encoding="utf-8")
    path.chmod(0o600)


def text_pairs(count: int) -> Iterator[StudyPair]:
    """Pairs of texts, the quickest material."""
    for i in range(count):
        asked = Prompt(f"prompt {i}")
        yield StudyPair(asked, Sample(asked, text=f"one {i}"), Sample(asked, text=f"two {i}"), "base", "tuned")


def image_pairs(count: int, size: int = 64) -> Iterator[StudyPair]:
    """Pairs of images of noise, so that they cannot be compressed."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    for i in range(count):
        asked = Prompt(f"picture {i}")
        one, two = (Image.fromarray(chance.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in "ab")
        yield StudyPair(asked, Sample(asked, image=one), Sample(asked, image=two), "base", "tuned")


def quick_protocol(**fields: object) -> Protocol:
    """One without a least time of looking."""
    lines = {"name": "test", "version": 1, "min_view_seconds": 0, **fields}
    return Protocol.parse("".join(f"{name}: {value}\n" for name, value in lines.items()))


def made(folder: Path, pairs: Iterator[StudyPair], protocol: Protocol | None = None, **options: Any) -> Study:
    """A new study."""
    return Study.create(folder, protocol or quick_protocol(), pairs, **options)


class Server:
    """A server process; ``url`` once it has started."""

    def __init__(self, folder: Path, options: Mapping[str, Any], code: str, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.url = ""
        self.output: list[str] = []
        self._port = 0
        self._options, self._code = dict(options), code
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}

    def start(self) -> None:
        """Starts it, on the port that it had before if it had one, and waits until it serves."""
        import json

        options = {"port": self._port, **self._options}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._code, json.dumps([str(self.folder)]), json.dumps(options)],
            cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self._lines), daemon=True).start()
        while not (found := re.search(r"https?://\S+:(\d+)/", self._line())):
            pass
        self.url, self._port = found[0].rstrip("/"), int(found[1])
        httpx.get(f"{self.url}/healthz", timeout=START_SECONDS).raise_for_status()

    def _read(self, process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.output.append(line)
            lines.put(line)
        lines.put("")

    def _line(self) -> str:
        line = self._lines.get(timeout=START_SECONDS)
        if not line:
            raise RuntimeError("the server did not start:\n" + "".join(self.output))
        return line

    def client(self, name: str | None = None, **options: Any) -> httpx.Client:
        """A client that is logged in under that name; without one, a client that is nobody."""
        client = httpx.Client(base_url=self.url, headers=HEADERS, timeout=60, trust_env=False, **options)
        if name is not None:
            answer = client.post("/login", data={"name": name, "password": password(name)})
            assert answer.status_code == 303, (answer.status_code, answer.text)
        return client

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ctrl-C; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)


@contextmanager
def serving(
    folder: Path,
    accounts: Mapping[str, str] | None = None,
    code: str = RUN,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """A server of the study in the folder; without accounts it runs with ``no_auth``. Options go to ``serve.run``."""
    if accounts is None:
        options.setdefault("no_auth", True)
    else:
        write_users(folder / "users.json", accounts)
    server = Server(folder, options, code, environment or {})
    try:
        server.start()
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
