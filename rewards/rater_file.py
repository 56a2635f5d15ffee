"""The YAML file that describes a simulated rater: every field, its limits, and one sentence for whatever is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from diffalign.config import Section
from diffalign.errors import ConfigError, NotFoundError
from diffalign.worlds import brain_mr
from rewards.emoji_checker import ATTRIBUTES
from rewards.rater_tastes import TASTES
from rewards.rater_words import WORDS

SHIPPED = Path(__file__).parent / "raters"
ASKED: dict[str, tuple[str, ...]] = {
    "emoji": ATTRIBUTES,
    "brain-mr": brain_mr.FIELDS,
    "findings": brain_mr.FIELDS,
}
"""Per world: the attributes that its checker answers."""
ALWAYS_ASKED: dict[str, frozenset[str]] = {
    "emoji": frozenset({"object", "background"}),
    "brain-mr": frozenset({"plane", "contrast", "lesion"}),
    "findings": frozenset({"level", "lesion"}),
}
"""Per world: the attributes that every prompt asks for."""
OVERALL = "overall"
MEASURES: dict[str, tuple[str, ...]] = {world: tuple(found) for world, found in {**TASTES, **WORDS}.items()}
"""Per world: the tastes that a rater of it can have."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""Strict, so that neither a text nor true and false is taken for a number."""
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]


class Panel(Section):
    """The raters: how many, and how far apart."""

    count: int = Field(1, ge=1, le=1000)
    overlap: int = Field(1, ge=1)
    """Raters that judge each pair, at most ``count``."""
    spread: Positive = 0.0
    """How much raters differ: each weight is multiplied by ``exp(spread * z)``, z standard normal per term."""
    seed: int = Field(0, ge=0)
    """Who the raters are. It is part of the file, so that the same persons answer whatever a study's seed is."""

    @model_validator(mode="after")
    def _enough(self) -> Panel:
        if self.overlap > self.count:
            raise ValueError(f"overlap {self.overlap} asks for more raters than there are: count is {self.count}")
        return self


class Criterion(Section):
    """What one question is about. What is left out is as in the file."""

    asked: list[str] | None = None
    """Attributes that count; left out: all, ``[]``: none."""
    taste: list[str] | None = None
    """Tastes that count; left out: all, ``[]``: none."""
    noise: Positive | None = None
    ties: Positive | None = None


class RaterFile(Section):
    """A panel of simulated raters."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    """First part of the raters' pseudonyms."""
    world: Literal["emoji", "brain-mr", "findings"]
    asked: dict[str, Positive] = Field(default_factory=dict)
    """Weight of each attribute that a prompt can ask for; one that is left out does not count."""
    taste: dict[str, Number] = Field(default_factory=dict)
    """Weight of each measure that no prompt asks for; a negative weight likes less of it."""
    noise: Positive
    """Temperature of the logistic noise, in units of utility: without ties and side bias the first of a pair is
    preferred with probability ``sigmoid((u1 - u2) / noise)``. 0: neither noise nor side bias."""
    ties: Positive = 0.0
    """Half-width of the band around 0, in units of utility, in which the *perceived* difference is called a tie."""
    side_bias: Number = 0.0
    """Log-odds in favour of the first of a pair, which is shown on the left."""
    lapse: Positive = Field(0.0, le=1)
    """Probability of an answer that has nothing to do with the pair: the first or the second, a coin's toss."""
    good_above: Number = 0.5
    """Utility from which a single sample gets a thumbs up, noise aside."""
    raters: Panel = Panel()
    criteria: dict[str, Criterion] = Field(default_factory=dict)
    """Questions beside "overall", which is always there and is about everything unless it is listed here."""

    @model_validator(mode="after")
    def _known(self) -> RaterFile:
        known = {"asked": ASKED[self.world], "taste": tuple(MEASURES[self.world])}
        for kind, names in known.items():
            for name in getattr(self, kind):
                _check_name(name, names, f"{kind} of the world {self.world}")
        for title, criterion in self.criteria.items():
            for kind in known:
                for name in getattr(criterion, kind) or ():
                    _check_name(name, tuple(getattr(self, kind)), f"{kind} of this file, in criterion {title!r}")
        for title in self.titles():
            terms = self.terms(title)
            if not any(terms.get(name) for name in (*ALWAYS_ASKED[self.world], *MEASURES[self.world])):
                raise ValueError(
                    f"criterion {title!r} is about nothing that every prompt has: give a weight above 0 to one of"
                    f" {', '.join(sorted(ALWAYS_ASKED[self.world]))}, or to a taste"
                )
        return self

    def titles(self) -> list[str]:
        """Every criterion, "overall" among them."""
        return list(self.criteria) if OVERALL in self.criteria else [OVERALL, *self.criteria]

    def criterion(self, title: str) -> Criterion:
        """One criterion with its noise and ties, or a ConfigError where there is none of that title."""
        if title not in self.titles():
            raise ConfigError(f"the rater {self.name} has no criterion {title!r}; there are {', '.join(self.titles())}")
        found = self.criteria.get(title, Criterion())
        noise = self.noise if found.noise is None else found.noise
        ties = self.ties if found.ties is None else found.ties
        return found.model_copy(update={"noise": noise, "ties": ties})

    def terms(self, title: str) -> dict[str, float]:
        """Weights of everything that one criterion is about; those of 0 are left out."""
        criterion = self.criterion(title)
        kinds = ((self.asked, criterion.asked), (self.taste, criterion.taste))
        return {
            name: weight
            for weights, chosen in kinds
            for name, weight in weights.items()
            if weight and (chosen is None or name in chosen)
        }


def shipped() -> list[str]:
    """Names of the raters that ship with diffalign."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped rater by its name, or the path itself."""
    if str(name_or_path) in shipped():
        return SHIPPED / f"{name_or_path}.yaml"
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise NotFoundError(f"no rater {str(name_or_path)!r}; there are {', '.join(shipped())}, or a YAML file")
    return path


def read(path: Path) -> RaterFile:
    """The file, or a ConfigError of one sentence that names it."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text, so it describes no rater") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is of a date that does not exist
        mark = getattr(error, "problem_mark", None)
        why = str(getattr(error, "problem", None) or error).partition("\n")[0]
        raise ConfigError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {why}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a rater is a mapping of fields, such as 'world: emoji'")
    try:
        return RaterFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_sentence(error)}") from None


def _check_name(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name!r} is no {what}; {hint}there are {', '.join(known) or 'none'}")


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    dotted = ".".join(place)
    if first["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"raters": Panel, "criteria": Criterion}
        known = list(sections.get(place[0], RaterFile).model_fields)
        near = difflib.get_close_matches(place[-1], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"fields here: {', '.join(known)}"
        return f"unknown field {dotted}; {hint}"
    if first["type"] == "missing":
        return f"the field {dotted} is missing"
    reason = str(first["msg"]).removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" (given: {first['input']!r})"
    return f"{dotted + ': ' if dotted else ''}{reason[0].lower() + reason[1:]}{given}"
