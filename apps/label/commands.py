"""The commands of ``diffalign label``. As in ``apps.cli``, heavy imports live inside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from apps.reported import printable, reported


@click.group()
def label() -> None:
    """Let people compare images and texts in a browser, and keep what they say.

    STUDY is a folder: init makes it, serve opens it to raters, export writes what they said.
    """


STUDY = click.argument("study", type=click.Path(path_type=Path))
DATABASE = click.option(
    "--database",
    metavar="URL",
    envvar="DIFFALIGN_LABEL_DATABASE",
    show_envvar=True,
    help="postgresql://… of the study.",
)
HOURS = click.IntRange(1, 8760)
USERS = click.option("--users", type=click.Path(path_type=Path), help="Accounts.  [default: STUDY/users.json]")


@label.command()
@STUDY
@click.option("--from", "sources", multiple=True, required=True, metavar="SOURCE", help="As above; repeatable.")
@click.option(
    "--protocol", required=True, metavar="NAME|FILE", help="What raters are told and asked (docs/protocols.md)."
)
@click.option("--title", default="", help="What raters see as the name of the study.  [default: none]")
@click.option("--against", metavar="MODEL|RUN", help="One more model to compare with.")
@click.option("--prompts", metavar="N|FILE", help="How many prompts, or a file of them; for models.")
@click.option(
    "--split",
    type=click.Choice(["train", "held-out"]),
    help="Which prompts.  [default: held-out; train for one model alone]",
)
@click.option("--pairs", type=click.IntRange(1), help="How many pairs.  [default: all, or each prompt once]")
@click.option("--gold", type=click.Path(path_type=Path), help="Pairs with known answers, which test raters.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of samples and of the order.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=C",
    help="Change one field of how models and runs sample; repeatable. Of no use to folders and files.",
)
@DATABASE
@reported
def init(
    study: Path, protocol: str, title: str, gold: Path | None, pairs: int | None, database: str | None, **given: Any
) -> None:
    """Make a study of pairs.

    A SOURCE is a RUN (beside its base model), a MODEL (embedded:NAME, a folder or a hub id; alone: two seeds of each
    prompt), a DATASET of `diffalign generate` (two cases of one prompt), a FOLDER with a subfolder of images per arm
    (files of one name are of one prompt), or a FILE of pairs: any form in docs/preferences.md, or rows of prompt,
    image_0, image_1 or prompt, text_0, text_1. Several models are compared with each other, on the same prompts and
    seeds.
    """
    from apps.label import material

    request = material.Request(gold=gold, count=pairs, **given)
    material.run(study, protocol, title, database, request)


@label.command(name="serve")
@STUDY
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@USERS
@click.option("--no-auth", is_flag=True, help="One rater without a login; on this machine only.")
@click.option(
    "--oidc", type=click.Path(path_type=Path), help="YAML file: let an OpenID Connect provider log people in."
)
@click.option("--https", is_flag=True, help="A reverse proxy in front speaks https to browsers.")
@click.option("--proxy", metavar="ADDRESS", help="Of the reverse proxy, whose word on who asks is believed.")
@click.option("--hours", default=12, show_default=True, type=HOURS, help="A login ends after so many.")
@click.option("--idle-hours", default=2, show_default=True, type=HOURS, help="And after so many without a request.")
@click.option("--access-log", is_flag=True, help="Log each request, without names.")
@DATABASE
@reported
def label_serve(study: Path, database: str | None, hours: int, idle_hours: int, **options: Any) -> None:
    """Serve the study to raters, until Ctrl-C (which is exit status 0 here)."""
    from apps.label import serve as server

    times = (hours, idle_hours)
    server.run(study, database, **options, hours=times, say=lambda text: click.echo(printable(text)))


@label.group()
def users() -> None:
    """Say who may log in, and as what: rater, adjudicator or admin."""


@users.command()
@STUDY
@click.argument("name")
@click.option("--role", type=click.Choice(["rater", "adjudicator", "admin"]), default="rater", show_default=True)
@click.option("--password-stdin", is_flag=True, help="Take the password from the standard input.")
@USERS
@reported
def add(study: Path, name: str, role: str, password_stdin: bool, users: Path | None) -> None:
    """Add somebody, or change the password and role."""
    from apps.label import users_command as command

    command.add(command.path(study, users), name, role, password_stdin)  # type: ignore[arg-type]


@users.command()
@STUDY
@click.argument("name")
@USERS
@reported
def remove(study: Path, name: str, users: Path | None) -> None:
    """Take an account away; votes stay."""
    from apps.label import users_command as command

    command.remove(command.path(study, users), name)


@users.command(name="list")
@STUDY
@USERS
@reported
def list_users(study: Path, users: Path | None) -> None:
    """List accounts with their roles."""
    from apps.label import users_command as command

    command.show(command.path(study, users))


@label.command()
@STUDY
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option(
    "--format",
    "form",
    default="preferences",
    show_default=True,
    type=click.Choice(["preferences", "pick-a-pic", "trl", "kto", "scores", "points"]),
    help="See docs/labelling.md.",
)
@click.option("--final", is_flag=True, help="One verdict per pair: the adjudicator's, or else the mean of the votes.")
@click.option("--criterion", help="Only this one.  [default: all in preferences, overall elsewhere]")
@click.option("--kind", type=click.Choice(["image", "text"]), help="Which pairs, where the study has both.")
@DATABASE
@reported
def export(study: Path, out: Path, form: str, database: str | None, **options: Any) -> None:
    """Write what raters said. Gold, repeats and pairs of a sample with itself are left out and counted."""
    from apps.label import exporting
    from diffalign.study import Study

    opened = Study.open(study, database)
    try:
        exporting.run(opened, out, form, **options)
    finally:
        opened.close()


@label.command()
@STUDY
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with plots.")
@DATABASE
@reported
def stats(study: Path, as_json: bool, html: Path | None, database: str | None) -> None:
    """Say how far the study is, how raters agree, and which arm is preferred."""
    from apps.label import stats as command

    command.run(study, database, as_json, html)


@label.command(name="doctor")
@STUDY
@DATABASE
@reported
def label_doctor(study: Path, database: str | None) -> None:
    """Check that a study is as it was written; exit status 1 if not."""
    from apps.label import care

    sys.exit(care.doctor(study, database))


@label.command()
@STUDY
@click.argument("folder", type=click.Path(path_type=Path))
@DATABASE
@reported
def backup(study: Path, folder: Path, database: str | None) -> None:
    """Copy a study to a new FOLDER while raters go on. A PostgreSQL database is backed up by pg_dump."""
    from apps.label import care

    care.backup(study, folder, database)


@label.command()
@STUDY
@click.option("--backed-up", is_flag=True, help="A PostgreSQL database was backed up by pg_dump just now.")
@DATABASE
@reported
def upgrade(study: Path, database: str | None, backed_up: bool) -> None:
    """Bring a study of an older release up to date. One in its folder is backed up first."""
    from apps.label import care

    care.upgrade(study, database, backed_up)


@label.command()
@STUDY
@click.option("--pair", "pairs", multiple=True, type=click.IntRange(1), help="Number of the pair; repeatable.")
@DATABASE
@reported
def unflag(study: Path, pairs: tuple[int, ...], database: str | None) -> None:
    """Take flagged pairs back into the study, with the votes that they had; without --pair, list them."""
    from apps.label import care

    care.unflag(study, pairs, database)


@label.command()
@STUDY
@click.option("--protocol", required=True, metavar="NAME|FILE", help="The new version.")
@DATABASE
@reported
def revise(study: Path, protocol: str, database: str | None) -> None:
    """Go on by a new version of the protocol; votes keep theirs."""
    from apps.label import care

    care.revise(study, protocol, database)


@label.command()
@STUDY
@click.option("--url", required=True, help="Where the study is served.")
@click.option("--rater", "files", multiple=True, required=True, metavar="NAME|FILE", help="Whose taste; repeatable.")
@click.option("--raters", "count", default=3, show_default=True, type=click.IntRange(1, 1000), help="How many.")
@click.option("--votes", type=click.IntRange(1), help="Most votes of each.  [default: until nothing is left]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of their noise.")
@USERS
@DATABASE
@reported
def simulate(study: Path, users: Path | None, database: str | None, **options: Any) -> None:
    """Let simulated raters vote over HTTP: no evidence about people, but a test of everything else.

    They get accounts of their own for as long as they work, and their votes are marked as simulated for good.
    """
    from apps.label import simulate as command
    from apps.label.users_command import path

    command.run(study, database, path(study, users), **options)
