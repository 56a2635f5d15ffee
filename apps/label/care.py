"""``diffalign label doctor``, ``backup``, ``upgrade`` and ``revise``: looking after a study."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import click
import psutil

from apps.reported import printable
from diffalign.study import Protocol, Study
from diffalign.study.inspection import Finding

NETWORK = {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "sshfs", "fuse.sshfs", "9p", "glusterfs"}
NETWORK |= {"ceph", "fuse.ceph", "lustre", "beegfs", "gpfs", "davfs", "fuse.davfs2", "afs"}
"""File systems over a network: SQLite's locks and its log cannot be relied on there."""
LEAST_FREE = 2**30


def doctor(folder: Path, database: str | None) -> int:
    """Prints what was looked at; 0 if all is well, else 1."""
    study = Study.open(folder, database)
    try:
        findings = [*study.inspect(), *surroundings(study)]
    finally:
        study.close()
    for finding in findings:
        click.echo(f"{'ok      ' if finding.ok else 'PROBLEM '} {finding.what}: {finding.detail}", err=not finding.ok)
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
        yield Finding("accounts", True, "there are none yet: diffalign label users add")
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
    """Copies a study that may be in use, with its accounts."""
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


def revise(folder: Path, protocol: str, database: str | None) -> None:
    """Gives a study a new version of its protocol."""
    study = Study.open(folder, database)
    try:
        new = Protocol.load(protocol)
        old = study.protocol()
        missing = study.revise(new)
    finally:
        study.close()
    was, now = old.rules, new.rules
    names = [f"{printable(rules.name)} version {rules.version}" for rules in (now, was)]
    click.echo(f"{folder} goes on by {names[0]} (before: {names[1]})")
    click.echo("votes keep the version that they were given under")
    for sentence in missing:
        click.echo(f"note: {sentence}")
