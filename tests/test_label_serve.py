"""Starting and running the server: what it refuses, what it leaves behind, what it tells, how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from apps.label import environment
from apps.label.serve import run
from diffalign.errors import UserError
from diffalign.study import Study
from tests.label_server import (
    LEAN,
    ROOT,
    RUN,
    Server,
    image_pairs,
    made,
    password,
    quick_protocol,
    serving,
    text_pairs,
)

PEOPLE = {"ann": "rater", "eve": "admin"}

NOISY = """
import json, os, socket, sys
seen = open(os.environ["SEEN"], "a")
def loopback(address):
    return not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
class Watched(socket.socket):
    def connect(self, address):
        if not loopback(address):
            print("connect", address, file=seen, flush=True)
        return super().connect(address)
    def connect_ex(self, address):
        if not loopback(address):
            print("connect", address, file=seen, flush=True)
        return super().connect_ex(address)
    def sendto(self, *given):
        print("sendto", given[-1], file=seen, flush=True)
        return super().sendto(*given)
socket.socket = Watched
asked = socket.getaddrinfo
def getaddrinfo(host, *rest, **options):
    if host not in ("127.0.0.1", "::1", "localhost"):
        print("getaddrinfo", host, file=seen, flush=True)
    return asked(host, *rest, **options)
socket.getaddrinfo = getaddrinfo
"""


def session(server: Server) -> None:
    """What a rater does, from the login to the end, and the page besides."""
    client = server.client("ann")
    for path in ("/rate/", "/static/label.js", "/rate/theme.css", "/api/study"):
        assert client.get(path).status_code == 200
    turn = client.get("/api/turn").json()
    for number in range(12):
        now = turn["now"]
        if now is None:
            break
        for side in ("left", "right"):
            assert client.get(f"/api/image/{now['token']}/{side}").headers["content-type"] == "image/png"
        token = {"token": now["token"]}
        route, body = [
            ("vote", {**token, "choice": "left", "comment": "a patient's name"}), ("skip", token), ("undo", {}),
            ("flag", {**token, "reason": "a patient's name"}),
        ][0 if number % 5 else number // 5 + 1]  # fmt: skip
        answer = client.post(f"/api/{route}", json=body)
        assert answer.status_code == (409 if (route, number) == ("undo", 0) else 200), answer.text
        turn = answer.json()
    server.client("eve").get("/results")
    client.post("/logout")


def test_nothing_leaves_and_nothing_is_left_behind(tmp_path: Path) -> None:
    """A whole session under all switches of Gradio and FastAPI: no connection to elsewhere, no file in passing."""
    folder, temporary = tmp_path / "study", tmp_path / "tmp"
    temporary.mkdir()
    made(folder, image_pairs(8)).close()
    seen = tmp_path / "seen"
    environment = {
        "SEEN": str(seen), "TMPDIR": str(temporary), "HOME": str(temporary),
        "GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_MCP_SERVER": "True", "GRADIO_VIBE_MODE": "1",
        "GRADIO_SSR_MODE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "True",
        "GRADIO_TEMP_DIR": str(temporary / "gradio"), "GRADIO_RUN_HISTORY": "True", "SPACE_ID": "a/b",
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://192.0.2.1:4318",
    }  # fmt: skip
    with serving(folder, PEOPLE, code=NOISY + RUN, environment=environment) as server:
        said = "".join(server.output)
        for name in environment:
            assert (name in said) == name.startswith(("GRADIO_", "SPACE_", "FASTAPI_", "OTEL_")), name
        session(server)
        page = server.client("ann").get("/rate/").text
        found = re.search(r"window\.gradio_config = (\{.*?\});</script>", page)
        assert found is not None
        config = json.loads(found[1])
        off = ("vibe_mode", "run_history", "mcp_server", "analytics_enabled", "pwa", "dev_mode")
        assert not any(config[switch] for switch in off) and config["space_id"] is None
        assert listening(server) == {("127.0.0.1", urlsplit(server.url).port)}
        assert server.stop() == 0
    assert seen.read_text() == ""
    assert list(temporary.glob("diffalign*")) == [], "what Gradio makes goes with the server"
    assert [path for path in temporary.rglob("*") if path.is_file()] == []
    assert not (folder / "tmp").exists()
    left = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert left <= {"study.json", "study.sqlite", "study.sqlite-wal", "study.sqlite-shm", "files", "users.json"}
    # A connection that is made on purpose would have been seen.
    prove = NOISY + "socket.socket().connect_ex(('192.0.2.1', 9)); socket.create_connection(('name.invalid', 9))"
    environment["SEEN"] = str(tmp_path / "proof")
    subprocess.run([sys.executable, "-c", prove], env={**os.environ, **environment}, capture_output=True, check=False)
    assert "connect ('192.0.2.1', 9)" in (tmp_path / "proof").read_text()
    assert "getaddrinfo name.invalid" in (tmp_path / "proof").read_text()


def listening(server: Server) -> set[tuple[str, int]]:
    """The addresses on which the process and its children listen."""
    import psutil

    process = psutil.Process(server.process.pid)
    found = [one for each in (process, *process.children(True)) for one in each.net_connections("inet")]
    return {(one.laddr.ip, one.laddr.port) for one in found if one.status == "LISTEN"}


REFUSALS = [
    ({"no_auth": True, "host": "0.0.0.0"}, "--host 127.0.0.1 alone"),
    ({"no_auth": True, "host": "192.0.2.7"}, "--host 127.0.0.1 alone"),
    ({"no_auth": True, "https": True}, "neither with --https"),
    ({"host": "0.0.0.0"}, "reverse proxy"),
    ({"https": True}, "give its address by --proxy"),
    ({"host": "::"}, "reverse proxy"),
    ({"hours": [0, 1]}, "positive hours"),
    ({}, "has no accounts"),
    ({"no_auth": True, "host": "127.0.0.1", "port": -1}, "listen on"),
    ({"no_auth": True, "database": "postgresql://x@/x"}, "open it without a URL"),
    ({"oidc": "nowhere.yaml"}, "cannot read nowhere.yaml"),
]


@pytest.mark.parametrize(("options", "says"), REFUSALS)
def test_a_server_that_would_be_unsafe_does_not_start(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    made(tmp_path / "study", image_pairs(1)).close()
    with pytest.raises(UserError, match=re.escape(says)):
        run(tmp_path / "study", **{"port": 0, **options})


def test_without_accounts_only_this_machine_and_a_log_without_names(tmp_path: Path) -> None:
    """One rater; only localhost by name and address; our own pages alone. The log has neither names nor tokens."""
    folder = tmp_path / "study"
    made(folder, image_pairs(5)).close()
    with serving(folder, code=LEAN, access_log=True) as server:
        client = server.client()
        token = client.get("/api/turn").json()["now"]["token"]
        assert client.get("/api/study").json()["rater"] == {"name": "rater", "role": "admin"}
        assert client.get("/api/turn", headers={"Host": "evil.example"}).status_code == 403
        vote = {"token": token, "choice": "left", "comment": "private words"}
        foreign = {"Origin": "http://evil.example"}
        assert client.post("/api/vote", json=vote, headers=foreign).status_code == 403
        assert client.get(f"/api/image/{token}/left").status_code == 200
        assert client.post("/api/vote", json=vote).status_code == 200
        assert client.get("/login").status_code == 404
        client.get("/private/words?password=private")
        port = urlsplit(server.url).port
        assert port is not None
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken"):
            run(folder, port=port, no_auth=True)
        assert server.stop() == 0
        said = "".join(server.output)
    assert re.search(r"INFO GET /api/image 200 \d+ ms\n", said) and re.search(r"INFO POST /api/vote 403 \d+ ms", said)
    assert "INFO GET (other) 404" in said and said.endswith("stopped\n")
    for private in (token, "private", "Traceback"):
        assert private not in said


def test_behind_a_proxy_with_https(tmp_path: Path) -> None:
    """The cookie is for https alone, the origin is an https one, and only the named proxy says who the client is."""
    folder = tmp_path / "study"
    made(folder, image_pairs(3)).close()
    with serving(folder, PEOPLE, code=LEAN, https=True, proxy="127.0.0.1") as server:
        origin = {"Host": "label.example.org", "Origin": "https://label.example.org"}
        login = {"name": "ann", "password": password("ann")}
        answer = httpx.post(f"{server.url}/login", data=login, headers=origin)
        assert answer.status_code == 303
        assert re.match(r"__Host-diffalign=[\w-]{43}; HttpOnly; .*Path=/; .*Secure", answer.headers["set-cookie"])
        assert answer.headers["strict-transport-security"].startswith("max-age=")
        wrong = {**origin, "Origin": "http://label.example.org"}
        assert httpx.post(f"{server.url}/login", data=login, headers=wrong).status_code == 403
        statuses = []
        for number in range(45):  # two clients behind the proxy: the first is slowed down, the second is not
            address = "198.51.100.1" if number < 44 else "198.51.100.2"
            guess = {"name": f"n{number}", "password": "whatever it is"}
            headers = {**origin, "X-Forwarded-For": f"203.0.113.9, {address}"}
            statuses.append(httpx.post(f"{server.url}/login", data=guess, headers=headers).status_code)
        assert statuses[:20] == [401] * 20 and 429 in statuses[20:44] and statuses[44] == 401


# --- starting and stopping ---

INTERRUPTED = (
    "import asyncio, os, signal, uvicorn\n"
    "real = uvicorn.Server.{method}\n"
    "{kind} early(self, *given, **options):\n"
    "    os.kill(os.getpid(), signal.{name})\n"
    "    return {wait}real(self, *given, **options)\n"
    "uvicorn.Server.{method} = early\n"
)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("method", "kind"), [("run", "def"), ("serve", "async def"), ("startup", "async def")])
def test_an_end_while_it_starts_is_a_quiet_one(tmp_path: Path, method: str, kind: str, name: str) -> None:
    """Before asyncio runs, before uvicorn takes the signals, and while the app starts: no traceback, status 0."""
    made(tmp_path / "s", text_pairs(1)).close()
    code = INTERRUPTED.format(method=method, kind=kind, name=name, wait="await " if "async" in kind else "")
    words = [sys.executable, "-c", code + LEAN, json.dumps([str(tmp_path / "s")]), '{"no_auth": true, "port": 0}']
    around = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=around, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1] == "stopped"


def test_the_environment_is_as_it_was_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in this process that ends at once: switches that it took away are back, and its own are gone."""
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with environment.quieted() as removed:
        assert removed == ["GRADIO_SHARE"] and "GRADIO_SHARE" not in os.environ
        assert Path(os.environ["GRADIO_TEMP_DIR"]).is_dir()
    assert dict(os.environ) == before
    with pytest.raises(UserError):
        run(tmp_path / "nothing", no_auth=True, port=0)
    assert dict(os.environ) == before and signal.getsignal(signal.SIGTERM) is handler


def test_two_servers_may_serve_one_study_at_once(tmp_path: Path) -> None:
    """SQLite: four raters at two servers, all at once. Each pair gets its two votes, and everything is in order."""
    folder = tmp_path / "s"
    made(folder, text_pairs(12), quick_protocol(overlap=2)).close()
    people = dict.fromkeys("abcd", "rater")
    with serving(folder, people, code=LEAN) as one, serving(folder, people, code=LEAN) as two:

        def work(name: str) -> int:
            client, votes = (one if name in "ab" else two).client(name), 0
            turn = client.get("/api/turn").json()
            while turn["now"] is not None:
                answer = client.post("/api/vote", json={"token": turn["now"]["token"], "choice": "left"})
                assert answer.status_code == 200, answer.text
                turn, votes = answer.json(), votes + 1
            return votes

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, people)) == 24
    study = Study.open(folder)
    assert [finding for finding in study.inspect() if not finding.ok] == []
    assert study.stats().complete == 12
    study.close()
