"""What raters are told and asked: a versioned YAML text. Its hash goes with every vote."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffalign.errors import ConfigError, NotFoundError

SHIPPED = Path(__file__).with_name("protocols")
LONGEST = 1_000_000
"""Bytes of a protocol file; a larger one is no protocol."""


class Criterion(BaseModel):
    """A question beside the overall one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    """What it is called in exports."""
    question: str = Field(min_length=1)
    """What raters read."""
    kind: Literal["prefer", "scale"] = "prefer"
    """``prefer``: left, right or tie. ``scale``: one of the anchors, for each side."""
    anchors: tuple[str, ...] = ()
    """What the points of a scale mean, the lowest first; an answer is a number from 1 on."""

    @model_validator(mode="after")
    def _anchored(self) -> Criterion:
        if (self.kind == "scale") != (len(self.anchors) >= 2):
            raise ValueError("a scale has two anchors or more, and only a scale has anchors")
        return self


class Rules(BaseModel):
    """The fields of the YAML text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    """What it is called; results are told by it."""
    version: int = Field(ge=1)
    """Goes up with every change."""
    kind: Literal["image", "text", "both"] = "both"
    """What is compared. A study of other pairs is refused: words about images mislead who compares texts."""
    question: str = "Which one is better?"
    """The overall question, above every pair."""
    guideline: str = ""
    """What raters read before they start: what a tie is, what matters most."""
    criteria: tuple[Criterion, ...] = ()
    """Further questions about each pair."""
    criteria_required: bool = False
    """Whether every criterion is answered, unless the pair cannot be judged."""
    strength: bool = True
    """Whether raters may say how much better one is."""
    points: tuple[str, ...] = ()
    """What may be marked at a place in an image, such as an artefact; with none, nothing can be marked."""
    min_view_seconds: float = Field(default=1.0, ge=0, le=60)
    """How long a pair is on the screen before it can be answered, where the screen says."""
    overlap: int = Field(default=1, ge=1)
    """How many raters judge each pair."""
    lease_minutes: float = Field(default=15, gt=0)
    """How long a pair waits for a rater who does not answer."""
    gold_share: float = Field(default=0, ge=0, le=0.5)
    """Chance that a rater is given a pair whose answer is known, while there are some that this rater has not seen."""
    repeat_share: float = Field(default=0, ge=0, le=0.5)
    """Chance of a pair that this rater has answered before, sides exchanged."""
    aa_share: float = Field(default=0, ge=0, le=0.5)
    """Chance of a pair of one sample with itself."""
    repeat_after: int = Field(default=10, ge=1)
    """How many other assignments lie between an answer and its repeat, at least."""
    random_share: float = Field(default=1.0, ge=0.3, le=1)
    """Share of pairs that are begun in random order; the others are chosen for what they would tell of the arms."""
    budget: int | None = Field(default=None, ge=1)
    """How many votes on ordinary pairs are wanted in all; then the study is over."""
    precision: float | None = Field(default=None, gt=0)
    """The study is over when every arm's strength is known to this 95 % half width, in log-odds against their mean."""

    @model_validator(mode="after")
    def _consistent(self) -> Rules:
        if self.gold_share + self.repeat_share + self.aa_share > 0.5:
            raise ValueError("gold_share, repeat_share and aa_share leave less than half for the study itself")
        names = [criterion.name for criterion in self.criteria]
        if len(set(names)) < len(names) or "overall" in names:
            raise ValueError("criteria have different names, and none is called overall")
        if len(set(self.points)) < len(self.points) or not all(self.points):
            raise ValueError("points have different labels, and none is empty")
        if self.criteria_required and not self.criteria:
            raise ValueError("criteria_required is set, but there are no criteria")
        return self


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol as its text, which is what is kept and hashed, and as its fields."""

    text: str
    rules: Rules

    @property
    def sha256(self) -> str:
        """Of the text, in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @staticmethod
    def shipped() -> dict[str, Path]:
        """The protocols that come with the package, by name."""
        return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}

    @classmethod
    def load(cls, name_or_path: str | Path) -> Protocol:
        """A shipped protocol by its name, or one from a file.

        Raises NotFoundError where there is neither, ConfigError for a file that holds no protocol.
        """
        known = cls.shipped()
        path = known.get(str(name_or_path), Path(name_or_path))
        if not path.is_file():
            raise NotFoundError(f"there is no protocol {name_or_path}; give a file, or one of {', '.join(known)}")
        try:
            with path.open("rb") as file:
                data = file.read(LONGEST + 1)
            if len(data) > LONGEST:
                raise ConfigError(f"{path} is longer than {LONGEST} bytes: no protocol")
            return cls.parse(data.decode("utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is no text in UTF-8: {error}") from None
        except OSError as error:
            raise NotFoundError(f"{path} cannot be read: {error.strerror}") from None

    @classmethod
    def parse(cls, text: str, name: str = "the protocol") -> Protocol:
        """Reads a YAML text. A ConfigError has a sentence for every mistake; ``name`` is what it calls the text."""
        try:
            found = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # a ValueError is of a date that does not exist
            from diffalign.study.protocol_faults import not_yaml

            raise ConfigError(f"{name} is no YAML: {not_yaml(error, text)}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{name} holds no fields: a protocol begins with lines such as name: mine and version: 1")
        try:
            return cls(text, Rules.model_validate(found))
        except ValidationError as error:
            from diffalign.study.protocol_faults import sentences

            raise ConfigError(f"{name}: {'; '.join(sentences(error, Rules))}") from None
