"""``diffalign verify`` and ``diffalign export``: whether a dataset is as it was made, and handing it out."""

from __future__ import annotations

from pathlib import Path

import click

from apps.reported import printable
from diffalign.errors import InputError
from diffalign.synthesis import exports, release
from diffalign.synthesis.exports import pixels
from diffalign.synthesis.store import Generated
from diffalign.synthesis.verify import verify as checks


def verify(folder: Path) -> None:
    """Prints a line for each check, and one for each fault; raises InputError with the first fault."""
    first = ""
    for check in checks(folder):
        click.echo(f"{'FAILED' if check.faults else 'ok':<8}{check.name:<16} {printable(check.told)}".rstrip())
        for fault in check.faults:
            click.echo(f"        {printable(fault)}")
        first = first or next(iter(check.faults), "")
    if first:
        raise InputError(f"{folder} is not as it was made: {first}")


def export(folder: Path, form: str, out: Path | None, *, allow_unsafe: bool, grey: bool = False) -> None:
    """Writes the dataset in a format, by default into its own folder, and says where and what is known of it."""
    source = Generated.open(folder)
    try:
        out = exports.export(source, form, out or folder / "export" / form, allow_unsafe=allow_unsafe, grey=grey)
        nearly = form == "dicom" and not grey and pixels.nearly_grey(source)
    finally:
        source.close()
    click.echo(f"{out}: {form}, privacy {release.read(folder).verdict}; see its {exports.CARD}")
    if nearly:
        click.echo(
            "its images are stored as RGB, though they are grey but for a few levels of noise between the channels;"
            " --grey stores their luminance, as MONOCHROME2", err=True,
        )  # fmt: skip
