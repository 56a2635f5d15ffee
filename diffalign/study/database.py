"""How a study reaches its database: SQLite beside its files, or PostgreSQL by URL; migrations; backups.

SQLite runs in write-ahead mode with ``synchronous=FULL``: a committed vote survives the death of the process and the
loss of power. Who may write says so when the transaction begins (``BEGIN IMMEDIATE``): a transaction that reads first
and writes later fails at once under load, whatever the busy timeout is. All processes run on one machine; the
folder must not be a network share. For more, take PostgreSQL, which is asked for the same whatever its defaults are.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, func, inspect, make_url, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from diffalign.errors import ConfigError, InputError, NotFoundError, RefusedError
from diffalign.study.schema import StudyRow

BUSY_SECONDS = 60
CONNECTIONS = 12
"""So many connections to a server are kept. To make one costs more than many questions, so rushes should not."""
TRUSTED_SECONDS = 1.0
"""So long after its last use a connection to a server is taken for one that works."""
MIGRATING = 0x64696666616C6967
"""Names the lock of PostgreSQL that holds while tables are made or changed."""
_WRITERS: WeakKeyDictionary[Engine, threading.Lock] = WeakKeyDictionary()
MIGRATIONS = Path(__file__).with_name("migrations")


def connect(database: str | Path) -> Engine:
    """The engine for the path of a SQLite file, or for a ``postgresql://`` URL."""
    if isinstance(database, Path):
        engine = create_engine(URL.create("sqlite", database=str(database)), connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _sqlite_ready)
        event.listen(engine, "begin", _sqlite_begin)
        return engine
    try:
        url = make_url(database)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() != "postgresql":
            raise ConfigError(f"a study is kept in its folder, or at postgresql://…; {url.drivername} is not supported")
        # Each statement sees what was committed before it, so that who waited for the lock of the study reads what is
        # new. The server's default may be another one, by which all but one of those who waited would fail.
        engine = create_engine(
            url, isolation_level="READ COMMITTED", pool_size=CONNECTIONS, max_overflow=CONNECTIONS, pool_use_lifo=True
        )
        event.listen(engine, "connect", _postgresql_ready)
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", _still_there(engine))
        return engine
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"the database is named postgresql://USER@HOST/NAME: {error}") from None
    except ModuleNotFoundError as error:
        raise ConfigError(f"PostgreSQL needs the package psycopg, which is not installed ({error})") from None


def _postgresql_ready(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    """A commit is on the disk when it returns. Stricter settings, which wait for other servers too, stay."""
    cursor = connection.cursor()
    cursor.execute(
        "SELECT set_config('synchronous_commit', 'on', false)"
        " WHERE current_setting('synchronous_commit') IN ('off', 'local')"
    )
    cursor.close()
    connection.commit()


def _note_use(_: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
    record.info["used"] = time.monotonic()


def _still_there(engine: Engine) -> Callable[[DBAPIConnection, ConnectionPoolEntry, object], None]:
    """Asks whether the server is still there, where nothing was asked for a while: it may have been restarted.

    To ask each time costs a way there and back. Who meets the end of the server itself is told so, and tries again.
    """

    def ask(connection: DBAPIConnection, record: ConnectionPoolEntry, _: object) -> None:
        if time.monotonic() - record.info.get("used", math.inf) < TRUSTED_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error:
            raise InvalidatePoolError from None

    return ask


def _sqlite_ready(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that sees one state of the study, and waits for nobody."""
    level = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
    with engine.connect().execution_options(reading=True, **level) as connection, connection.begin():
        yield connection


@contextmanager
def asking(engine: Engine) -> Iterator[Connection]:
    """For one question by itself: a server needs no transaction around it, so it is one way there and back."""
    if engine.dialect.name != "postgresql":
        with reading(engine) as connection:
            yield connection
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


@contextmanager
def together(connection: Connection) -> Iterator[None]:
    """For statements that return nothing: a server is sent all of them before it is waited for, at the end."""
    if connection.dialect.name != "postgresql":
        yield
        return
    driver: Any = connection.connection.driver_connection
    try:
        with driver.pipeline():
            yield
    except connection.dialect.loaded_dbapi.Error as error:
        # What was sent in a block is not known one by one, so SQLAlchemy could not say it in its own words.
        raise DBAPIError.instance(None, None, error, connection.dialect.loaded_dbapi.Error) from error


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that is on the disk once the block has been left, or never was.

    SQLite lets waiting writers poll, up to a tenth of a second apart. Threads of one process wait here instead, which
    costs them no more than the transactions before theirs.
    """
    with _turn_of(engine), engine.connect() as connection, connection.begin():
        yield connection


def _turn_of(engine: Engine) -> AbstractContextManager[object]:
    if engine.dialect.name != "sqlite":
        return nullcontext()
    return _WRITERS.setdefault(engine, threading.Lock())


# --- versions of the schema ---


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def revisions() -> list[str]:
    """All versions of the schema that this release knows, the oldest first."""
    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]


def revision(engine: Engine) -> str | None:
    """The version that the database has; None where it has no study."""
    with reading(engine) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection, to: str = "head") -> None:
    """Brings the schema to a version, within the transaction of the connection."""
    command.upgrade(_config(connection), to)


def create(connection: Connection) -> None:
    """Makes the tables in a database that has none of ours."""
    _alone(connection)
    taken = {"study", "vote", "alembic_version"} & set(inspect(connection).get_table_names())
    if taken:
        raise RefusedError(
            f"the database has a study already (tables {', '.join(sorted(taken))}); give an empty one. Where the folder"
            " of that study was never made, nothing is lost: empty the database by DROP SCHEMA public CASCADE; CREATE"
            " SCHEMA public"
        )
    upgrade(connection)


@dataclass(frozen=True, slots=True)
class Migrated:
    """What became of the schema of a study."""

    before: str
    after: str
    backup: Path | None
    """Where a copy from before is; None where nothing was changed, and for PostgreSQL."""


def bring_up_to_date(engine: Engine, uid: str, folder: Path, backed_up: bool) -> Migrated:
    """Migrates an older study after a backup; refuses a newer one, and a database that is not of the study ``uid``.

    A PostgreSQL database cannot be backed up from here: ``backed_up`` says that this was done.
    """
    known, found = revisions(), revision(engine)
    if found is None:
        raise InputError("the database holds no study")
    if found not in known:
        raise RefusedError(
            f"this study was written by a newer release (schema {found}, this one knows {known[-1]}); install that"
            " release, nothing was changed"
        )
    with reading(engine) as connection:
        other = connection.execute(select(StudyRow.uid, StudyRow.title)).one().uid
    if other != uid:
        raise InputError(f"the database belongs to another study ({other}) than the folder {folder} ({uid})")
    if found == known[-1]:
        return Migrated(found, found, None)
    kept = None
    if engine.dialect.name == "sqlite":
        kept = folder / "backups" / f"schema-{found}-{uuid.uuid4().hex[:8]}.sqlite"
        copy(engine, kept)
    elif not backed_up:
        raise RefusedError(
            f"the study has the older schema {found}, and would be migrated to {known[-1]}: back it up by pg_dump, and"
            f" then run `diffalign label upgrade {folder} --backed-up`"
        )
    with writing(engine) as connection:
        _alone(connection)
        upgrade(connection)  # does nothing where another process was first
    return Migrated(found, known[-1], kept)


def _alone(connection: Connection) -> None:
    """Lets nobody else make or change tables until the transaction ends. SQLite has one writer at a time anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATING)))


def copy(engine: Engine, to: Path) -> None:
    """A consistent copy of a SQLite database that may be in use, whole or not at all, to a path that is free."""
    if engine.dialect.name != "sqlite":
        raise RefusedError("a PostgreSQL study is backed up by pg_dump")
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.part")
    source = engine.raw_connection()
    target = sqlite3.connect(part)
    try:
        driver = source.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.backup(target)
        # One file, without a log beside it.
        target.execute("PRAGMA journal_mode=DELETE")
    finally:
        target.close()
        source.close()
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(to)


def existing(path: Path) -> Path:
    """The path of a SQLite file that is there; SQLite itself would make an empty one."""
    if not path.is_file():
        raise NotFoundError(f"there is no study database {path}")
    return path
