"""The report of a run: ``RUN/report.html``, one page that needs nothing but itself.

Everything on it is read from the run directory. What is not there yet is said to be missing, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from apps import report_curves, report_diffusers, report_measures, report_pictures, warm_up_stage
from apps.charts import Mark
from apps.report_measures import Row, Win
from diffalign.config import RunConfig, load
from diffalign.runs import Run, write_text

TEMPLATES = Path(__file__).parent / "templates"
_PRIVATE = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://[^\s\"'<>]*"
    r"|(?<![\w.…~/\\-])(?:[A-Za-z]:[\\/]|\\\\|~[\w.-]*/|/(?=\S))(?:[^\"'<>:?&=|]*[\\/])?(?P<last>[^\"'<>:?&=|\\/]*)"
)


def write(run: Run) -> Path:
    """Writes the report of a run, finished or not, and returns its path."""
    path = run.path / "report.html"
    write_text(path, render(run))
    return path


def render(run: Run) -> str:
    """The page as text."""
    return page("report.html.j2", context(run))


def page(template: str, shown: Mapping[str, Any]) -> str:
    """A page from a template, with everything in it escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "number": report_measures.number,
        "percent": report_measures.percent,
        "public": public,
        "duration": duration,
    }
    return environment.get_template(template).render(shown)


def context(run: Run) -> dict[str, Any]:
    """What the template shows."""
    config = load(run.path / "config.yaml", made=True)
    rows = run.metrics()
    evaluation = _read(run.path / "evaluation.json")
    won = report_measures.win(evaluation)
    measures = report_measures.table(evaluation)
    name = str((evaluation.get("win_rate") or {}).get("by") or _main_name(config, rows))
    main = next((row for row in measures if row.depth == 0 and row.name == name), None)
    environment = _read(run.path / "environment.json")
    groups, tally = report_pictures.pairs(run.path / "samples", _sign(evaluation, name), config.seed)
    return {
        "config": config,
        "config_text": yaml.safe_dump(
            _public_tree(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True
        ),
        "place": place(run.path),
        "rewards": rewards(config),
        "reward_card": "reward-card.html" if (run.path / "reward-card.html").is_file() else "",
        "progress": progress(config, rows),
        "main": name,
        "sign": _sign(evaluation, name),
        "outcome": report_measures.outcome(main, won) if main else "",
        "base": base(config),
        "warmed": warmed(run.path / warm_up_stage.FOLDER),
        "measured": bool(evaluation),
        "judges": [row.name for row in measures if not row.trained_on and row.depth == 0],
        "verdict": verdict(evaluation, measures),
        "measures": measures,
        "win": won,
        "diversity": report_measures.diversity(evaluation),
        "perceived": report_measures.perceived(evaluation),
        "distances": report_measures.distances(evaluation, config.modality),
        "evaluation_seconds": report_measures.finite(evaluation.get("seconds")),
        "groups": groups,
        "tally": tally,
        "grids": report_pictures.grids(run.path / "samples"),
        "charts": charts(rows, evaluation, name, _marks(main, rows), base(config)),
        "environment": _public_tree(environment),
        "call": report_diffusers.call(config, environment.get("pipeline") or {}),
        "saved": next((kind for kind in ("adapter", "model") if (run.path / kind).is_dir()), None),
        "limitations": limitations(config, measures),
    }


def charts(
    rows: report_curves.Rows, evaluation: Mapping[str, Any], name: str, marks: Sequence[Mark], base: str
) -> list[report_curves.Chart]:
    """The reward over epochs, rewards over the distance, and what else was logged."""
    found = report_curves.curves(rows, name, marks, base)
    return [*found[:1], *report_curves.against_distance(rows, evaluation, base), *found[1:]]


def base(config: RunConfig) -> str:
    """What the aligned model is compared with, in words: after a warm-up it is what that left."""
    return "base model" if config.warm_up is None else "SFT model"


def warmed(folder: Path) -> str:
    """What the warm-up in this folder gained by itself, in a sentence; empty where it was not measured."""
    evaluation = _read(folder / "evaluation.json")
    measures = report_measures.table(evaluation)
    name = (evaluation.get("win_rate") or {}).get("by")
    main = next((row for row in measures if row.depth == 0 and row.name == name), None)
    return report_measures.outcome(main, None) if main else ""


def progress(config: RunConfig, rows: report_curves.Rows) -> dict[str, Any]:
    """How far training came, how long it took and when it ended."""
    last = max(report_curves.epochs(rows), default=0)
    seconds = sum(y for key, _ in report_curves.STAGES for _, y in report_curves.series(rows, key))
    times = [found for row in rows if (found := report_measures.finite(row.get("time"))) is not None]
    counts = report_curves.series(rows, "count/samples")
    return {
        "epochs": last,
        "done": last >= config.trainer.epochs,
        "samples": int(counts[-1][1]) if counts else last * config.trainer.samples_per_epoch,
        "seconds": seconds,
        "date": datetime.fromtimestamp(max(times), UTC).date().isoformat() if times else "",
    }


def verdict(evaluation: Mapping[str, Any], measures: Sequence[Row]) -> dict[str, str]:
    """Kind, heading and text of the verdict on over-optimisation."""
    if not evaluation:
        text = "The model was not evaluated yet, so nothing can be said about over-optimisation."
        return {"kind": "unknown", "title": "Not evaluated", "text": text}
    found = evaluation.get("verdict") or {}
    text = str(found.get("text") or "")
    if found.get("alarm"):
        text = "What got worse: " + text.removeprefix("Over-optimised: ")
        return {"kind": "alarm", "title": "Over-optimised", "text": text}
    judged = [row for row in measures if not row.trained_on and row.change and row.change[1] is not None]
    if not found or not judged:
        text = text or "The evaluation holds no verdict."
        return {"kind": "unknown", "title": "Over-optimisation cannot be ruled out", "text": text}
    text = text.removeprefix("No sign of over-optimisation: ")
    return {"kind": "good", "title": "No sign of over-optimisation", "text": text[:1].upper() + text[1:]}


def limitations(config: RunConfig, measures: Sequence[Row]) -> list[str]:
    """What the numbers do not show, in words."""
    prompts, seeds = config.prompts.held_out, config.evaluation.seeds_per_prompt
    found = [
        f"The evaluation has {prompts} held-out prompts with {seeds} {'seed' if seeds == 1 else 'seeds'} each. The"
        " 95\u00a0% intervals are bootstrap intervals over prompts: they cover which prompts and seeds were drawn, and"
        f" not what another training run would give. This is one run with seed {config.seed}.",
        "Rewards and checkers are programs. They misjudge some samples, and training finds out which. Look at the"
        " pairs, the losses above all, before you believe a number.",
        "Held-out prompts come from the same source as the training prompts. How the model does on other prompts was"
        " not measured.",
    ]
    if len(measures) > 4:
        found.append(
            f"{len(measures)} measures are compared. About one in twenty 95\u00a0% intervals leaves out the truth, so"
            " read a single clear part with care."
        )
    if measures and all(row.trained_on for row in measures):
        found.append(
            "Every measure here was trained on. Name others under evaluation.rewards to see what else training changed."
        )
    related = _related(measures)
    if related:
        found.append(
            f"{related} is close kin of a reward that was trained on: it may share its mistakes, so it is weaker"
            " evidence than an independent judge."
        )
    if config.prompts.source in ("brain-mr", "findings") or "brain-mr" in config.model:
        found.append(
            f"The {config.modality}s are synthetic and must not be used for diagnosis or for any decision about a"
            " patient. Neither the model nor the checker is a medical device, and the checker's judgement is not a"
            " clinician's."
        )
    if config.model.startswith("embedded:"):
        found.append(
            f"{config.model} is a small model. It shows that the method works, not how a large model would do."
        )
    return found


def rewards(config: RunConfig) -> str:
    """What was aligned to, in words: the optimised rewards with their weights, or whose judgements."""
    if not config.rewards:
        wanted = config.experience
        if wanted.rater is not None:
            return f"what the simulated raters {public(wanted.rater)} prefer"
        return f"the {wanted.source} in {public(wanted.path)}"
    if len(config.rewards) == 1 and config.rewards[0].weight == 1:
        return public(config.rewards[0].reward)
    return ", ".join(f"{public(entry.reward)} (weight {entry.weight:g})" for entry in config.rewards)


def place(path: Path) -> str:
    """The run directory as it can be shown: relative to the working directory, or its name alone."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.resolve().name


def public(text: object) -> str:
    """The text without absolute paths and addresses: of a path the last name stays, of an address the scheme."""

    def shortened(match: re.Match[str]) -> str:
        if match["scheme"]:
            return f"{match['scheme']}://…"
        return f"…/{match['last']}"

    return _PRIVATE.sub(shortened, str(text))


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _public_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public_tree(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public_tree(inner) for inner in value]
    return public(value) if isinstance(value, str) else value


def _main_name(config: RunConfig, rows: report_curves.Rows) -> str:
    """The optimised reward's name before there is an evaluation."""
    logged = next((key.removeprefix("held_out/") for row in rows for key in row if key.startswith("held_out/")), None)
    if not config.rewards:
        return logged or public(config.evaluation.rewards[0])
    return logged or (public(config.rewards[0].reward) if len(config.rewards) == 1 else "combined reward")


def _sign(evaluation: Mapping[str, Any], main: str) -> int:
    entry = (evaluation.get("rewards") or {}).get(main) or {}
    return -1 if entry.get("higher_is_better", True) is False else 1


def _marks(main: Row | None, rows: report_curves.Rows) -> list[Mark]:
    steps = report_curves.epochs(rows)
    if main is None or main.before is None or main.after is None or not steps:
        return []
    return [
        Mark("evaluation before, held-out prompts", 0, *report_measures.spanned(main.before)),
        Mark("evaluation after, held-out prompts", max(steps), *report_measures.spanned(main.after)),
    ]


def _related(measures: Sequence[Row]) -> str:
    """The held-out measures whose name begins like that of a trained one."""
    trained = [row.name for row in measures if row.trained_on and row.depth == 0]
    kin = [
        row.name
        for row in measures
        if not row.trained_on and row.depth == 0 and any(_kin(row.name, name) for name in trained)
    ]
    return " and ".join(kin)


def _kin(one: str, other: str) -> bool:
    return one.startswith(f"{other}-") or other.startswith(f"{one}-")


__all__ = ["Win", "context", "duration", "page", "public", "render", "write"]
