"""Who may log in: a JSON file with argon2id hashes, readable and writable by its owner alone."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import unicodedata
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from apps.label.settings import ROLES, Role
from diffalign.errors import DiffalignError, InputError, NotFoundError, RefusedError, UserError

if TYPE_CHECKING:
    from argon2 import PasswordHasher

SHORTEST_PASSWORD = 10
LONGEST_PASSWORD = 1024
LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody who may log in."""

    name: str
    role: Role
    fingerprint: str
    """Changes with the password and with the role: a session that carries another one is over."""


@dataclass(frozen=True, slots=True)
class _Entry:
    role: Role
    password: str
    """As an argon2id string, with its salt and its costs."""


class Accounts:
    """The accounts of a file. A change of the file, by whomever, holds from the next question on."""

    def __init__(self, path: Path, entries: dict[str, _Entry], state: tuple[int, ...]) -> None:
        self.path = path
        self._entries = entries
        self._state = state
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: str | Path) -> Accounts:
        """Reads the file; one that is not there yet has no accounts. Refuses a file that others may write."""
        path = Path(path)
        entries, state = _read(path)
        return cls(path, entries, state)

    def add(self, name: str, role: Role, password: str) -> None:
        """A new account, or another role and password for one that is there. Kept by ``save``."""
        if role not in ROLES:
            raise InputError(f"there is no role {role!r}; there are {', '.join(ROLES)}")
        name = checked_name(name)
        _check_password(name, password)
        self._entries[name] = _Entry(role, _hasher().hash(_bytes(password)))

    def remove(self, name: str) -> None:
        """Takes an account away. Kept by ``save``; the votes of the rater stay in the study."""
        if self._entries.pop(checked_name(name), None) is None:
            raise NotFoundError(f"there is no account {name!r}")

    def list(self) -> list[Account]:
        """All accounts, by name."""
        return [_account(name, entry) for name, entry in sorted(self._entries.items())]

    def get(self, name: str) -> Account | None:
        """The account of that name as the file has it now."""
        self._refresh()
        entry = self._entries.get(name)
        return None if entry is None else _account(name, entry)

    def verify(self, name: str, password: str) -> Account | None:
        """The account, if the password is right. An unknown name takes as long as a wrong password."""
        from argon2.exceptions import InvalidHashError, VerificationError

        self._refresh()
        name = spelled(name)
        entry = self._entries.get(name)
        given = _bytes(password) if len(password) <= LONGEST_PASSWORD else b""
        try:
            _hasher().verify(entry.password if entry else _unknown(), given)
        except (VerificationError, InvalidHashError):
            return None
        return _account(name, entry) if entry and given else None

    def save(self) -> None:
        """Writes the file, whole or not at all, mode 0600. Refuses where somebody else has changed it meanwhile."""
        if _stat(self.path) != self._state:
            raise RefusedError(f"{self.path} was changed by somebody else meanwhile; try again")
        users = {name: {"role": entry.role, "password": entry.password} for name, entry in self._entries.items()}
        data = json.dumps({"version": 1, "users": users}, indent=1).encode() + b"\n"
        part = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.part")
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        self._state = _stat(self.path)

    def _refresh(self) -> None:
        with self._lock:
            if _stat(self.path) == self._state:
                return
            try:
                self._entries, self._state = _read(self.path)
            except UserError as error:
                # Who asks now is a client, not the one who can mend it; and nobody may log in meanwhile.
                raise DiffalignError(str(error)) from None


def spelled(name: str) -> str:
    """One spelling for all ways to type a name: Unicode's composed form, without spaces around it."""
    return unicodedata.normalize("NFC", name).strip()


def checked_name(name: str) -> str:
    """The name in Unicode's composed form; InputError for one that cannot be a name."""
    name = spelled(name)
    if not 1 <= len(name) <= LONGEST_NAME:
        raise InputError(f"a name has 1 to {LONGEST_NAME} characters")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise InputError("a name has no control characters and no halves of characters")
    return name


def _check_password(name: str, password: str) -> None:
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise InputError(f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters")
    if password.strip().casefold() == name.casefold():
        raise InputError("the password is the name; choose another one")


def _account(name: str, entry: _Entry) -> Account:
    return Account(name, entry.role, hashlib.sha256(f"{entry.role}\n{entry.password}".encode()).hexdigest())


def _bytes(password: str) -> bytes:
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")


@cache
def _hasher() -> PasswordHasher:
    """Argon2id at the costs that the library recommends (RFC 9106, low memory: 64 MiB)."""
    from argon2 import PasswordHasher

    return PasswordHasher()


@cache
def _unknown() -> str:
    """The hash that passwords for unknown names are compared with."""
    return _hasher().hash(os.urandom(16))


def _stat(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return (found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode)


def _read(path: Path) -> tuple[dict[str, _Entry], tuple[int, ...]]:
    state = _stat(path)
    if not state:
        return {}, state
    if state[3] & 0o022:
        raise RefusedError(f"others can write {path}, and so make themselves accounts: chmod 600 it, and check it")
    try:
        users = json.loads(path.read_text(encoding="utf-8"))["users"]
        entries = {str(name): _Entry(entry["role"], str(entry["password"])) for name, entry in users.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} is no file of accounts, or is damaged: bring it back from a copy, or delete it and add the"
            " accounts anew by `diffalign label users add` (votes do not depend on it)"
        ) from None
    wrong = [name for name, entry in entries.items() if entry.role not in get_args(Role)]
    if wrong:
        raise InputError(f"{path}: the role of {wrong[0]!r} is none of {', '.join(ROLES)}")
    return entries, state
