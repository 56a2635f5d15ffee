"""Asking a server over HTTP, with patience: what a remote reward and a judge have in common.

Nothing is sent that could run, no proxy is used and no redirect followed.
"""

from __future__ import annotations

import http.client
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from diffalign.errors import ConfigError, InputError, RefusedError
from rewards import wire

log = logging.getLogger(__name__)

RETRIED = {429: "too many requests", 502: "bad gateway", 503: "busy", 504: "gateway timeout"}
"""Answers of a server that is there and will do better later. Any other error would be the same next time."""
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0


class UnreachableError(RefusedError):
    """A server did not answer for as long as one was ready to wait."""


class _TryAgainError(Exception):
    """What may be gone the next time."""


class Line:
    """The way to one server, which is called ``what`` in messages.

    Where the server is down, busy or slow a request is sent again, with pauses that double from 0.5 to 30 s, until
    ``patience`` seconds or ``retries`` are spent; then UnreachableError is raised, and ``remedy`` says what to do.
    ``hurry`` says what may help where an answer took longer than ``timeout``.
    """

    def __init__(
        self,
        url: str,
        *,
        what: str,
        remedy: str,
        hurry: str,
        timeout: float,
        retries: int,
        patience: float,
        token_env: str,
    ) -> None:
        """``timeout`` is in seconds for a whole request and its answer, ``patience`` for all tries of one request.

        ``token_env`` is the environment variable that holds the token which the server asks for.
        """
        for name, value, least in (("timeout", timeout, 0), ("patience", patience, -1)):
            if not (math.isfinite(value) and value > least):
                raise ConfigError(f"{url}: {name} is {value:g}; it is a number of seconds above {max(least, 0)}")
        if retries < 0:
            raise ConfigError(f"{url}: retries is {retries}; it is at least 0")
        self.url, self.patience = url.rstrip("/"), patience
        self._what, self._remedy, self._hurry = what, remedy, hurry
        self._address = _address(self.url)
        self._timeout, self._retries = timeout, retries
        self._token = _token(token_env, url)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        read: Callable[[bytes], dict[str, Any]],
        patience: float | None = None,
    ) -> dict[str, Any]:
        """The server's answer to one request, however many tries it takes.

        ``read`` makes an object of the body of a 200, and raises InputError where it is none.
        """
        limit = self.patience if patience is None else patience
        started, pause = time.monotonic(), _FIRST_PAUSE
        for attempt in range(self._retries + 1):
            try:
                return self._try(method, path, body, read)
            except _TryAgainError as error:
                waited = time.monotonic() - started
                if attempt == self._retries or waited + pause > limit:
                    raise UnreachableError(
                        f"the {self._what} {self.url} gave no answer in {attempt + 1} tries over {waited:.0f} s:"
                        f" {error}; {self._remedy}"
                    ) from None
                if attempt == 0:
                    log.warning(f"the {self._what} {self.url} gives no answer: {error}; trying for {limit:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")

    def _try(
        self, method: str, path: str, body: bytes | None, read: Callable[[bytes], dict[str, Any]]
    ) -> dict[str, Any]:
        status, data, location = self._exchange(method, path, body)
        if status in RETRIED:
            raise _TryAgainError(f"HTTP {status}, {RETRIED[status]}")
        if 300 <= status < 400:
            raise InputError(
                f"{self.url} redirects to {location or 'nowhere'}; redirects are not followed, give that address"
            )
        if status == 200:
            return read(data)
        raise InputError(f"the {self._what} {self.url} answered HTTP {status} to {path}: {_why(data)}")

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes, str]:
        """Status, body and Location of one request. All of it takes ``timeout`` seconds at most."""
        connection = self._connection()
        expired = threading.Event()
        sockets: list[socket.socket] = []

        def expire() -> None:
            expired.set()
            for opened in sockets:
                with suppress(OSError, ValueError):
                    opened.shutdown(socket.SHUT_RDWR)

        # The timeout of a socket is one for each read: a server that drips bytes would hold us for ever.
        timer = threading.Timer(self._timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            sockets.append(connection.sock)
            if expired.is_set():  # too late for ``expire`` to close it
                raise TimeoutError
            headers = {"Accept": "application/json", "Connection": "close"}
            headers |= {"Content-Type": "application/json"} if body is not None else {}
            headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
            connection.request(method, self._address.path.rstrip("/") + path, body=body, headers=headers)
            response = connection.getresponse()
            data = response.read(wire.MAX_BYTES + 1)
            if response.length and len(data) <= wire.MAX_BYTES:
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException) as error:
            slow = expired.is_set() or isinstance(error, TimeoutError)
            raise _TryAgainError(self._late() if slow else _reason(error)) from None
        finally:
            timer.cancel()
            connection.close()
        if expired.is_set():
            raise _TryAgainError(self._late())
        if len(data) > wire.MAX_BYTES:
            raise InputError(f"the answer of {self.url} is longer than {wire.MAX_BYTES} bytes")
        return response.status, data, response.getheader("Location", "")

    def _late(self) -> str:
        return f"no answer within {self._timeout:g} s; {self._hurry}"

    def _connection(self) -> http.client.HTTPConnection:
        host, port = str(self._address.hostname), self._address.port
        if self._address.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=self._timeout)
        return http.client.HTTPConnection(host, port, timeout=self._timeout)


def _why(data: bytes) -> str:
    """The reason that the body of an error gives: a text, or an object with a message."""
    try:
        error = wire.read(data).get("error") or "it gave no reason"
    except InputError:
        return "it gave no reason"
    return first_line(error.get("message", error) if isinstance(error, dict) else error)


def _address(url: str) -> SplitResult:
    try:
        address = urlsplit(url)
        _ = address.port  # raises where it is none
    except ValueError as error:
        raise ConfigError(f"{url!r} is no address: {error}") from None
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise ConfigError(f"{url!r} is no address of a reward; write http://HOST:PORT or https://HOST")
    if address.username is not None or address.password is not None:
        raise ConfigError(
            "an address must not hold a user or password, which would be saved with the run; write"
            " ?token_env=VARIABLE, and put the token in that environment variable"
        )
    if not (address.path.isascii() and address.path.isprintable()) or " " in address.path:
        raise ConfigError(f"{url!r} has a path with signs that an address cannot hold")
    return address


def _token(variable: str, url: str) -> str:
    token = os.environ.get(variable, "") if variable else ""
    if variable and not token:
        raise ConfigError(f"{url}: the environment variable {variable}, named by token_env, is not set")
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(f"{url}: the token in {variable} has signs that a header cannot hold")
    return token


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "its host name is not known"
    text = getattr(error, "strerror", None) or first_line(error) or type(error).__name__
    return f"{text[:1].lower()}{text[1:]}"


def first_line(what: object) -> str:
    """The start of a message, fit for one sentence."""
    return str(what).strip().partition("\n")[0][:300]
