"""Who is logged in: random numbers in cookies, whose hashes lie in the study's database.

A session ends by logging out, by its age, by lying idle, and with the password or the role that it was begun with.
Sessions survive a restart of the server.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy import Engine, delete, insert, select, update

from apps.label.accounts import Account
from diffalign.study import database
from diffalign.study.schema import SessionRow

TRUSTED_SECONDS = 5.0
"""How long a session is believed without asking the database: so long may a logout on another server go unnoticed."""
CACHED = 4096
ABOUT = 0.1
"""The idle expiry is written when it moves by this share of itself, not at each request."""


@dataclass(frozen=True, slots=True)
class Session:
    """A login."""

    id_sha256: str
    name: str
    role: str
    fingerprint: str
    created_at: float
    expires_at: float


class Sessions:
    """The sessions of a study. May be called from any thread."""

    def __init__(self, engine: Engine, expiry: float, idle: float, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._expiry, self._idle, self._clock = engine, expiry, idle, clock
        self._cache: OrderedDict[str, tuple[Session | None, float]] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, account: Account) -> str:
        """Opens a session; returns the secret for the cookie, of 256 random bits."""
        secret, now = secrets.token_urlsafe(32), self._clock()
        with database.writing(self._engine) as connection:
            connection.execute(delete(SessionRow).where(SessionRow.expires_at <= now))
            connection.execute(
                insert(SessionRow).values(
                    id_sha256=_hash(secret),
                    user=account.name,
                    role=account.role,
                    fingerprint=account.fingerprint,
                    created_at=now,
                    expires_at=now + min(self._expiry, self._idle),
                )
            )
        return secret

    def known(self, secret: str) -> Session | None:
        """The session, if it was looked up a moment ago; None says nothing."""
        session, looked = self._cache.get(_hash(secret), (None, 0.0))
        now = self._clock()
        if session is None or not 0 <= now - looked < TRUSTED_SECONDS or session.expires_at <= now:
            return None
        return session

    def find(self, secret: str) -> Session | None:
        """The session as the database has it; None for none and for one that is over."""
        key, now = _hash(secret), self._clock()
        query = select(
            SessionRow.id_sha256, SessionRow.user, SessionRow.role, SessionRow.fingerprint, SessionRow.created_at,
            SessionRow.expires_at,
        ).where(SessionRow.id_sha256 == key)  # fmt: skip
        with database.reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        if row is None or row.expires_at <= now:
            # One that was believed until now is over. What nobody knew is not noted: there is no end of guesses.
            if key in self._cache:
                self._over(key)
            return None
        session = Session(*row)
        return session if self._keep(session) else None

    def stale(self, session: Session) -> bool:
        """Whether the time until which it may lie idle should be written anew."""
        return self._until(session) - session.expires_at > ABOUT * self._idle

    def extend(self, session: Session) -> bool:
        """Writes down that the session is in use; False for one that was ended meanwhile, and stays so."""
        until = self._until(session)
        with database.writing(self._engine) as connection:
            found = connection.execute(
                update(SessionRow).where(SessionRow.id_sha256 == session.id_sha256).values(expires_at=until)
            ).rowcount
        if not found:
            self._over(session.id_sha256)
            return False
        return self._keep(replace(session, expires_at=until))

    def end(self, secret: str) -> None:
        """Logs out."""
        key = _hash(secret)
        with database.writing(self._engine) as connection:
            connection.execute(delete(SessionRow).where(SessionRow.id_sha256 == key))
        self._over(key)

    def _until(self, session: Session) -> float:
        return min(session.created_at + self._expiry, self._clock() + self._idle)

    def _keep(self, session: Session) -> bool:
        """Whether it still lives, so that it was kept."""
        with self._lock:
            if self._cache.get(session.id_sha256, (session, 0.0))[0] is None:
                return False
            self._note(session.id_sha256, session)
        return True

    def _over(self, key: str) -> None:
        """Notes the end: who has asked the database a moment before must not bring it back."""
        with self._lock:
            self._note(key, None)

    def _note(self, key: str, session: Session | None) -> None:
        self._cache[key] = (session, self._clock())
        self._cache.move_to_end(key)
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
