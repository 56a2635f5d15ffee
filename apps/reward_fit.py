"""``diffalign reward fit``: from pairs that people judged to a reward model, and the card that says how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from apps import hashes, reward_fit_card
from apps.catalogue import find, fit_recipes
from apps.progress import Status
from diffalign.errors import ConfigError
from diffalign.fields import fields_of
from diffalign.preferences import read
from diffalign.runs import environment, require_empty, unused_folder, write_text
from pipelines.naming import FETCHED, embedded_models, locate, modality_of
from rewards import fit_data, fit_language, fit_lora, fit_measure, fit_model, fit_texts, language_model, language_reward
from rewards.clip import EMBEDDED, ClipReward
from rewards.fit import Fitted, check, fit
from rewards.fit_config import AnyFitConfig, FitConfig, Learning, TextFitConfig, dump, parse

KINDS = {"image": "preference", "text": "language-reward"}
"""The reward by which a fitted folder is named."""


def run(recipe: str, overrides: Sequence[str], out: Path | None) -> None:
    """Fits, measures, writes the folder and prints the essentials."""
    config = configuration(recipe, overrides)
    if config.name == "reward":
        config = config.model_copy(update={"name": Path(recipe).absolute().stem})
    path = out or unused_folder(Path("runs") / config.name)
    require_empty(path, "choose another --out")
    with Status() as status:
        card = fit_into(config, path, "card", status)
    write_text(path / "config.yaml", dump(config))
    _show(card)
    for line in card["data"]["defects"]:
        click.echo(f"broken: {line}", err=True)
    click.echo(f"reward: {KINDS[card['modality']]}?folder={path / 'reward'}\ncard:   {path / 'card.html'}")


def fit_into(config: AnyFitConfig, folder: Path, card_name: str, status: Status) -> dict[str, Any]:
    """Fits, and writes ``reward/`` and the card, as ``card_name`` with three suffixes, into a folder; returns the card.

    Nothing is written before all is fitted and measured.
    """
    if isinstance(config, TextFitConfig):
        card = _of_texts(config, folder, status)
    else:
        card = _of_images(config, folder, status)
    hashes_of = {"encoder": card["encoder"]["hash"], "data": card["data"]["digest"]}
    card |= {"held_out": config.held_out, "environment": environment(config.seed, hashes_of)}
    write_text(folder / f"{card_name}.json", json.dumps(card, indent=2, allow_nan=False) + "\n")
    reward_fit_card.write(folder, card_name, card)
    return card


def _of_images(config: FitConfig, folder: Path, status: Status) -> dict[str, Any]:
    pairs = read(config.preferences)
    encoder = ClipReward(config.encoder, device=config.device)
    eyes = fit_lora.Watched(encoder) if config.lora else None
    study = fit_data.gather(pairs, eyes or encoder, config.criteria, config.pixel_statistics, status)
    criteria = config.criteria or sorted(set(study.criterion))
    parts = fit_data.divide(study, config.held_out, config.seed)
    for criterion in criteria:
        check_parts(study, parts, criterion, config)
    tuned = fit_lora.tune(study, parts, criteria, config, config.lora, eyes, status) if config.lora and eyes else None
    seen, frozen, adapter = (tuned.study, study, tuned.adapter) if tuned else (study, None, None)
    fitted = fit_all(seen, parts, criteria, config, status)
    measured = {
        criterion: fit_measure.measure(seen, parts, criterion, fitted[criterion], config, status, frozen)
        for criterion in criteria
    }
    origin = config.encoder, encoder_hash(config.encoder)
    header = fit_model.write(
        folder / "reward", config.name, origin, encoder, study, parts, fitted, config.seed, adapter
    )
    return {
        "name": config.name,
        "modality": "image",
        "encoder": {"name": config.encoder, "hash": origin[1], "lora": _tuning(config, header, tuned)},
        "data": {"format": pairs.format, "digest": study.digest, "pairs": len(study), **_counts(study)}
        | {"images": len(study.images)},
        "ensemble": config.ensemble,
        "domain": header.domain.model_dump(),
        "criteria": measured,
    }


def _of_texts(config: TextFitConfig, folder: Path, status: Status) -> dict[str, Any]:
    pairs = read(config.preferences)
    where = locate(config.encoder)
    longest = min(config.max_tokens, language_model.context(language_model.headed(where, config.encoder)))
    tokenizer = language_model.read_tokenizer(where, config.encoder)
    reader = language_model.Reader(tokenizer, config.encoder, longest)
    study = fit_texts.gather(pairs, reader, config.criteria, status)
    if len(criteria := config.criteria or sorted(set(study.criterion))) > 1:
        raise ConfigError(
            f"a reward model of texts learns one criterion, and the pairs are judged by {', '.join(criteria)}: choose"
            " by criteria: [ONE]"
        )
    parts = fit_data.divide(study, config.held_out, config.seed)
    check_parts(study, parts, criteria[0], config)
    fitter = fit_language.Fitter(where, reader)
    train, tune = (study.rows_of(criteria[0], rows) for rows in (parts.train, parts.tune))
    fitted = fitter(study, train, tune, criteria[0], config, status)
    measured = fit_measure.measure(study, parts, criteria[0], fitted, config, status, refit=fitter)
    if fitted.length_coefficient:
        measured["length"]["taken_out"] = fitted.length_coefficient
    origin = config.encoder, hashes.snapshot(where) if isinstance(where, str) else hashes.of_folder(where)
    language_reward.write(folder / "reward", config, origin, fitted, criteria[0], len(train), study.digest)
    return {
        "name": config.name,
        "modality": "text",
        "encoder": {"name": config.encoder, "hash": origin[1], "lora": config.lora and config.lora.model_dump()},
        "data": {"format": pairs.format, "digest": study.digest, "pairs": len(study), **_counts(study)}
        | {"texts": len(study.tokens)},
        "ensemble": 1,
        "criteria": {criteria[0]: measured},
    }


def _tuning(config: FitConfig, header: fit_model.Header, tuned: fit_lora.Tuned | None) -> dict[str, Any] | None:
    """What the card says of a tuned encoder, None of a frozen one."""
    if config.lora is None or header.encoder.lora is None or tuned is None:
        return None
    learned = {"parameters": tuned.parameters, "best_epoch": tuned.best_epoch, "losses": tuned.losses}
    return config.lora.model_dump() | header.encoder.lora.model_dump() | learned


def in_words(card: Mapping[str, Any]) -> list[str]:
    """The essentials of a card as sentences: a line a criterion, then what the numbers say."""
    lines = [
        f"{name}: accuracy {accuracy}, raters agree {agreement}, best baseline {baseline}, calibration error {error}"
        for name, _, accuracy, agreement, baseline, error in reward_fit_card.overview(card)
    ]
    return [*lines, *reward_fit_card.findings(card)]


def configuration(recipe: str, overrides: Sequence[str]) -> AnyFitConfig:
    """The configuration of a recipe's name, a YAML file, or the folder of an earlier fit."""
    data, origin = fields_of(find(recipe, fit_recipes()), overrides, "preferences: pairs.parquet")
    return of_fields(data, origin)


def of_fields(data: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> AnyFitConfig:
    """The configuration of plain data: of images or of texts, as its encoder has it where it does not say."""
    encoder = data.get("encoder")
    if "modality" not in data and isinstance(encoder, str) and reads_texts(encoder):
        data = {**data, "modality": "text"}
    return parse(data, origin)


def reads_texts(encoder: str) -> bool:
    """Whether an encoder is a language model, as far as its name or folder says."""
    if encoder.startswith(FETCHED):
        return modality_of(encoder) == "text"
    if encoder.startswith("embedded:"):
        return encoder.removeprefix("embedded:") in embedded_models("text")
    folder = Path(encoder).expanduser()
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()


def check_parts(study: fit_data.Pairs, parts: fit_data.Parts, criterion: str, config: Learning) -> None:
    """Refuses a criterion that cannot be learned, stopped or measured, before any work is done."""
    if config.criteria is not None and len(set(config.criteria)) < len(config.criteria):
        raise ConfigError(f"criteria: one is named twice: {', '.join(config.criteria)}")
    for what, rows in (("learn from", parts.train), ("stop by", parts.tune), ("measure on", parts.measure)):
        check(study, study.rows_of(criterion, rows), criterion, what, side_bias=config.side_bias)


def fit_all(
    study: fit_data.Study, parts: fit_data.Parts, criteria: Sequence[str], config: FitConfig, status: Status
) -> dict[str, Fitted]:
    """The heads of every criterion."""
    return {
        criterion: fit(
            study,
            study.rows_of(criterion, parts.train),
            study.rows_of(criterion, parts.tune),
            criterion,
            config,
            status,
        )
        for criterion in criteria
    }


def encoder_hash(name: str) -> str:
    """Hash of the files of a local encoder, or the commit of one from the hub."""
    folder = EMBEDDED if name == "embedded:clip" else Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        return hashes.of_folder(folder)
    return hashes.snapshot(name.removeprefix("hf-hub:").partition("?")[0])


def _counts(study: fit_data.Pairs) -> dict[str, Any]:
    return {
        "broken": len(study.broken),
        "defects": study.broken.lines(),
        "prompts": len(set(study.group)),
        "raters": len(set(study.rater) - {""}),
        "ties": int((study.label == 0.5).sum()),
    }


def _show(card: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("criterion", "pairs", "accuracy", "raters agree", "best baseline", "calibration error"):
        table.add_column(heading, justify="left" if heading == "criterion" else "right")
    for row in reward_fit_card.overview(card):
        table.add_row(*row)
    Console(width=120).print(table)
    for sentence in reward_fit_card.findings(card):
        click.echo(sentence)
