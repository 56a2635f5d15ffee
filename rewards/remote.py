"""A reward that another process, perhaps on another machine, computes: ``http(s)://HOST:PORT?timeout=30``.

``diffalign reward serve SPEC`` serves any reward so. Nothing is sent that could run, no proxy is used and no redirect
followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch

from diffalign.errors import ConfigError, InputError
from diffalign.types import Modality, Sample, Scores
from rewards import wire
from rewards.arguments import split, typed
from rewards.line import Line, first_line

_REMEDY = "start it with 'diffalign reward serve', and go on with a stopped run by --resume"
_HURRY = "a larger timeout= or a smaller batch_size= may help"
_START_PATIENCE = 10.0
"""Longest wait for a server at the start, in seconds: there a wrong address is likelier than an outage."""


class RemoteReward:
    """The reward that a server holds. What it is (name, modality, unit, range) the server says once, at the start.

    Samples travel in batches, in order, one request after the other. Where a server is down, busy or slow a request is
    sent again, with pauses that double from 0.5 to 30 s, until ``patience`` seconds or ``retries`` are spent; then
    UnreachableError is raised. A wrong answer is told at once.
    """

    modality: Modality
    waits = True
    """It waits for its server: the next samples are made meanwhile."""

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
        if batch_size < 1:
            raise ConfigError(f"{url}: batch_size is {batch_size}; it is at least 1")
        self._line = Line(
            url, what="reward server", remedy=_REMEDY, hurry=_HURRY, timeout=timeout, retries=retries,
            patience=patience, token_env=token_env,
        )  # fmt: skip
        self.url, self._batch_size = self._line.url, batch_size
        facts = self._line.ask("GET", wire.ABOUT, None, self._read, min(patience, _START_PATIENCE))
        try:
            self._describe(facts)
        except KeyError as error:
            raise InputError(f"{self.url} does not describe a reward: {error} is missing") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{self.url} does not describe a reward: {first_line(error)}") from None
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
            answer = self._line.ask("POST", wire.SCORE, wire.body(batch), self._read)
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

    def _read(self, data: bytes) -> dict[str, Any]:
        try:
            answer = wire.read(data)
            wire.check_version(answer)
        except InputError as error:
            raise InputError(f"{self.url} is no reward server for this version: {error}") from None
        return answer


def load(spec: str) -> RemoteReward:
    """The reward of ``http(s)://HOST:PORT?argument=value&…``."""
    url, arguments = split(spec)
    build = partial(RemoteReward, url)
    return build(**cast(dict[str, Any], typed(cast(type, build), arguments, spec)))
