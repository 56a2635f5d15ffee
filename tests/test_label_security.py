"""The guard in front of the labelling app, asked by a client that means no good; the server is a real process."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from apps.label.accounts import Accounts
from apps.label.server import create_app
from apps.label.settings import Settings
from diffalign.study import Study
from tests.label_server import HEADERS, ROOT, Server, image_pairs, made, password, serving, write_users

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get")
OPEN = {"/login", "/healthz", "/static/login.css", "/static/login.js"}
PEOPLE = {"ann": "rater", "bob": "rater", "jo": "adjudicator", "eve": "admin"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("security") / "study"
    made(folder, image_pairs(60), title="A study").close()
    with serving(folder, PEOPLE) as running:
        yield running


def paths(routes: list[Any], before: str = "") -> Iterator[str]:
    """Every path of an app, of what is mounted in it and of routers in it, with something for each parameter."""
    for route in routes:
        inside = getattr(route, "original_router", None)
        if inside is not None:
            yield from paths(inside.routes, before + route.include_context.prefix)
            continue
        path = before + re.sub(r"\{\w+(:path)?\}", lambda found: "a/b" if found[1] else "0" * 32, route.path)
        yield path
        if getattr(route, "routes", None):
            yield from paths(route.routes, path)
        if type(route).__name__ == "Mount":
            yield path + "/anything"


def all_paths(folder: Path) -> set[str]:
    study = made(folder / "study", image_pairs(1))
    app = create_app(study, Accounts.load(folder / "users.json"), Settings())
    study.close()
    return set(paths(app.routes)) | {f"/static/{file.name}" for file in (ROOT / "apps/label/static").iterdir()}


def raw(server: Server, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> int:
    """The status for a request whose path goes out as it stands: clients would tidy it up."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.putrequest(method, path, skip_accept_encoding=True, skip_host="Host" in (headers or {}))
    for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_nobody_gets_further_than_the_login(server: Server, tmp_path: Path) -> None:
    """Every route that the app itself knows, Gradio's and the files too, by every method, and some that it does not."""
    found = all_paths(tmp_path)
    for known in ("/api/vote", f"/api/image/{'0' * 32}/{'0' * 32}", "/results", "/static/label.js", "/rate/config",
                  "/rate/gradio_api/queue/join", "/rate/gradio_api/upload", "/rate/gradio_api/reset",
                  "/rate/assets/a/b", "/rate/static/a/b", "/rate/monitoring", "/rate/login"):  # fmt: skip
        assert known in found, f"the crawl should find {known}"
    assert len(found) > 50
    found |= {"/nothing", "/docs", "/openapi.json", "/oidc/login", "/oidc/callback", "/login/", "/healthz/", "//login"}
    found |= {"/static/../login", "/LOGIN", "/static/login.css/", "/rate?__theme=dark", "/favicon.ico"}
    wrong = []
    for path in sorted(found - OPEN - {"/oidc/login", "/oidc/callback"}):
        for method in METHODS:
            for headers in ({}, {**HEADERS, "Content-Type": "application/json", "Cookie": "diffalign=guess"}):
                status = raw(server, method, path, headers, b"{}" if method == "POST" else b"")
                if status not in (401, 303):
                    wrong.append((method, path, status))
    assert not wrong
    assert raw(server, "GET", "/oidc/login") == raw(server, "GET", "/oidc/callback") == 404  # not switched on


def test_what_is_open_says_nothing_of_the_study(server: Server) -> None:
    nobody = server.client()
    for path in sorted(OPEN):
        answer = nobody.get(path)
        assert answer.status_code == 200
        assert "A study" not in answer.text and str(server.folder) not in answer.text
        assert answer.headers["x-frame-options"] == "DENY"
    assert nobody.get("/healthz").text == "ok"
    for path in ("/rate", "/results"):
        assert nobody.get(path).headers["location"] == f"/login?next=%2F{path[1:]}"
    assert nobody.get("/api/turn").json() == {"error": "please log in"}


def test_gradios_own_back_end_is_closed_to_raters_too(server: Server, tmp_path: Path) -> None:
    """Of Gradio's routes only the page and its files: no queue, uploads, proxy, monitor, file server, logins."""
    client = server.client("ann")
    gradio = {path for path in all_paths(tmp_path) if path.startswith("/rate/")}
    needed = re.compile(r"/rate/(theme\.css|(assets|static)/.*)?")
    assert len(gradio) > 40
    for path in sorted(gradio):
        statuses = {client.request(method, path, json={}).status_code for method in ("GET", "POST", "PUT")}
        assert statuses <= {404, 405} or (needed.fullmatch(path) and statuses <= {200, 404, 405}), (path, statuses)
    page = client.get("/rate/")
    assert page.status_code == 200 and "gradio" in page.text


def test_headers_of_every_kind_of_answer(server: Server) -> None:
    nobody, ann, eve = server.client(), server.client("ann"), server.client("eve")
    answers = [
        nobody.get("/login"), nobody.get("/rate"), nobody.get("/api/turn"), nobody.get("/healthz"), ann.get("/rate/"),
        nobody.post("/login", data={"name": "x", "password": "y"}), ann.get("/api/study"), ann.get("/api/nothing"),
        ann.get("/static/label.js"), ann.get("/static/nothing"), ann.get("/results"), ann.put("/api/vote"),
        ann.post("/api/vote", json={"token": "x" * 3_000_000}), ann.get("/rate/theme.css"), eve.get("/results"),
        ann.post("/api/vote", content=b"{", headers={"Content-Type": "application/json"}), ann.get("/rate/config"),
    ]  # fmt: skip
    assert {answer.status_code for answer in answers} >= {200, 303, 400, 401, 403, 404, 405, 413}
    for answer in answers:
        found = answer.headers
        assert found["x-content-type-options"] == "nosniff"
        assert found["x-frame-options"] == "DENY"
        assert found["referrer-policy"] == "same-origin"
        assert found["cross-origin-opener-policy"] == "same-origin"
        assert "camera=()" in found["permissions-policy"]
        assert "server" not in found and "access-control-allow-origin" not in found
        policy = found["content-security-policy"]
        assert "frame-ancestors 'none'" in policy and "unsafe-eval" not in policy
        assert "http:" not in policy and "https:" not in policy and "*" not in policy
        scripts = re.search(r"script-src ([^;]*)", policy)
        assert scripts is None or "unsafe-inline" not in scripts[1]
        assert str(server.folder) not in answer.text and "Traceback" not in answer.text
        cached = answer.request.url.path.startswith(("/static/", "/rate/theme.css"))
        assert found["cache-control"] == ("private, no-cache" if cached else "no-store")
    inline = re.search(r"script-src 'self'((?: 'sha256-[\w+/=]{44}')+);", answers[4].headers["content-security-policy"])
    assert inline is not None and len(inline[1].split()) >= 2


def test_other_sites_cannot_act_in_a_raters_name(server: Server) -> None:
    """A logged-in browser that a strange page makes send things: no vote, no logout."""
    client = server.client("ann")
    del client.headers["X-Diffalign"]
    token = client.get("/api/turn").json()["now"]["token"]
    vote = json.dumps({"token": token, "choice": "left"}).encode()
    ours, js = server.url, "application/json"
    strange: list[dict[str, str]] = [
        {"Content-Type": js},
        {"Content-Type": js, "Origin": ours},
        {"Content-Type": js, "Origin": "http://evil.example", "X-Diffalign": "1"},
        {"Content-Type": js, "Origin": "null", "X-Diffalign": "1"},
        {"Content-Type": js, "Origin": ours + ".evil.example", "X-Diffalign": "1"},
        {"Content-Type": js, "Origin": ours.replace("http:", "https:"), "X-Diffalign": "1"},
        {"Content-Type": js, "Origin": "http://127.0.0.1:1", "X-Diffalign": "1"},
        {"Content-Type": js, "Sec-Fetch-Site": "cross-site", "X-Diffalign": "1"},
        {"Content-Type": js, "Sec-Fetch-Site": "same-site", "Origin": ours, "X-Diffalign": "1"},
        {"Content-Type": js, "Sec-Fetch-Site": "none", "X-Diffalign": "1"},
    ]
    for headers in strange:
        assert client.post("/api/vote", content=vote, headers=headers).status_code == 403, headers
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"):
        headers = {"Content-Type": kind, "Origin": ours, "X-Diffalign": "1"}
        assert client.post("/api/vote", content=vote, headers=headers).status_code == 400
    for path in ("/logout", "/login"):
        for headers in ({}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            assert client.post(path, data={"name": "bob"}, headers=headers).status_code == 403
    assert client.get("/api/turn").json()["progress"]["done"] == 0
    right = {"Content-Type": js, "Origin": ours, "Sec-Fetch-Site": "same-origin", "X-Diffalign": "1"}
    assert client.post("/api/vote", content=vote, headers=right).status_code == 200
    hidden = {"Origin": "null", "Sec-Fetch-Site": "same-origin"}  # a form of a page that hides where it is
    assert client.post("/logout", headers=hidden).status_code == 303
    assert client.get("/api/turn").status_code == 401


def test_a_name_of_ours_is_not_given_away(server: Server) -> None:
    """A page elsewhere that gives its name our address (DNS rebinding) is not answered."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.1"):
        assert raw(server, "GET", "/healthz", {"Host": host}) == 403
    port = urlsplit(server.url).port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", f"[::1]:{port}"):
        assert raw(server, "GET", "/healthz", {"Host": host}) == 200


def test_a_session_is_new_at_each_login_and_ends_with_the_logout(server: Server) -> None:
    """An id that somebody planted in the browser is not taken over; the one before is ended."""
    planted = "a" * 43
    client = server.client(None, cookies={"diffalign": planted})
    answer = client.post("/login", data={"name": "ann", "password": password("ann"), "next": "//evil.example"})
    assert answer.status_code == 303 and answer.headers["location"] == "/rate"
    cookie = answer.headers["set-cookie"]
    first = re.match(r"diffalign=([\w-]{43}); HttpOnly; Max-Age=43200; Path=/; SameSite=strict$", cookie)
    assert first is not None, cookie
    assert first[1] != planted

    def works(secret: str) -> bool:
        return httpx.get(f"{server.url}/api/study", cookies={"diffalign": secret}).status_code == 200

    assert works(first[1]) and not works(planted)
    again = httpx.post(
        f"{server.url}/login", data={"name": "bob", "password": password("bob")}, headers=HEADERS,
        cookies={"diffalign": first[1]},
    )  # fmt: skip
    second = again.cookies["diffalign"]
    assert second != first[1] and works(second) and not works(first[1])
    out = httpx.post(f"{server.url}/logout", headers=HEADERS, cookies={"diffalign": second})
    assert out.headers["location"] == "/login" and "Max-Age=0" in out.headers["set-cookie"]
    assert not works(second)
    for wrong in ("", "x" * 5000, "'; DROP TABLE session; --", "%00"):
        assert not works(wrong)


@contextmanager
def in_process(folder: Path) -> Iterator[Callable[[], httpx.AsyncClient]]:
    """Clients of an app in this process, which starts at once."""
    study = made(folder, image_pairs(9))
    write_users(folder / "users.json", PEOPLE)
    transport = httpx.ASGITransport(create_app(study, Accounts.load(folder / "users.json"), Settings()))
    yield lambda: httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=HEADERS)
    study.close()


async def login(client: httpx.AsyncClient, name: str, word: str | None = None) -> httpx.Response:
    return await client.post("/login", data={"name": name, "password": password(name) if word is None else word})


def test_passwords_cannot_be_guessed_quickly(tmp_path: Path) -> None:
    """Sixty guesses of one name at once: few are looked at, then each has to wait; the right one, too.

    Five are free; two are looked at at a time, so that a sixth may have begun when the fifth is known to be wrong; each
    second that passes may let in another.
    """

    async def guess(new: Callable[[], httpx.AsyncClient]) -> None:
        start = time.monotonic()
        answers = await asyncio.gather(*(login(new(), "ann", f"guess {number}") for number in range(60)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {401, 429}
        assert 5 <= statuses.count(401) <= 6 + (time.monotonic() - start)
        assert all(1 <= int(a.headers["retry-after"]) <= 60 for a in answers if a.status_code == 429)
        assert "wait" in answers[statuses.index(429)].text
        right = await login(new(), "ann")
        assert right.status_code == 429 and "set-cookie" not in right.headers
        assert (await login(new(), "bob")).status_code == 303  # others are let in
        many = await asyncio.gather(*(login(new(), f"name {number}", "whatever") for number in range(40)))
        assert [answer.status_code for answer in many].count(429) >= 20  # until the address has failed too often
        assert (await login(new(), "bob")).status_code == 429

    with in_process(tmp_path / "study") as new:
        asyncio.run(guess(new))


def test_the_spellings_of_a_name_are_one_name_for_the_throttle(tmp_path: Path) -> None:
    """Five free guesses for a name: composed, decomposed and with spaces around it, it is the same one."""

    async def guess(new: Callable[[], httpx.AsyncClient]) -> None:
        spellings = ["Zo\u00eb", "Zoe\u0308", " Zo\u00eb", "Zoe\u0308 "]
        answers = [await login(new(), spellings[number % 4], f"guess {number}") for number in range(6)]
        assert [answer.status_code for answer in answers] == [401] * 5 + [429]

    with in_process(tmp_path / "study") as new:
        asyncio.run(guess(new))


def test_roles(server: Server) -> None:
    """A rater rates; an adjudicator also decides disputes; an admin also sees the results."""
    for name, disputed, results in (("ann", 403, 403), ("jo", 200, 403), ("eve", 200, 200)):
        client = server.client(name)
        assert client.get("/api/turn", params={"queue": "disputed"}).status_code == disputed
        assert client.get("/results").status_code == results
        about = client.get("/api/study").json()
        assert about["rater"] == {"name": name, "role": PEOPLE[name]}
        assert ("disputed" in about["queues"]) == (disputed == 200)
        token = client.get("/api/turn").json()["now"]["token"]
        sent: list[tuple[str, dict[str, object]]] = [
            ("vote", {"token": token, "choice": "left"}), ("undo", {}), ("skip", {"token": token}),
            ("flag", {"token": token, "reason": "x"}),
        ]  # fmt: skip
        if disputed == 403:
            for route, body in sent:
                answer = client.post(f"/api/{route}", params={"queue": "disputed"}, json=body)
                assert answer.status_code == 403, route
    assert client.get("/api/turn", params={"queue": "everything"}).status_code == 400


def test_an_account_that_changes_ends_its_sessions(tmp_path: Path) -> None:
    """Another password, another role, or no account at all; the other accounts stay logged in.

    A file that others could write lets nobody in, and its name stays among us.
    """
    users = tmp_path / "study" / "users.json"

    async def change(new: Callable[[], httpx.AsyncClient]) -> None:
        clients = {name: new() for name in PEOPLE}
        assert {(await login(client, name)).status_code for name, client in clients.items()} == {303}
        assert {(await client.get("/api/turn")).status_code for client in clients.values()} == {200}
        accounts = Accounts.load(users)
        accounts.add("ann", "rater", "another password")
        accounts.remove("bob")
        accounts.add("jo", "rater", password("jo"))
        accounts.save()
        found = {name: (await client.get("/api/turn")).status_code for name, client in clients.items()}
        assert found == {"ann": 401, "bob": 401, "jo": 401, "eve": 200}
        write_users(users, PEOPLE)
        assert (await clients["ann"].get("/api/turn")).status_code == 401  # what has ended stays so
        assert (await login(clients["ann"], "ann")).status_code == 303
        users.chmod(0o666)
        for answer in (await login(new(), "ann"), await clients["ann"].get("/api/turn")):
            assert answer.status_code == 500
            assert answer.json() == {"error": "something went wrong on the server; its log says what"}

    with in_process(tmp_path / "study") as new:
        asyncio.run(change(new))


def test_no_file_but_ours_is_served(server: Server) -> None:
    """Up and away, plain and encoded, once and twice, on every route that serves files."""
    cookie = {"Cookie": f"diffalign={server.client('ann').cookies['diffalign']}"}
    up = ("..", "%2e%2e", "%252e%252e", "..%2f..", "..%5c..", "..\\..", "%2e%2e%2f%2e%2e", "....//", "..;", ".%00.")
    targets = ("etc/passwd", "study.sqlite", "users.json", "server.py", "apps/label/server.py", "config")
    wrong = []
    served = ("static", "rate/static", "rate/assets", "rate/svelte", "rate/gradio_api/file=", "api/image")
    for base in (f"/{path}/" for path in served):
        places = [f"{base}{'/'.join([step] * n)}/{target}" for step in up for n in (1, 4, 9) for target in targets]
        places += [f"{base}{before}etc/passwd" for before in ("/", "//", "%2f", "file:///", "C:\\", "~/", "%00/")]
        for path in places:
            status = raw(server, "GET", path.replace("\\", "%5c"), cookie)
            if status not in (400, 404):
                wrong.append((path, status))
    assert not wrong
    assert raw(server, "GET", "/static/label.js", cookie) == 200


def test_links_out_of_the_static_files_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process of the test, with a copy of the folder in which links were put."""
    from starlette.testclient import TestClient

    from apps.label import server as module

    static = tmp_path / "static"
    static.mkdir()
    (tmp_path / "secret").write_text("secret")
    (static / "fine.css").write_text("fine")
    (static / "file.css").symlink_to(tmp_path / "secret")
    (static / "folder").symlink_to(tmp_path)
    monkeypatch.setattr(module, "STATIC", static)
    study = made(tmp_path / "study", image_pairs(1))
    client = TestClient(module.create_app(study, None, Settings()), base_url="http://localhost")
    assert client.get("/static/fine.css").text == "fine"
    for path in ("/static/file.css", "/static/folder/secret", "/static/folder"):
        assert client.get(path).status_code == 404
    study.close()


def test_bodies_are_limited(server: Server) -> None:
    """By their declared length, and by what comes; JSON that is no JSON, or too deep, is refused in a sentence."""
    client = server.client("ann")
    kind = {"Content-Type": "application/json"}

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 100_000

    for content in (b"x" * 2_000_001, pieces()):
        try:
            answer = client.post("/api/vote", content=content, headers=kind)
        except httpx.WriteError:
            continue  # the server has answered and hung up before all was sent
        assert answer.status_code == 413 and "too large" in answer.json()["error"]
    assert client.post("/login", data={"name": "ann", "password": "x" * 30_000}).status_code == 413
    for content in (b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"token":' + b"[" * 100_000, b'{"token": NaN}', b'"x"'):
        answer = client.post("/api/vote", content=content, headers=kind)
        assert answer.status_code == 400 and set(answer.json()) == {"error"}, content[:20]
    for declared in ("-1", "1e3", "99999999999999999999999"):
        cookie = f"diffalign={client.cookies['diffalign']}"
        sent = f"POST /api/vote HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\nX-Diffalign: 1\r\n"
        sent += f"Content-Type: application/json\r\nContent-Length: {declared}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0)) as connection:
            connection.sendall(sent.encode())
            assert connection.recv(100).split()[1] in (b"400", b"413")


@pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="Chromium is not installed")
def test_the_login_in_a_browser(server: Server) -> None:
    """Without JavaScript; a wrong password; then by a link from another site, which brings no cookie along.

    The page obeys its policy: the browser reports no violation of it, nor any request to another place but that site.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        plain = browser.new_context(java_script_enabled=False).new_page()
        plain.goto(f"{server.url}/results")
        for word, ends in (("a wrong one", "/login"), (password("eve"), "/results")):
            plain.fill("#name", "eve")
            plain.fill("#password", word)
            plain.click("button")
            plain.wait_for_url(f"{server.url}{ends}*")
            assert (plain.locator("[role=alert]").count() == 1) == (ends == "/login")

        context = browser.new_context()
        page, said, asked = context.new_page(), list[str](), set[str]()
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
        page.goto(f"{server.url}/login")
        page.fill("#name", "ann")
        page.fill("#password", password("ann"))
        page.click("button")
        page.wait_for_url(f"{server.url}/rate/")
        (cookie,) = context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
        other = server.url.replace("127.0.0.1", "localhost")  # another site, as browsers see it
        page.goto(f"{other}/login")
        page.evaluate("to => { location.href = to }", f"{server.url}/rate?queue=pairs")
        page.wait_for_url(re.compile(r"/rate/\?queue=pairs$"))
        page.wait_for_selector("gradio-app main", state="attached")
        assert asked == {urlsplit(server.url).netloc, urlsplit(other).netloc}
        assert not [text for text in said if "Content Security Policy" in text]
        # What somebody would slip in does not run, and would be reported.
        page.evaluate(
            "() => { const it = document.createElement('script'); it.textContent = 'window.ran = 1';"
            " document.head.append(it); document.body.insertAdjacentHTML('beforeend',"
            " '<img src=x onerror=\"window.ran = 2\">'); }"
        )
        page.wait_for_timeout(300)
        assert page.evaluate("window.ran") is None
        assert [text for text in said if "Content Security Policy" in text]
        browser.close()


def test_the_database_of_the_study_is_intact_after_all_that(server: Server) -> None:
    study = Study.open(server.folder)
    assert all(finding.ok for finding in study.inspect())
    study.close()
