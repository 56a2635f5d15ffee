"""What a dataset's report says in words: the verdict, what the numbers do not show, and what it was made with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from apps.dataset_features import WORLDS
from apps.dataset_report_cases import Cases
from apps.dataset_report_measures import Measured
from diffalign.synthesis import alignment, card, fidelity
from diffalign.synthesis.cases import Manifest
from diffalign.synthesis.release import Release
from diffalign.synthesis.spec import GATES, Spec
from diffalign.synthesis.store import Acceptance, Generated

HARD = 0.5
"""A stratum of whose attempts fewer became cases is named among the limitations."""
NAMED = 3
KINDS = {"passed": "good", "failed": "alarm", "not assessed": "unknown"}
OFF = {
    "blank": "Empty images and texts were not looked for.",
    "reward": "No reward had to be reached, so nothing checked whether images and texts show what their rows say.",
    "duplicate": "Cases that are alike were not looked for.",
    "memorised": "No case was compared with training images while the dataset was made.",
}


def verdict(found: Release) -> dict[str, str]:
    """Kind, heading and text of the verdict on privacy, and what follows from it."""
    title = {
        "passed": "Privacy: passed what was measured",
        "failed": "Privacy: failed",
        "not assessed": "Privacy: not assessed",
    }[found.verdict]
    text = found.why[:1].upper() + found.why[1:] + ("" if found.why.endswith(".") else ".")
    follows = {
        "passed": "diffalign export hands it out. Whether it may be given to somebody is still for a person to decide.",
        "failed": "diffalign export refuses it. Handle it like the data that its models were trained on.",
        "not assessed": "diffalign export refuses it. Until it is assessed, it may hold copies of training data.",
    }[found.verdict]
    return {"kind": KINDS[found.verdict], "title": title, "text": text, "follows": follows}


def hint(manifest: Manifest) -> str:
    """The command that measures what is missing, to be given in the dataset's folder."""
    image = manifest.models.get("image") or {}
    world = str(image.get("base", image.get("name", ""))).removeprefix("embedded:")
    known = world in WORLDS and str(image.get("base", image.get("name"))).startswith("embedded:")
    real, training = (f"world:{world}",) * 2 if known else ("REAL_IMAGES", "TRAINING_IMAGES")
    model = " --model RUN" if image.get("adapter") else ""
    return f"diffalign evaluate . --against {real} --training {training}{model}"


def limitations(made: Generated, cases: Cases, measured: Measured) -> list[str]:
    """What the dataset and the numbers do not show, each drawn from what is known of them."""
    manifest = made.manifest
    return [
        *card.LIMITATIONS,
        *_gates(manifest),
        *_unlooked(manifest),
        *_strata(cases.acceptance),
        *_models(manifest),
        *_measured(made, cases, measured),
        "Not for diagnosis, nor for any decision about a person.",
    ]


def _gates(manifest: Manifest) -> Iterator[str]:
    """Gates that were off, and what it means that a reward was one."""
    there = {str(gate.get("gate")) for gate in manifest.gates}
    images = "image" in manifest.models
    for name in GATES:
        if name not in there and name in OFF and (images or name not in ("duplicate", "memorised")):
            yield f"There was no gate {name}. {OFF[name]}"
    floors = list(dict.fromkeys(str(gate.get("reward")) for gate in manifest.gates if gate.get("gate") == "reward"))
    if floors:
        yield (
            f"Cases were chosen by {_listed(floors)}: their scores are high by construction, and where"
            f" {'it errs' if len(floors) == 1 else 'one of them errs'} the dataset errs too."
        )


def _unlooked(manifest: Manifest) -> Iterator[str]:
    """Parts of a case that no reward judged."""
    judged = {str(facts.get("modality")) for facts in manifest.rewards.values()}
    for part in manifest.models:
        if part not in judged:
            yield f"No reward judged the {part}s."


def _strata(found: Mapping[str, Acceptance]) -> Iterator[str]:
    if len(found) > 1:
        few = [name for name, one in found.items() if one.accepted < fidelity.LEAST]
        if few:
            yield (
                f"{_count(few, found)} fewer than {fidelity.LEAST} cases, too few to be measured by themselves:"
                f" {_some(few)}."
            )
    hard = [name for name, one in found.items() if one.accepted < HARD * one.attempts]
    if hard:
        hard.sort(key=lambda name: found[name].accepted / found[name].attempts)
        yield (
            f"In {len(hard)} of {len(found)} {'stratum' if len(found) == 1 else 'strata'} fewer than half of the"
            f" attempts became cases: {_some(hard)}. What is left is what the gates let through, and may be easier"
            " than what was asked for."
        )


def _count(few: list[str], found: Mapping[str, Acceptance]) -> str:
    return f"All {len(found)} strata have" if len(few) == len(found) else f"{len(few)} of {len(found)} strata have"


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return "; ".join(names[:NAMED]) + more


def _models(manifest: Manifest) -> Iterator[str]:
    for part, model in manifest.models.items():
        name = model.get("name", "a model")
        said = str(model.get("training_data") or "").replace("`", "").rstrip(".")
        told = f"was trained on {said[:1].lower() + said[1:]}" if said else "does not state what it was trained on"
        more = "" if said else ", so nobody can tell from here whose data may be in the dataset"
        basis = "" if model.get("lawful_basis") or not said else " On which lawful basis is not stated here."
        yield f"{name}, which made the {part}s, {told}{more}.{basis}"


def _measured(made: Generated, cases: Cases, measured: Measured) -> Iterator[str]:
    if not measured.against:
        yield "The images were not compared with real ones: how like these they are is not known."
        return
    if measured.encoder.startswith("embedded:clip"):
        yield (
            "Fidelity is seen through embedded:clip, a small encoder that was trained on drawn scenes of this project;"
            " what it does not see does not count. Its numbers cannot be compared with published ones."
        )
    yield from (note for note in measured.notes if "depend on" in note)
    if measured.too_few:
        shown = measured.too_few
        yield (
            f"{len(shown)} {'group has' if len(shown) == 1 else 'groups have'} fewer than {fidelity.LEAST} cases,"
            f" synthetic or real, and {'was' if len(shown) == 1 else 'were'} not measured: {_some(list(shown))}."
        )
    if "text" in made.parts:
        yield "Only images were compared with real ones; the texts were not."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def facts_of(manifest: Manifest, spec: Spec | None) -> list[tuple[str, list[str]]]:
    """What it takes to make the same dataset again: names, and lines of what is known."""
    seed = str(spec.seed) if spec else "as in the specification"
    return [
        ("Specification", [f"SHA-256 {manifest.spec_sha256}"]),
        ("Seed", [f"{seed}; those of images and texts follow from the specification, the row and the attempt"]),
        ("Begun on", [manifest.created]),
        *((f"Model of the {part}s", _lines(model)) for part, model in manifest.models.items()),
        *((f"Reward {name}", _lines(facts)) for name, facts in manifest.rewards.items()),
        ("Gates", [line for gate in manifest.gates for line in _lines(gate)]),
        ("Versions", [_flat(manifest.versions)]),
    ]


def aligned(manifest: Manifest) -> list[dict[str, Any]]:
    """Of each model that was aligned: the part that it makes, a sentence, and what changed on held-out prompts."""
    return [
        {
            "part": part,
            "said": alignment.sentence(facts),
            "won": alignment.won(facts),
            "changes": alignment.changes(facts),
        }
        for part, model in manifest.models.items()
        if isinstance(facts := model.get(alignment.FIELD), Mapping)
    ]


def _lines(facts: Mapping[str, Any]) -> list[str]:
    """Plain facts on one line, and each group of facts on a line of its own; a card says the rest at length."""
    apart = ("training_data", "lawful_basis", alignment.FIELD)
    there = {name: v for name, v in facts.items() if v is not None and v != "" and name not in apart}
    plain = {name: value for name, value in there.items() if not isinstance(value, Mapping)}
    groups = [f"{name}: {_flat(value)}" for name, value in there.items() if isinstance(value, Mapping) and value]
    return [_flat(plain), *groups]


def _flat(facts: Mapping[str, Any]) -> str:
    # A hash says what it is, and so does what stands for the hash of code: the version of a package.
    parts = (_plain(value) if name == "sha256" else f"{name.replace('_', ' ')} {_plain(value)}"
             for name, value in facts.items())  # fmt: skip
    return ", ".join(parts)


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return " to ".join("…" if one is None else str(one) for one in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
