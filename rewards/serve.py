"""Serves any reward over HTTP, for ``rewards.remote``: ``diffalign reward serve SPEC``."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import select
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

import torch
from PIL import Image

from diffalign.errors import ConfigError, InputError, UserError
from diffalign.types import Prompt, Reward, Sample
from rewards import wire

log = logging.getLogger(__name__)

_WAITING = 16
"""Requests that may wait for the reward at once; a further one is told to come again."""
_IDLE = 60.0
"""Seconds without a byte after which a connection is closed."""
_GRACE = 10.0
"""Seconds that a server which ends leaves to its reward: torch aborts a process that ends while another of its threads
computes."""


class Server(ThreadingHTTPServer):
    """Holds one reward, which is asked by one request at a time."""

    daemon_threads = True

    def __init__(self, reward: Reward, host: str = "127.0.0.1", port: int = 0, token: str = "") -> None:
        """``port`` 0 takes a free one. ``token``, where there is one, has to come with every request."""
        self.reward, self.token = reward, token
        self.lock = threading.Lock()
        self.places = threading.BoundedSemaphore(_WAITING)
        self.ending = threading.Event()
        self.scored = 0
        self.about = wire.about(reward)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None

    def server_bind(self) -> None:
        """Binds without asking a name server for our own name, as the base class does, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where a client finds it. A server that listens everywhere goes by the name of its machine."""
        host = str(self.server_address[0])
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    def score(self, samples: list[Sample]) -> dict[str, object]:
        """The answer to a request; the lock is held by the caller."""
        with torch.no_grad():
            scores = self.reward(samples)
        columns = {"total": scores.total, **{f"part {name!r}": part for name, part in scores.parts.items()}}
        for name, column in columns.items():
            if column.shape != (len(samples),):
                raise ValueError(f"its {name} has shape {tuple(column.shape)} for {len(samples)} samples")
        self.scored += len(samples)
        return {
            "name": self.reward.name,
            "total": wire.numbers(scores.total),
            "parts": {name: wire.numbers(part) for name, part in scores.parts.items()},
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's affair, not worth a traceback."""
        log.debug("a connection broke", exc_info=True)


class _RefusedRequestError(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "diffalign"
    sys_version = ""
    timeout = _IDLE
    server: Server

    def do_GET(self) -> None:
        """Says what the reward is."""
        self._answer(self._about)

    def do_POST(self) -> None:
        """Scores samples."""
        self._answer(self._score)

    def _about(self) -> dict[str, object]:
        self._expect(wire.ABOUT)
        return self.server.about

    def _score(self) -> dict[str, object]:
        self._expect(wire.SCORE)
        if not self.server.places.acquire(blocking=False):
            raise _RefusedRequestError(503, f"{_WAITING} requests are waiting already")
        try:
            found = wire.read(self._body())
            wire.check_version(found)
            samples = wire.unpack(found.get("samples"))
            with self.server.lock:
                if self.server.ending.is_set():
                    raise _RefusedRequestError(503, "the server is ending")
                if self._gone():
                    raise ConnectionAbortedError("the client went away while it waited")
                return self.server.score(samples)
        finally:
            self.server.places.release()

    def _answer(self, make: Callable[[], dict[str, object]]) -> None:
        try:
            status, content = 200, make()
        except _RefusedRequestError as error:
            status, content = error.status, {"error": str(error)}
        except ConnectionError:
            self.close_connection = True
            return
        except InputError as error:
            status, content = 400, {"error": str(error)}
        except UserError as error:
            status, content = 422, {"error": str(error)}
        except Exception as error:
            log.exception("the reward failed")
            status, content = 500, {"error": f"the reward failed: {type(error).__name__}: {error}"}
        self._send(status, content)

    def _expect(self, path: str) -> None:
        given = self.headers.get("Authorization", "")
        wanted = f"Bearer {self.server.token}"
        if self.server.token and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise _RefusedRequestError(401, "this server asks for a token: write ?token_env=VARIABLE after its address")
        known = {wire.ABOUT: "GET", wire.SCORE: "POST"}
        if self.path not in known:
            raise _RefusedRequestError(404, f"there is nothing at {self.path[:100]}; there are {', '.join(known)}")
        if self.path != path:
            raise _RefusedRequestError(405, f"{self.path} is for {known[self.path]}")

    def _body(self) -> bytes:
        # A web page may send anything but this type to a server on this machine without asking.
        if self.headers.get_content_type() != "application/json":
            raise _RefusedRequestError(415, "the body is application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise _RefusedRequestError(411, "a request says its Content-Length")
        if len(length) > 12 or int(length) > wire.MAX_BYTES:
            raise _RefusedRequestError(413, f"a request has up to {wire.MAX_BYTES} bytes; send fewer samples at once")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("the body ended early")
        return body

    def _gone(self) -> bool:
        """Whether the client has closed its end, as one does that got no answer in time."""
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        return not self.connection.recv(1, socket.MSG_PEEK)

    def _send(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps({"protocol": wire.PROTOCOL, **content}, allow_nan=False).encode()
        # After an error the body may lie unread, and would be taken for the next request.
        self.close_connection = self.close_connection or status != 200
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request is told as JSON, too."""
        self._send(code, {"error": message or explain or "a bad request"})

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line each."""
        log.debug(format, *args)


def run(
    spec: str,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str = "",
    *,
    without_token: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serves the reward of that name until Ctrl-C, which is how it is meant to end: it returns then."""
    from rewards.registry import load

    if token and without_token:
        raise ConfigError("give --token or --without-token, not both")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError("a token is of ASCII letters, digits and signs, without spaces")
    if not (_only_here(host) or token or without_token):
        raise ConfigError(
            f"--host {host} can be reached from other machines: give a --token, which clients then need, or say"
            " --without-token"
        )
    reward = load(spec)
    _warm_up(reward)
    with Server(reward, host, port, token) as server:
        say(f"{reward.name} ({reward.modality}, in {reward.unit}) is served at {server.url}; Ctrl-C ends it")
        variable = "?token_env=DIFFALIGN_REWARD_TOKEN" if token else ""
        say(f"use it as the reward {server.url}{variable}")
        if variable:
            say("with the token in the environment variable DIFFALIGN_REWARD_TOKEN there")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.ending.set()
            server.lock.acquire(timeout=_GRACE)
            say(f"stopped after {server.scored} sample{'' if server.scored == 1 else 's'}")


def _only_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _warm_up(reward: Reward) -> None:
    """Loads what is loaded at first use, so that the first client need not wait for it, and what lacks is told now."""
    image = Image.new("RGB", (64, 64), "gray") if reward.modality == "image" else None
    try:
        reward([Sample(Prompt(""), image, None if image else "")])
    except InputError:
        log.debug("the reward cannot judge the sample that it was tried on", exc_info=True)
