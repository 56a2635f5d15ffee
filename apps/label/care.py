"""``diffalign label doctor``, ``backup``, ``upgrade`` and ``revise``: looking after a study."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import psutil

from apps.label import report
from apps.reported import printable
from diffalign.errors import NotFoundError, RefusedError
from diffalign.study import Protocol, Study, database
from diffalign.study.inspection import Finding
from diffalign.study.noted import flags

NETWORK = {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "sshfs", "fuse.sshfs", "9p", "glusterfs"}
NETWORK |= {"ceph", "fuse.ceph", "lustre", "beegfs", "gpfs", "davfs", "fuse.davfs2", "afs"}
"""File systems over a network: SQLite's locks and its log cannot be relied on there."""
LEAST_FREE = 2**30
NO_ACCOUNTS = "no accounts"


def doctor(folder: Path, database: str | None) -> int:
    """Prints what was looked at; 0 if all is well, else 1."""
    study = Study.open(folder, database)
    try:
        findings = [*study.inspect(), *surroundings(study)]
    finally:
        study.close()
    for finding in findings:
        mark = "PROBLEM" if not finding.ok else "note" if finding.what == NO_ACCOUNTS else "ok"
        click.echo(f"{mark:<8} {finding.what}: {finding.detail}", err=not finding.ok)
    wrong = sum(not finding.ok for finding in findings)
    click.echo("all is well" if not wrong else f"{wrong} {'problem' if wrong == 1 else 'problems'}")
    return 1 if wrong else 0


def surroundings(study: Study) -> Iterator[Finding]:
    """What the study stands on: the accounts file, the disk, the file system."""
    users = study.folder / "users.json"
    if users.exists():
        mode = stat.S_IMODE(users.stat().st_mode)
        detail = f"{users.name} has mode {mode:04o}" + ("" if not mode & 0o077 else "; make it private: chmod 600")
        yield Finding("accounts", not mode & 0o077, detail)
    else:
        yield Finding(NO_ACCOUNTS, True, f"add one by: diffalign label users add {study.folder} NAME")
    mode = stat.S_IMODE(study.folder.stat().st_mode)
    detail = f"{study.folder} has mode {mode:04o}"
    private = not mode & 0o077
    yield Finding("folder", private, detail + ("" if private else "; others reach what raters said: chmod 700"))
    free = shutil.disk_usage(study.folder).free
    yield Finding("disk", free >= LEAST_FREE, f"{free / 2**30:.1f} GiB free")
    kind = filesystem(study.folder)
    local = kind not in NETWORK
    detail = f"{kind or 'unknown'}" + ("" if local else ", over a network: move the study to a local disk")
    yield Finding("file system", local or study.engine.dialect.name != "sqlite", detail)


def filesystem(folder: Path) -> str:
    """The kind of file system that a folder is on, as the system calls it; empty where it does not say."""
    place = folder.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (place, *place.parents) if parent in mounts), "").lower()


def backup(folder: Path, to: Path, database: str | None) -> None:
    """Copies a study that may be in use, without its accounts."""
    study = Study.open(folder, database)
    try:
        study.backup(to)
    finally:
        study.close()
    click.echo(f"a copy of {folder} in {to}, which opens as a study; accounts are not in it")


def upgrade(folder: Path, database: str | None, backed_up: bool) -> None:
    """Migrates a study that an older release made."""
    done = Study.upgrade(folder, database, backed_up)
    if done.before == done.after:
        click.echo(f"{folder} has the schema {done.after} already; nothing was changed")
        return
    click.echo(f"{folder} has the schema {done.after} now (before: {done.before})")
    if done.backup is not None:
        click.echo(f"its database as it was: {done.backup}")


def unflag(folder: Path, pairs: Sequence[int], url: str | None) -> None:
    """Takes flagged pairs back into the study; without any, lists them."""
    study = Study.open(folder, url)
    try:
        with database.reading(study.engine) as connection:
            found = flags(connection)
        known = {flag.pair for flag in found}
        for pair in pairs:
            if pair not in known:
                raise NotFoundError(f"pair {pair} is not flagged; {_named(known)}")
        for pair in pairs:
            study.unflag(pair)
    finally:
        study.close()
    for pair in pairs:
        click.echo(f"pair {pair} is in the study again, with the votes that it had")
    if not pairs:
        for line in report.flagged(found):
            click.echo(printable("  ".join(line)))
        if not found:
            click.echo("no pair is flagged")


def _named(pairs: set[int]) -> str:
    return f"flagged are {', '.join(map(str, sorted(pairs)))}" if pairs else "none is"


def revise(folder: Path, protocol: str, database: str | None) -> None:
    """Gives a study a new version of its protocol."""
    study = Study.open(folder, database)
    try:
        new = Protocol.load(protocol)
        old = study.protocol()
        if new.rules.name != old.rules.name:
            raise RefusedError(
                f"{protocol} is called {printable(new.rules.name)}, and the study goes by {printable(old.rules.name)}:"
                " a new version has the old name; for other questions make another study"
            )
        missing = study.revise(new)
    finally:
        study.close()
    was, now = old.rules, new.rules
    names = [f"{printable(rules.name)} version {rules.version}" for rules in (now, was)]
    click.echo(f"{folder} goes on by {names[0]} (before: {names[1]})")
    click.echo("votes keep the version that they were given under")
    for sentence in missing:
        click.echo(f"note: {sentence}")
