"""The dataset card: ``README.md`` with the header that the Hugging Face hub reads.

Texts of the dataset (names of columns, strata, models, reasons) come from its maker and are escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from diffalign.synthesis import alignment, provenance
from diffalign.synthesis.store import Acceptance

if TYPE_CHECKING:
    from diffalign.synthesis.exports import Exported

LONGEST = 200
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_PATTERNS = {"parquet": "data/{split}-*", "imagefolder": "data/{split}/**", "webdataset": "data/{split}-*.tar"}
"""Files of a split, for the formats that ``datasets`` loads by the card."""
_READING = {
    "parquet": 'datasets.load_dataset("DIR")',
    "imagefolder": 'datasets.load_dataset("imagefolder", data_dir="DIR/data")',
    "webdataset": 'webdataset.WebDataset("DIR/data/train-00000-of-00001.tar").decode("pil")',
    "dicom": 'pydicom.dcmread("DIR/data/train/00000/00000000.dcm")',
    "png": 'csv.DictReader(open("DIR/data/rows.csv", newline=""))',
}
_NOTES = {
    "png": "A table reader that guesses types takes the text 007 for the number 7, and NA for an empty cell:"
    ' `pandas.read_csv("DIR/data/rows.csv", dtype=str, keep_default_na=False)` keeps each cell as it is, and the table'
    " below has the types."
}
TEXTS = " (not of its texts: these were NOT ASSESSED)"
PERSONS = {
    "axes": "No record belongs to a person; models made everything.",
    "table": "**The table rows were given, not made, and may be those of real people.** Models made the rest.",
    "unknown": "**Whether the table rows are those of real people is not known.** Models made the rest.",
}
"""Whose the records are, by ``Manifest.rows_from``."""
LIMITATIONS = (
    "A row says what its image and text were asked to show. The gates checked some of that, and gates are wrong at"
    " times.",
    "What was not asked for is as the models make it: their biases and blind spots are in the data.",
    "Few cases were looked at by a person, or none. Agreement with a reward that the model was trained on says little.",
    "Splits are by case: no case stands in two of them. All come from the same models, so a test split of synthetic"
    " cases does not say how well something works on real ones.",
)


def text(about: Exported, acceptance: Mapping[str, Acceptance]) -> str:
    """The card of an export."""
    return _header(about) + "\n".join(_body(about, acceptance)) + "\n"


def _header(about: Exported) -> str:
    count = sum(about.layout.splits.values())
    size = next((name for limit, name in _SIZES if count < limit), "n>1M")
    facts: dict[str, Any] = {
        "pretty_name": about.dataset.name,
        "license": "other",
        "license_name": "licences-of-the-models",
        "size_categories": [size],
        "tags": ["synthetic", "diffalign"],
    }
    if pattern := _PATTERNS.get(about.form):
        files = [{"split": split, "path": pattern.format(split=split)} for split in about.layout.splits]
        facts["configs"] = [{"config_name": "default", "data_files": files}]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=False)}---\n\n"


def _body(about: Exported, acceptance: Mapping[str, Acceptance]) -> Iterator[str]:
    layout, manifest = about.layout, about.dataset
    count = sum(layout.splits.values())
    parts = [name for name, there in (("an image", layout.images), ("a text", layout.texts)) if there]
    whole = f"{', '.join(parts)} and a table row" if parts else "a table row"
    yield f"# {escaped(manifest.name)}\n"
    yield _warning(about)
    yield f"{count} synthetic cases. Each is {whole}."
    yield f"{PERSONS.get(manifest.rows_from, PERSONS['unknown'])} Begun on {escaped(manifest.created)}.\n"
    yield "## How to read it\n"
    yield f"Format: `{about.form}`. `{_READING[about.form]}` reads it. `diffalign verify DIR` checks every file."
    if note := _NOTES.get(about.form):
        yield note
    yield "`provenance.jsonl` tells of each case how it was made; `manifest.json` holds what is the same for all.\n"
    yield from _table(("Column", "Type"), layout.kinds.items())
    yield from _table(("Split", "Cases"), layout.splits.items())
    yield "## How it was made\n"
    yield f"Specification: SHA-256 `{escaped(manifest.spec_sha256)}`. Seeds follow from it, the row and the attempt.\n"
    for part, model in manifest.models.items():
        yield f"Model of the {escaped(part)}:\n"
        facts = model if isinstance(model, Mapping) else {}
        yield from _facts({name: value for name, value in facts.items() if name != alignment.FIELD})
        yield from _aligned(part, facts.get(alignment.FIELD))
    for name, facts in manifest.rewards.items():
        yield f"Reward {escaped(name)}:\n"
        yield from _facts(facts)
    yield f"Versions: {', '.join(f'{escaped(k)} {escaped(v)}' for k, v in manifest.versions.items())}.\n"
    yield "## Gates and acceptance\n"
    yield from _gates(manifest.gates, acceptance)
    yield "## Privacy and governance\n"
    yield from _governance(about)
    yield "## Intended use and limitations\n"
    yield "For research: to train and test methods beside real data, to balance what is rare, to share examples where"
    yield "real ones cannot be shared. Not for diagnosis, nor for any decision about a person.\n"
    yield "".join(f"- {limitation}\n" for limitation in LIMITATIONS)
    yield "## Licence\n"
    yield "This dataset states no licence of its own: whoever hands it out chooses one that those of the models allow."
    yield from ("", *_table(("Model", "Licence"), provenance.licences(manifest).items()))


def _aligned(part: str, facts: object) -> Iterator[str]:
    """What a model was aligned to, and what that changed on held-out prompts."""
    if not isinstance(facts, Mapping):
        return
    said = f"The model of the {part} was {alignment.sentence(facts)}."
    yield f"{escaped(said)} {escaped(alignment.won(facts))}\n"
    if found := alignment.changes(facts):
        yield "On held-out prompts, as its own run measured it:\n"
        rows = (
            (one.reward, "yes" if one.trained_on else "no", one.before, one.after, f"{one.difference} ({one.interval})")
            for one in found
        )
        yield from _table(("Reward", "Trained on it", "Before", "After", "Difference (95 % interval)"), rows)


def _warning(about: Exported) -> str:
    """The first lines: what somebody has to know who reads nothing else."""
    found = about.release
    said = {
        "passed": f"The privacy report of this dataset{TEXTS if about.layout.texts else ''} passed its tests."
        " That is no proof of anonymity.",
        "failed": "**The privacy report of this dataset FAILED.** Handle it like the data its models were trained on.",
        "not assessed": "**The privacy of this dataset was NOT ASSESSED.** It may hold copies of training data.",
    }[found.verdict]
    # Each part by itself: together they may be longer than a text that comes from a dataset may be.
    lines = [said, *(["; ".join(escaped(part) for part in found.why.split("; "))] if found.why else [])]
    if found.allowed_unsafe:
        lines.append("It was exported nevertheless, by --allow-unsafe.")
    return "".join(f"> {line}\n" for line in lines)


def tallied(gates: Sequence[Mapping[str, Any]], acceptance: Mapping[str, Acceptance]) -> dict[str, int]:
    """What each gate rejected, in their order, those that rejected nothing too."""
    found = {gate_name(gate): 0 for gate in gates}
    for one in acceptance.values():
        for name, count in one.rejected.items():
            found[name] = found.get(name, 0) + count
    return found


def gate_name(gate: Mapping[str, Any]) -> str:
    """How the journal calls a gate: by its kind, or by the reward, or the part of one, that it looks at."""
    if gate.get("gate") != "reward":
        return str(gate.get("gate"))
    return f"{gate.get('reward')}/{gate['part']}" if gate.get("part") else str(gate.get("reward"))


def _gates(gates: Sequence[Mapping[str, Any]], acceptance: Mapping[str, Acceptance]) -> Iterator[str]:
    if not gates:
        yield "No gate was set: every attempt was accepted.\n"
    rejected = tallied(gates, acceptance)
    yield "".join(
        f"{number}. {escaped(_plain(gate))}; rejected {rejected[gate_name(gate)]}\n"
        for number, gate in enumerate(gates, 1)
    )
    rows = (
        (
            name, found.wanted, found.accepted, found.attempts,
            ", ".join(f"{gate} {count}" for gate, count in found.rejected.items()) or "none",
        )
        for name, found in acceptance.items()
    )  # fmt: skip
    yield from _table(("Stratum", "Wanted", "Accepted", "Attempts", "Rejected by gate"), rows)


def _governance(about: Exported) -> Iterator[str]:
    yield "Synthetic is not automatically anonymous: a model can repeat what it was trained on. Whether these data may"
    yield "be used depends on the models' training data and on the lawful basis on which those were used.\n"
    for part, model in about.dataset.models.items():
        facts = model if isinstance(model, Mapping) else {}
        for name, words in (("training_data", "training data"), ("lawful_basis", "lawful basis of the training")):
            said = facts.get(name) or f"not stated with this dataset; see the card of {facts.get('name', 'the model')}"
            yield f"- Model of the {escaped(part)}, {words}: {escaped(said)}"
    texts = about.layout.texts and about.release.verdict == "passed"
    yield f"\nPrivacy report: {about.release.verdict}{TEXTS if texts else ''}.\n"
    yield from _facts(about.release.measures)


def _facts(facts: object) -> Iterator[str]:
    if isinstance(facts, Mapping) and facts:
        yield from _table(("", ""), _flat(facts))


def _flat(facts: Mapping[str, object], before: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of every fact; those of a part stand below its name."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} / ")
        else:
            yield f"{before}{name}", _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(part)}" for name, part in value.items())
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _table(names: Sequence[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield f"|{' --- |' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(escaped(cell) for cell in row)} |"
    yield ""


def escaped(value: object) -> str:
    """A text on one line, cut where it is long, that Markdown and HTML show as it is."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&$])", r"\\\1", line)
