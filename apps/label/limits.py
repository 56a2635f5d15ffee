"""Slowing down who guesses passwords, and letting writers take turns."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Throttle:
    """Counts failures per key; after the free ones each doubles the wait, from one second to the longest.

    It lives in the memory of the process, and holds so many keys: the oldest give way.
    """

    def __init__(
        self,
        free: int,
        longest: float,
        forget: float = 3600,
        keys: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free, self._longest, self._forget, self._keys = free, longest, forget, keys
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait(self, key: str) -> float:
        """Seconds until this key may try again; 0 if now."""
        count, last = self._failures.get(key, (0, 0.0))
        passed = self._clock() - last
        if count < self._free or passed > self._forget:
            return 0
        # The exponent is bounded, so that a patient attacker does not make it overflow.
        return max(0.0, min(2.0 ** min(count - self._free, 30), self._longest) - passed)

    def failed(self, key: str) -> None:
        """One more failure."""
        count, last = self._failures.pop(key, (0, 0.0))
        now = self._clock()
        self._failures[key] = (1 if now - last > self._forget else count + 1, now)
        while len(self._failures) > self._keys:
            self._failures.popitem(last=False)

    def succeeded(self, key: str) -> None:
        """Forgets the failures."""
        self._failures.pop(key, None)


def network(address: str) -> str:
    """Whom an address stands for: itself, or the /64 network that one IPv6 customer has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class Turns:
    """Runs functions one after the other, first come first served, in a thread of their own.

    A study admits one writer at a time, in any case. Writers that wait for it in a thread pool take the threads from
    who only reads, and overtake each other, which gives a few of them very long waits; here they queue.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)

    async def __call__(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """What the function returns; what it raises is raised."""
        work = self._thread.submit(function, *args, **options)
        # A client that goes away in the middle must not cancel work that others queue behind.
        return await asyncio.shield(asyncio.wrap_future(work))
