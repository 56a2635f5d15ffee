"""How the server is run: what it may trust, and how long a login lasts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from apps.label.oidc import Provider

Role = Literal["rater", "adjudicator", "admin"]
ROLES: tuple[Role, ...] = ("rater", "adjudicator", "admin")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one server. The defaults are those of a server on the loopback address."""

    https: bool = False
    """Browsers reach it by https, through a reverse proxy that holds the certificate."""
    expiry: float = 12 * 3600
    """Seconds after which a login ends, whatever happens."""
    idle: float = 2 * 3600
    """Seconds without a request after which a login ends."""
    rater: str = "rater"
    """Who everybody is when there are no accounts; they see the results, too."""
    oidc: Provider | None = None
    """Who else vouches for people."""
    access_log: bool = False
    """Whether each request is written to the log: method, kind of path, status and milliseconds, nothing else."""

    @property
    def cookie(self) -> str:
        """The name of the cookie. With the prefix, browsers take it over https alone, from the host itself."""
        return "__Host-diffalign" if self.https else "diffalign"


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without a port, is this machine talking to itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
