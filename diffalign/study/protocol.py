"""What raters are told and asked: a versioned YAML text. Its hash goes with every vote."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffalign.errors import ConfigError


class Criterion(BaseModel):
    """A question beside the overall one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    question: str = Field(min_length=1)
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
    version: int = Field(ge=1)
    question: str = "Which one is better?"
    guideline: str = ""
    """What raters read before they start: what a tie is, what matters most."""
    criteria: tuple[Criterion, ...] = ()
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

    @model_validator(mode="after")
    def _consistent(self) -> Rules:
        if self.gold_share + self.repeat_share + self.aa_share > 0.5:
            raise ValueError("gold_share, repeat_share and aa_share leave less than half for the study itself")
        names = [criterion.name for criterion in self.criteria]
        if len(set(names)) < len(names) or "overall" in names:
            raise ValueError("criteria have different names, and none is called overall")
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

    @classmethod
    def parse(cls, text: str) -> Protocol:
        """Reads a YAML text; a ConfigError says which field is wrong."""
        try:
            found = yaml.safe_load(text)
            return cls(text, Rules.model_validate(found))
        except yaml.YAMLError as error:
            raise ConfigError(f"the protocol is no YAML: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"protocol{' field ' + where if where else ''}: {message}") from None
