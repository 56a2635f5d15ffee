"""The card of a fitted reward model, ``card.md`` and ``card.html``: both say what ``card.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from apps import report, reward_fit_charts
from diffalign.runs import write_text

UNRELIABLE = 0.3
"""Reliability below which a rater is named: the mean is 1."""
ONE_SIDED = 0.7
"""Side bias, in log-odds, above which a rater is named: two times as often as the other side where nothing differs."""
CURVE_OF_HEADS = (
    "The encoder had been tuned to all training prompts for each point, so this is about the heads alone, and what more"
    " labels would do for the encoder is not known."
)
IT_PREDICTS = (
    "It predicts what raters like these would choose between two {what}s of one prompt. It does not say that {one} is"
    " good, right or safe.",
    "Scores of different prompts cannot be compared: pairs say nothing of how good a prompt's {what}s are on the"
    " whole.",
    "The accuracy holds for pairs like those that were judged. A generator that is optimised against this reward leaves"
    " them, so a rise of this reward alone proves nothing: look at measures that were not trained on.",
)
LIMITS = {
    "image": (
        *(line.format(what="image", one="an image") for line in IT_PREDICTS),
        "It cannot see what its encoder does not see, however many labels there are; all its heads share that"
        " blindness, and their doubt does not show it.",
        "It is no medical device. It must not be used to judge images of patients, or to decide on anyone's care.",
    ),
    "text": (
        *(line.format(what="text", one="a text") for line in IT_PREDICTS),
        "It knows no more of the world than the language model that it was fitted from: what reads well may be wrong.",
        "It is no medical device. It must not be used to judge reports of patients, or to decide on anyone's care.",
    ),
}
"""By modality, what a reward model must not be taken for."""


@dataclass(frozen=True)
class Section:
    """A heading, what to know about it, a table, and a chart that only the page shows."""

    heading: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    chart: Markup | None = None


def write(folder: Path, name: str, card: Mapping[str, Any]) -> None:
    """Writes ``NAME.md`` and ``NAME.html``."""
    write_text(folder / f"{name}.md", markdown(card))
    shown = {"card": card, "findings": findings(card), "sections": sections(card), "limits": LIMITS[card["modality"]]}
    write_text(folder / f"{name}.html", report.page("reward_card.html.j2", shown))


def overview(card: Mapping[str, Any]) -> list[list[str]]:
    """A row a criterion: name, pairs, accuracy, agreement of the raters, best baseline, calibration error."""
    rows = []
    for name, one in card["criteria"].items():
        best = _best_baseline(one)
        rows.append([
            name,
            " / ".join(str(one["pairs"][part]) for part in ("train", "tune", "measure")),
            share(one["accuracy"]),
            share(one["agreement"]) if one["agreement"]["value"] is not None else "not known",
            f"{one['baselines'][best]['value']:.1%}",
            f"{one['calibration']['expected_calibration_error']:.3f}",
        ])  # fmt: skip
    return rows


def findings(card: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    found = []
    for name, one in card["criteria"].items():
        found += [f"{name}: {sentence}" for sentence in _findings(one)]
    if broken := card["data"]["broken"]:
        found.append(f"{broken} rows could not be read and are left out.")
    if "domain" in card and (images := card["domain"]["held_out_images"]) < 1000:
        found.append(
            f"The 99.9 % quantile beyond which the clinician reward abstains stands on {images} held-out images: it is"
            " the largest distance among them."
        )
    return found


def _findings(one: Mapping[str, Any]) -> list[str]:
    accuracy, agreement, best = one["accuracy"], one["agreement"], _best_baseline(one)
    floor = one["baselines"][best]["value"]
    low, high = accuracy["ci95"] or (None, None)
    if low is None:
        found = [f"{accuracy['prompts']} prompts to measure on are too few for an interval."]
    else:
        than = "clearly better than" if low > floor else "not clearly better than"
        found = [f"it orders {share(accuracy)} of held-out pairs as raters did, {than} {best} ({floor:.1%})."]
    if agreement["value"] is None:
        found.append("how well raters agree is not known: no pair was judged twice by named raters.")
    elif high is not None and high < agreement["value"]:
        found.append(f"a second rater agrees more often, in {share(agreement)} of pairs: something is left to learn.")
    else:
        found.append(f"a second rater agrees in {share(agreement)} of pairs.")
    for rater, effect in one["raters"].items():
        who = f"rater {rater}" if rater else "the unnamed rater"
        if effect["reliability"] < UNRELIABLE:
            found.append(
                f"{who} answers almost at random (reliability {effect['reliability']:.2f}), and counts little."
            )
        if abs(effect["side_bias"]) > ONE_SIDED:
            side = "first" if effect["side_bias"] > 0 else "second"
            found.append(f"{who} favours the {side} side (log-odds {effect['side_bias']:+.2f}), which is left out.")
    if "length" in one:
        found.append(length_in_words(one))
    if "frozen_encoder" in one:
        found.append(tuning_in_words(one["frozen_encoder"]))
    if "learning_curve" in one:
        more = _more_labels(one)
        found.append(more[0].lower() + more[1:])
    return found


def length_in_words(one: Mapping[str, Any]) -> str:
    """What length has to do with the scores."""
    known = one["length"]
    if known["correlation"] is None or known["longer_preferred"] is None:
        return "the texts of a pair are equally long, so length decides nothing."
    groups = {g["value"]: g["accuracy"] for g in one["subgroups"] if g["by"] == "preferred text"}
    sides = [f"{share(groups[of])} where {of} was preferred" for of in ("the longer", "the shorter") if of in groups]
    text = (
        f"scores and length correlate by {known['correlation']:+.2f} within pairs, raters' answers and length by"
        f" {known['raters']:+.2f}; the longer text was preferred in {known['longer_preferred']:.1%} of pairs"
    )
    text += f", and it is right in {' and in '.join(sides)}." if sides else "."
    return f"{text} What length explained in training was taken out of the scores." if "taken_out" in known else text


def tuning_in_words(frozen: Mapping[str, Any]) -> str:
    """What the tuning of the encoder brought."""
    if frozen["accuracy"] is None:
        return "on the frozen encoder nothing could be learned; the tuned one sees what was judged."
    gain = frozen["gain"]
    if gain["ci95"] is None:
        return f"the frozen encoder reaches {share(frozen['accuracy'])}."
    low, high = gain["ci95"]
    than = "is better" if low > 0 else "is worse: leave lora out" if high < 0 else "makes no clear difference"
    return f"the frozen encoder reaches {share(frozen['accuracy'])}; tuning it {than} ({_points(gain)})."


def _points(gain: Mapping[str, Any]) -> str:
    interval = ", 95 % interval {:+.1f} to {:+.1f}".format(*(100 * end for end in gain["ci95"])) if gain["ci95"] else ""
    return f"{100 * gain['value']:+.1f} points{interval}"


def _more_labels(one: Mapping[str, Any]) -> str:
    """Would more labels help; of a tuned encoder the curve is not the whole answer."""
    said = str(one["learning_curve"]["more_labels"])
    return f"{said} {CURVE_OF_HEADS}" if "frozen_encoder" in one else said


def sections(card: Mapping[str, Any]) -> list[Section]:
    """Everything as tables."""
    header = (
        "criterion", "pairs: train / stop / measure", "pair accuracy", "a second rater agrees", "best baseline",
        "calibration error",
    )  # fmt: skip
    fitted = "heads" if card["modality"] == "image" else "model"
    note = (
        "Accuracy is the share of decided, held-out pairs that the model orders as the rater did; half of what is held"
        f" out stopped and calibrated the {fitted}, the other half is measured on. Intervals are 95 %, by resampling"
        " prompts. A second rater's agreement is what can be expected of a model; one that knows the majority can be a"
        " little above it."
    )
    made = [Section("Criteria", note, header, overview(card))]
    for name, one in card["criteria"].items():
        made += _of_criterion(name, one)
    return [*made, _facts(card)]


def _of_criterion(name: str, one: Mapping[str, Any]) -> list[Section]:
    accuracy, counted = one["accuracy"], one["calibration"]
    rows = [["this model", share(accuracy), str(accuracy["n"])]]
    rows += [[judge, share(found), str(found["n"])] for judge, found in one["baselines"].items()]
    ties = one["ties"]
    predicted = "not modelled" if ties["predicted"] is None else f"{ties['predicted']:.1%} predicted"
    made = [
        Section(f"{name}: against judges that were not taught", "", ("judge", "pair accuracy", "pairs"), rows),
        Section(
            f"{name}: calibration",
            f"Expected calibration error {counted['expected_calibration_error']:.3f}, temperature"
            f" {counted['temperature']:.2f}; ties: {ties['share']:.1%} seen, {predicted}.",
            ("predicted", "seen", "pairs"),
            [[f"{row['predicted']:.2f}", f"{row['seen']:.2f}", str(row["n"])] for row in counted["bins"]],
            reward_fit_charts.reliability(counted["bins"], f"{name}: how often the preferred side was chosen"),
        ),
    ]
    if "frozen_encoder" in one:
        made.append(_tuned(name, one))
    if "learning_curve" in one:
        points = one["learning_curve"]["points"]
        made.append(
            Section(
                f"{name}: would more labels help?",
                _more_labels(one),
                ("training prompts", "pairs", "pair accuracy"),
                [
                    [
                        str(p["prompts"]),
                        str(p["pairs"]),
                        share(p["accuracy"]) if p["accuracy"] else "nothing was learned",
                    ]
                    for p in points
                ],
                reward_fit_charts.learning(points, f"{name}: accuracy over training prompts"),
            )
        )
    if one["subgroups"]:
        rows = [[g["by"], g["value"], share(g["accuracy"]), str(g["accuracy"]["n"])] for g in one["subgroups"]]
        note = "Groups of ten decided pairs or more. Many groups: some look worse by chance."
        made.append(Section(f"{name}: subgroups", note, ("by", "value", "pair accuracy", "pairs"), rows))
    rows = [
        [rater or "(not known)", f"{effect['reliability']:.2f}", f"{effect['side_bias']:+.2f}"]
        for rater, effect in one["raters"].items()
    ]
    note = "Reliability: 1 is the mean, 0 answers at random. Side bias: log-odds of the first where nothing differs."
    return [*made, Section(f"{name}: raters", note, ("rater", "reliability", "side bias"), rows)]


def _tuned(name: str, one: Mapping[str, Any]) -> Section:
    """The tuned beside the frozen encoder."""
    accuracy, frozen = one["accuracy"], one["frozen_encoder"]
    rows = [["tuned encoder", share(accuracy), str(accuracy["n"])]]
    if frozen["accuracy"] is None:
        rows.append(["frozen encoder", "nothing was learned", ""])
    else:
        rows.append(["frozen encoder", share(frozen["accuracy"]), str(frozen["accuracy"]["n"])])
        rows.append(["difference", _points(frozen["gain"]), str(accuracy["n"])])
    note = (
        "Heads fitted alike on what the encoder sees after its image tower was tuned to the training pairs, and as it"
        " was before."
    )
    return Section(f"{name}: what tuning the encoder brought", note, ("heads on the", "pair accuracy", "pairs"), rows)


def _facts(card: Mapping[str, Any]) -> Section:
    data, domain, versions = card["data"], card.get("domain"), card["environment"]["versions"]
    library = "open_clip_torch" if domain else "transformers"
    source = f"{report.public(card['encoder']['name'])} ({card['encoder']['hash']})"
    if card["modality"] == "text":
        fitted = [["fitted from", source], ["what was trained", _lora(card)]]
    else:
        heads = ["heads a criterion", str(card["ensemble"])]
        fitted = [["encoder", source], ["tuning of the encoder", _lora(card)], heads]
    known = []
    if domain:
        known = [["known images", f"{domain['train_images']} in training, {domain['held_out_images']} held out"]]
    rows = [
        ["pairs", f"{data['pairs']} ({data['ties']} ties), {data['broken']} rows broken; {data['format']}"],
        ["prompts or cases", str(data["prompts"])],
        ["different images", str(data["images"])] if "images" in data else ["different texts", str(data["texts"])],
        ["raters", str(data["raters"])],
        ["held out", f"{card['held_out']:.0%} of the prompts"],
        *fitted,
        ["data", data["digest"]],
        *known,
        ["versions", ", ".join(f"{name} {versions[name]}" for name in ("diffalign", "torch", library))],
    ]
    return Section("How it was made", "", ("what", ""), rows)


def _lora(card: Mapping[str, Any]) -> str:
    lora: Mapping[str, Any] | None = card["encoder"]["lora"]
    if card["modality"] == "text":
        if lora is None:
            return "every weight, with a scalar head on the last token"
        layers = ", ".join(lora["targets"] or ["every linear layer"])
        return f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}, on {layers}, and a scalar head"
    if lora is None:
        return "none: it is frozen"
    which = f"those named {', '.join(lora['targets'])}" if lora["targets"] else "all"
    return (
        f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}, on {lora['layers']} layers of the image tower"
        f" ({which}), {lora['parameters']} numbers, best after {lora['best_epoch']} epochs ({lora['weights']})"
    )


def markdown(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    lines = [f"# Reward model {card['name']}", "", *(f"- {_cell(sentence)}" for sentence in findings(card)), ""]
    for section in sections(card):
        lines += [f"## {_cell(section.heading)}", ""]
        lines += [_cell(section.note), ""] if section.note else []
        lines += [_row(section.header), _row(["---"] * len(section.header)), *map(_row, section.rows), ""]
    lines += ["## What it must not be used for", "", *(f"- {limit}" for limit in LIMITS[card["modality"]]), ""]
    return "\n".join(lines)


def share(found: Mapping[str, Any]) -> str:
    """A share with its interval."""
    if found["value"] is None:
        return "no decided pair"
    if found["ci95"] is None:
        return f"{found['value']:.1%}"
    low, high = found["ci95"]
    return f"{found['value']:.1%} ({low:.1%} to {high:.1%})"


def _best_baseline(one: Mapping[str, Any]) -> str:
    return str(max(one["baselines"], key=lambda name: one["baselines"][name]["value"]))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is: names of raters and criteria are anybody's."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else " " if c in "\r\n" else c for c in text)
