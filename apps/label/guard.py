"""The guard: every request passes here first, also those for Gradio's routes and for files.

It asks, in this order: is the host one of ours; is the path one that the pages need; who is it; does the request come
from our own pages; is it too large. It is plain ASGI, so that it sees every message and delays none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Iterable
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.label import headers, refusals
from apps.label.limits import Turns
from apps.label.sessions import Session, Sessions
from apps.label.settings import Settings, is_loopback

LARGEST_BODY = 2_000_000
LARGEST_FORM = 20_000
BODY_SECONDS = 30.0
SAFE = ("GET", "HEAD")
OPEN = {"/login", "/healthz", "/static/login.css", "/static/login.js", "/oidc/login", "/oidc/callback"}
"""What anybody may ask for; only those of them exist that are switched on."""
FORMS = ("/login", "/logout")
PAGES = ("/", "/rate", "/rate/", "/results")
# Of Gradio, the files that draw the frame; not its queue, uploads, file server, proxy, monitor and logins.
_GRADIO = re.compile(r"/rate(/|/theme\.css|/(assets|static)(/[\w.~-]+)+)?", re.ASCII)
_KNOWN = re.compile(r"/(api/[a-z]+|rate|static|login|logout|results|healthz|oidc/[a-z]+)?(?=/|$)")

log = logging.getLogger("diffalign.label")
access = logging.getLogger("diffalign.label.access")


class Refusal(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, reason: str, extra: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(reason)
        self.status, self.reason, self.extra = status, reason, dict(extra)


class Guard:
    """Around the whole app. ``sessions`` None: there are no accounts, and everybody is the rater of the settings."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        sessions: Sessions | None,
        valid: Callable[[Session], bool],
        write: Turns,
    ) -> None:
        self.app, self.settings, self.sessions, self.valid, self.write = app, settings, sessions, valid, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, request or life of the server."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, _unless_cancelled(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._request(scope, receive, _Response(scope, send, self.settings))

    async def _request(self, scope: Scope, receive: Receive, response: _Response) -> None:
        try:
            receive = await self._admit(scope, receive)
            await self.app(scope, receive, response)
        except Refusal as refusal:
            await response.refuse(refusal)
        except Exception:
            # Neither its text nor where it happened is for the client.
            log.exception("a request failed: %s %s", scope["method"], _public(scope["path"]))
            if response.started:
                raise
            await response.refuse(Refusal(500, "something went wrong on the server; its log says what"))
        finally:
            response.log()

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Lets a request in, with who it is in its state; or raises a Refusal."""
        found, path, method = Headers(scope=scope), scope["path"], scope["method"]
        host = found.get("host", "")
        # A page elsewhere can give its own name our address; it cannot give itself our name.
        if not self.settings.https and not is_loopback(re.sub(r":\d+$", "", host)):
            raise Refusal(403, "this server answers to localhost only")
        await self._identify(scope, found)
        if scope["state"]["user"] is None and path not in OPEN:
            raise self._who(scope)
        if method not in (*SAFE, "POST"):
            raise Refusal(405, "there is no such method here", [("allow", "GET, HEAD, POST")])
        if ".." in path or "\\" in path or not path.isprintable():
            raise Refusal(404, "there is no such page")
        if path.startswith("/rate") and not (method in SAFE and _GRADIO.fullmatch(path)):
            raise Refusal(404, "there is no such page")
        if path == "/results" and scope["state"]["role"] != "admin":
            raise Refusal(403, "only an admin sees the results")
        if method in SAFE:
            return receive
        _check_origin(found, "https" if self.settings.https else scope["scheme"], host, path)
        return await _limited(receive, found, LARGEST_FORM if path in FORMS else LARGEST_BODY)

    async def _identify(self, scope: Scope, found: Headers) -> None:
        """Puts name and role of who asks into the state; None for nobody."""
        state = scope.setdefault("state", {})
        state["user"], state["role"], state["secret"] = None, None, None
        if self.sessions is None:
            state["user"], state["role"] = self.settings.rater, "admin"
            return
        secret = cookie_parser(found.get("cookie", "")).get(self.settings.cookie)
        if not secret or len(secret) > 100:
            return
        session = self.sessions.known(secret) or await run_in_threadpool(self.sessions.find, secret)
        if session is None:
            return
        if not self.valid(session):
            await self.write(self.sessions.end, secret)
            return
        if self.sessions.stale(session) and not await self.write(self.sessions.extend, session):
            return
        state["user"], state["role"], state["secret"] = session.name, session.role, secret

    @staticmethod
    def _who(scope: Scope) -> Refusal:
        """For somebody who is not logged in: the way to the login from a page, a plain refusal elsewhere."""
        path, query = scope["path"], scope["query_string"].decode("latin-1")
        if path == "/logout":
            return Refusal(303, "please log in", [("location", "/login")])
        inner = path.startswith(("/api/", "/static/", "/rate/")) and path not in PAGES
        if scope["method"] not in SAFE or inner:
            return Refusal(401, "please log in")
        after = quote(path + (f"?{query}" if query else ""), safe="")
        to = f"/login?next={after}" if path in PAGES and path != "/" else "/login"
        return Refusal(303, "please log in", [("location", to)])


def _unless_cancelled(send: Send) -> Send:
    """For the life of the server: being stopped while it starts is no failure that anybody has to read about."""

    async def tell(message: Message) -> None:
        task = asyncio.current_task()
        if not (message["type"].endswith(".failed") and task is not None and task.cancelling()):
            await send(message)

    return tell


class _Response:
    """Sends a response, with the headers that every one of them has."""

    def __init__(self, scope: Scope, send: Send, settings: Settings) -> None:
        self.started = False
        self._scope, self._send, self._settings = scope, send, settings
        self._path: str = scope["path"]
        self._status, self._began = 0, time.perf_counter()
        self._page: bytearray | None = None
        self._start: Message | None = None
        if self._path in ("/rate", "/rate/"):
            # The policy of this page names the scripts in it, so it has to be read, and not be compressed.
            scope["headers"] = [(key, value) for key, value in scope["headers"] if key != b"accept-encoding"]
            self._page = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            if self._page is not None:
                self._start = message
                return
            await self._begin(message)
        elif self._page is not None and self._start is not None and message["type"] == "http.response.body":
            self._page += message.get("body", b"")
            if message.get("more_body", False):
                return
            await self._begin(self._start, headers.inline_scripts(bytes(self._page)))
            await self._send({"type": "http.response.body", "body": bytes(self._page)})
        else:
            await self._send(message)

    async def _begin(self, message: Message, inline: tuple[str, ...] = (), policy: str | None = None) -> None:
        self.started = True
        message.setdefault("headers", [])
        found = MutableHeaders(scope=message)
        for name, value in headers.for_path(self._path, self._settings.https, inline).items():
            found[name] = value
        if policy is not None:
            found["content-security-policy"] = policy
        # Of the parent's frame and the server Gradio would tell more than anybody needs.
        for name in ("server", "access-control-allow-origin", "access-control-allow-credentials"):
            if name in found:
                del found[name]
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """A refusal as JSON, to a browser as a page; as a redirection where it names a place to go to."""
        read = refusal.status != 303 and "text/html" in Headers(scope=self._scope).get("accept", "")
        body = b"" if refusal.status == 303 else json.dumps({"error": refusal.reason}).encode()
        if read:
            body = refusals.page(refusal.status, refusal.reason, self._scope.get("state", {}).get("user"))
        self._page, self._status = None, refusal.status
        kind = "text/html; charset=utf-8" if read else "application/json"
        fields = {"content-type": kind, "content-length": str(len(body)), **refusal.extra}
        raw = [(key.encode(), value.encode("latin-1")) for key, value in fields.items()]
        start = {"type": "http.response.start", "status": refusal.status, "headers": raw}
        await self._begin(start, policy=headers.REFUSED if read else None)
        await self._send({"type": "http.response.body", "body": b"" if self._scope["method"] == "HEAD" else body})

    def log(self) -> None:
        """One line: neither who, nor from where, nor which pair."""
        if self._settings.access_log:
            took = 1000 * (time.perf_counter() - self._began)
            access.info("%s %s %d %.0f ms", self._scope["method"][:8], _public(self._path), self._status, took)


def _public(path: str) -> str:
    """The kind of a path, without tokens."""
    found = _KNOWN.match(path)
    return (found[0] or "/") if found else "(other)"


def _check_origin(found: Headers, scheme: str, host: str, path: str) -> None:
    """Refuses what other sites make a browser send here."""
    origin, site = found.get("origin"), found.get("sec-fetch-site")
    ours = "x-diffalign" in found  # a page elsewhere cannot send it without asking, and is never allowed
    if origin == "null" and site == "same-origin":  # a form of a page that hides where it is
        origin = f"{scheme}://{host}"
    if site not in (None, "same-origin") or (origin is not None and origin.lower() != f"{scheme}://{host}".lower()):
        raise Refusal(403, "this request comes from another site")
    if origin is None and not ours:
        raise Refusal(403, "this request does not say where it comes from; send an Origin header")
    if path in FORMS:
        return
    if not ours:
        raise Refusal(403, "a request that changes something carries the header X-Diffalign: 1")
    if found.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(400, "a request that changes something carries JSON (Content-Type: application/json)")


async def _limited(receive: Receive, found: Headers, largest: int) -> Receive:
    """The body, read in whole; a Refusal for one that is too large or comes too slowly."""
    too_large = Refusal(413, f"this is too large; {largest} bytes are allowed", [("connection", "close")])
    length = found.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > largest:
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refusal(400, "the connection ended before the request did")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > largest:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, "the request took too long to arrive", [("connection", "close")]) from None
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return again
