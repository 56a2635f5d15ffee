"""A reward that another process, perhaps on another machine, computes: ``http(s)://HOST:PORT?timeout=30``.

``diffalign reward serve SPEC`` serves any reward so. Nothing is sent that could run, no proxy is used and no redirect
followed.
"""

from __future__ import annotations

import http.client
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import torch

from diffalign.errors import ConfigError, InputError, RefusedError
from diffalign.types import Modality, Sample, Scores
from rewards import wire
from rewards.arguments import split, typed

log = logging.getLogger(__name__)

_RETRIED = {429: "too many requests", 502: "bad gateway", 503: "busy", 504: "gateway timeout"}
"""Answers of a server that is there and will do better later. Any other error would be the same next time."""
_START_PATIENCE = 10.0
"""Longest wait for a server at the start, in seconds: there a wrong address is likelier than an outage."""
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0


class UnreachableError(RefusedError):
    """A reward server did not answer for as long as one was ready to wait."""


class _TryAgainError(Exception):
    """What may be gone the next time."""


class RemoteReward:
    """The reward that a server holds. What it is (name, modality, unit, range) the server says once, at the start.

    Samples travel in batches, in order, one request after the other. Where a server is down, busy or slow a request is
    sent again, with pauses that double from 0.5 to 30 s, until ``patience`` seconds or ``retries`` are spent; then
    UnreachableError is raised. A wrong answer is told at once.
    """

    modality: Modality

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 50,
        batch_size: int = 64,
        patience: float = 300.0,
        token_env: str = "",
        name: str = "",
    ) -> None:
        """``timeout`` is in seconds for a whole request and its answer, ``patience`` for all tries of one request.

        ``token_env`` is the environment variable that holds the token which the server asks for: a token itself does
        not belong into a configuration. ``name`` is what to call the reward here; without it the server's own name.
        """
        for what, value, least in (("timeout", timeout, 0), ("patience", patience, -1)):
            if not (math.isfinite(value) and value > least):
                raise ConfigError(f"{url}: {what} is {value:g}; it is a number of seconds above {max(least, 0)}")
        if retries < 0 or batch_size < 1:
            raise ConfigError(f"{url}: retries is {retries} and batch_size {batch_size}; they are at least 0 and 1")
        self.url = url.rstrip("/")
        self._address = _address(self.url)
        self._timeout, self._retries, self._patience, self._batch_size = timeout, retries, patience, batch_size
        self._token = _token(token_env, url)
        facts = self._ask("GET", wire.ABOUT, None, min(patience, _START_PATIENCE))
        try:
            self._describe(facts)
        except KeyError as error:
            raise InputError(f"{self.url} does not describe a reward: {error} is missing") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{self.url} does not describe a reward: {_first_line(error)}") from None
        self.name = name or self._served

    def _describe(self, facts: Mapping[str, Any]) -> None:
        served, unit, modality = facts["name"], facts["unit"], facts["modality"]
        if not (isinstance(served, str) and isinstance(unit, str) and served.isprintable() and 0 < len(served) <= 200):
            raise ValueError("its name and unit are no short texts")
        if modality not in ("image", "text") or not isinstance(facts["higher_is_better"], bool):
            raise ValueError("its modality is neither image nor text, or higher_is_better neither true nor false")
        low, high = facts["range"]
        self.modality, self.unit, self.higher_is_better = modality, unit, facts["higher_is_better"]
        self.range = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
        self._served = served
        self._max_bytes = int(facts.get("max_bytes", wire.MAX_BYTES))
        self._max_pixels = int(facts.get("max_pixels", wire.MAX_PIXELS))

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """The server's scores ``(B,)``; a part that only some of the batches have is NaN for the rest."""
        total, parts, done = torch.full((len(samples),), math.nan), dict[str, torch.Tensor](), 0
        for batch in self._batches(samples):
            answer = self._ask("POST", wire.SCORE, wire.body(batch), self._patience)
            if answer.get("name", self._served) != self._served:
                raise InputError(f"{self.url} served {self._served!r} and now serves {answer['name']!r}")
            try:
                scores = wire.scores(answer, len(batch))
            except InputError as error:
                raise InputError(f"{self.url} answered with scores that cannot be used: {error}") from None
            chunk = slice(done, done + len(batch))
            total[chunk] = scores.total
            for name, part in scores.parts.items():
                parts.setdefault(name, torch.full((len(samples),), math.nan))[chunk] = part
            done += len(batch)
        return Scores(total, parts)

    def _batches(self, samples: Sequence[Sample]) -> Iterator[list[bytes]]:
        """Packed samples in requests that the server takes."""
        batch: list[bytes] = []
        size = pixels = 0
        for sample in samples:
            packed = wire.pack(sample)
            length = len(packed) + 64
            area = math.prod(sample.image.size) if sample.image is not None else 0
            if length > self._max_bytes or area > self._max_pixels:
                raise InputError(
                    f"the sample of {sample.prompt.text!r} has {length} bytes and {area} pixels, and {self.url} takes"
                    f" {self._max_bytes} and {self._max_pixels}"
                )
            full = size + length > self._max_bytes or pixels + area > self._max_pixels
            if batch and (full or len(batch) == self._batch_size):
                yield batch
                batch, size, pixels = [], 0, 0
            batch.append(packed)
            size, pixels = size + length, pixels + area
        if batch:
            yield batch

    def _ask(self, method: str, path: str, body: bytes | None, patience: float) -> dict[str, Any]:
        """The server's answer to one request, however many tries it takes."""
        started, pause = time.monotonic(), _FIRST_PAUSE
        for attempt in range(self._retries + 1):
            try:
                return self._try(method, path, body)
            except _TryAgainError as error:
                waited = time.monotonic() - started
                if attempt == self._retries or waited + pause > patience:
                    raise UnreachableError(
                        f"the reward server {self.url} gave no answer in {attempt + 1} tries over {waited:.0f} s:"
                        f" {error}; start it with 'diffalign reward serve', and go on with a stopped run by --resume"
                    ) from None
                if attempt == 0:
                    log.warning(f"the reward server {self.url} gives no answer: {error}; trying for {patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")

    def _try(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        status, data, location = self._exchange(method, path, body)
        if status in _RETRIED:
            raise _TryAgainError(f"HTTP {status}, {_RETRIED[status]}")
        if 300 <= status < 400:
            raise InputError(
                f"{self.url} redirects to {location or 'nowhere'}; redirects are not followed, give that address"
            )
        try:
            answer = wire.read(data)
            if status == 200:
                wire.check_version(answer)
        except InputError as error:
            if status == 200:
                raise InputError(f"{self.url} is no reward server for this version: {error}") from None
            answer = {}
        if status != 200:
            why = _first_line(answer.get("error") or "it gave no reason")
            raise InputError(f"the reward server {self.url} answered HTTP {status} to {path}: {why}")
        return answer

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
        return f"no answer within {self._timeout:g} s; a larger timeout= or a smaller batch_size= may help"

    def _connection(self) -> http.client.HTTPConnection:
        host, port = str(self._address.hostname), self._address.port
        if self._address.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=self._timeout)
        return http.client.HTTPConnection(host, port, timeout=self._timeout)


def load(spec: str) -> RemoteReward:
    """The reward of ``http(s)://HOST:PORT?argument=value&…``."""
    url, arguments = split(spec)
    build = partial(RemoteReward, url)
    return build(**cast(dict[str, Any], typed(cast(type, build), arguments, spec)))


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
    text = getattr(error, "strerror", None) or _first_line(error) or type(error).__name__
    return f"{text[:1].lower()}{text[1:]}"


def _first_line(what: object) -> str:
    return str(what).strip().partition("\n")[0][:300]
