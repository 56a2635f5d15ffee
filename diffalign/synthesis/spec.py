"""The specification of a dataset: every field, its default and its limits. Unknown fields are refused.

``load`` turns a YAML file and ``--set`` into a ``Spec`` and looks through every row that it asks for, so that whatever
is wrong is told in one sentence, with file and line, before anything is made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.fields import fields_of, standing_at
from diffalign.sampling import GenerationConfig, SamplerConfig
from diffalign.section import Section
from diffalign.synthesis.axes import AxisConfig, ConditionConfig, When, fault_of, shares
from diffalign.synthesis.faults import first_of, made, meant
from diffalign.synthesis.naming import without_places

Kind = Literal["category", "integer", "number", "text", "boolean"]


class TableConfig(Section):
    """Rows that are given instead of drawn."""

    file: str
    """A ``.csv`` or ``.parquet`` file with a row for each case."""
    id: str | None = None
    """The column that names the rows, each by a name of its own. It is checked, and is no column of the dataset: a name
    such as a record number can be a person's."""
    columns: dict[str, Kind] = Field(default_factory=dict)
    """Kinds of columns; those that are not named are found out by what is in them."""
    sha256: str | None = None
    """Of the file; found out."""


class TextChoice(Section):
    """A template that is used for some of the rows."""

    when: When = Field(default_factory=dict)
    """Values of columns; the template is for rows that have them."""
    text: str
    """A text with the names of columns in braces."""


class WorldCaption(Section):
    """Prompts in the words of a world that ships with diffalign."""

    world: Literal["brain-mr", "emoji", "findings"]
    task: Literal["findings", "explain"] | None = None
    """What a text is asked for; of the world ``findings`` only."""

    @model_validator(mode="after")
    def _task_of_findings(self) -> WorldCaption:
        if (self.world == "findings") != (self.task is not None):
            raise ValueError(
                f"task: the world {self.world} has none" if self.task else "task is missing: findings or explain"
            )
        return self


def _template(value: object) -> object:
    """A template as the list of choices that it is, or as the name of a world."""
    if isinstance(value, str):
        return [TextChoice(text=value)]
    if isinstance(value, Mapping):
        return made(WorldCaption, value)
    choices = value if isinstance(value, list) else []
    choices = [{"text": one} if isinstance(one, str) else one for one in choices]
    if choices and all(isinstance(one, Mapping) for one in choices):
        return [made(TextChoice, one) for one in choices]
    raise ValueError("a template is a text, a list of {when, text}, or {world: NAME}")


Template = Annotated[list[TextChoice] | WorldCaption, BeforeValidator(_template)]


class ImageConfig(Section):
    """What makes the images."""

    model: str
    """``embedded:NAME``, a local diffusers folder, a hub id, or a run directory."""
    adapter: str | None = None
    """The folder of a LoRA, such as ``RUN/adapter``."""
    template: Template
    """The prompt of a row: a text with columns in braces, a list of ``{when, text}``, or ``{world: NAME}``."""
    negative: str = ""
    """The prompt that guidance leads away from."""
    sampler: SamplerConfig = SamplerConfig()
    condition: Literal["template", "table"] = "template"
    """What the model is told of a row: the text of the template, or the cells themselves, by its table encoder."""

    @field_validator("sampler")
    @classmethod
    def _stays(cls, sampler: SamplerConfig) -> SamplerConfig:
        if sampler.window is not None and sampler.window.every is not None:
            raise ValueError("window.every moves the window in training, and nothing is trained here: leave it out")
        return sampler


class TextConfig(Section):
    """What writes the texts."""

    model: str
    """``embedded:NAME``, ``fetched:NAME``, a local transformers folder, a hub id, or a run directory."""
    adapter: str | None = None
    template: Template
    generation: GenerationConfig = GenerationConfig()


class DecodableGate(Section):
    """An image or text that is whole. This gate is always there, and the first."""

    gate: Literal["decodable"]


class BlankGate(Section):
    """An image that shows something; a text that says something."""

    gate: Literal["blank"]
    contrast: float = Field(0.02, gt=0, lt=1)
    """Standard deviation of the pixels, of 1, that an image has at least."""


class RewardGate(Section):
    """A score of at least so much: agreement with prompt and row, or a floor."""

    gate: Literal["reward"]
    reward: str
    """As it is written in ``rewards``."""
    part: str | None = None
    """A part of the reward, such as ``everything``."""
    at_least: float


class DuplicateGate(Section):
    """An image that is not, or hardly, another case's: both measures below must find them alike.

    Among 2 000 slices of the brain-mr world no two are; the same slice with noise of two grey levels is found.
    """

    gate: Literal["duplicate"]
    bits: int = Field(2, ge=0, le=32)
    """Perceptual hashes of 64 bits that differ by at most so many are alike."""
    similarity: float = Field(0.9995, ge=0, le=1)
    """Cosine of the encoder's embeddings from which on images are alike."""


class MemorisedGate(Section):
    """An image that is no copy of a training image."""

    gate: Literal["memorised"]
    images: str
    """Folder of the training images."""
    distance: float = Field(0.03, gt=0, lt=1)
    """Root mean square difference of 32x32 grey pixels, of 1, up to which an image is a copy."""


GATES: Mapping[str, type[Section]] = {
    "decodable": DecodableGate,
    "blank": BlankGate,
    "reward": RewardGate,
    "duplicate": DuplicateGate,
    "memorised": MemorisedGate,
}


def _gate(value: object) -> object:
    """A gate by its name, alone or with its fields."""
    if isinstance(value, Section):
        return value
    fields = value if isinstance(value, Mapping) else {"gate": value}
    kind = GATES.get(str(fields.get("gate")))
    if kind is None:
        raise ValueError(f"there is no gate {fields.get('gate')!r}; {meant(str(fields.get('gate')), GATES)}")
    return made(kind, fields)


GateConfig = DecodableGate | BlankGate | RewardGate | DuplicateGate | MemorisedGate
GateEntry = Annotated[GateConfig, BeforeValidator(_gate)]


class Spec(Section):
    """Everything that determines a dataset."""

    name: str = Field("dataset", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    seed: int = Field(0, ge=0)
    cases: int | None = Field(None, ge=1)
    """Cases to make, where axes are given; a table has its own rows."""
    axes: dict[str, AxisConfig] = Field(default_factory=dict)
    """The columns, each with its values: a list, ``{value: share}``, or a range of numbers."""
    conditions: list[ConditionConfig] = Field(default_factory=list)
    """What holds for some of the rows: other values of an axis (``set``), or none (``drop``)."""
    table: TableConfig | None = None
    strata: list[str] = Field(default_factory=list)
    """Columns whose values make the groups that quotas and reports go by."""
    splits: dict[str, float] = Field(default_factory=lambda: {"train": 1.0}, min_length=1)
    """Shares of the cases, which add up to 1."""
    image: ImageConfig | None = None
    text: TextConfig | None = None
    rewards: list[str] = Field(default_factory=list)
    """What every image or text is scored by."""
    gates: list[GateEntry] = Field(default_factory=list)
    """What an image or text has to pass, in this order; ``duplicate`` is asked last."""
    attempts: int = Field(8, ge=1, le=999)
    """How often a row is tried at most; what was accepted of it is kept."""
    chunk: int = Field(64, ge=1)
    """Rows that are made and written down together. Processes take chunks in turn."""
    threads: int = Field(1, ge=1)
    """Processor threads of each process. The bytes of an image can depend on it, so it is part of the specification."""
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    @model_validator(mode="after")
    def _coherent(self) -> Spec:
        if (self.table is None) == (not self.axes):
            raise ValueError("give axes, from which rows are drawn, or a table of rows: one of the two")
        if self.table is not None and (self.cases is not None or self.conditions):
            field = "cases" if self.cases is not None else "conditions"
            raise ValueError(f"{field}: a table has its own rows; {field} is for axes")
        if self.table is None and self.cases is None:
            raise ValueError("cases is missing: how many rows are drawn from the axes")
        if self.image is None and self.text is None:
            raise ValueError("there is neither image nor text, so nothing would be made")
        if fault := fault_of(self.axes, self.conditions, self.strata) if self.axes else None:
            raise ValueError(fault)
        shares("splits", self.splits.values())
        if broken := [name for name in self.splits if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", name)]:
            raise ValueError(f"splits: {broken[0]!r} is no name of a split: up to 64 letters of English, digits and _")
        if len({name.lower() for name in self.splits}) < len(self.splits):
            raise ValueError("splits: two names differ in capitals only, which the names of files do not tell apart")
        for field in ("strata", "rewards"):
            if twice := [one for i, one in enumerate(getattr(self, field)) if one in getattr(self, field)[:i]]:
                raise ValueError(f"{field}: {twice[0]} stands there twice")
        self._check_gates()
        return self

    def _check_gates(self) -> None:
        for i, gate in enumerate(self.gates):
            if isinstance(gate, RewardGate) and gate.reward not in self.rewards:
                there = f"which are {', '.join(self.rewards)}" if self.rewards else "of which there are none"
                raise ValueError(f"gates.{i}: the reward {gate.reward} is not among rewards, {there}")
            if isinstance(gate, DuplicateGate | MemorisedGate) and self.image is None:
                raise ValueError(f"gates.{i}: {gate.gate} is about images, and none are made")
        for kind in ("decodable", "blank", "duplicate"):
            if sum(gate.gate == kind for gate in self.gates) > 1:
                raise ValueError(f"gates: {kind} stands there twice")

    def public(self) -> dict[str, Any]:
        """The fields as they are handed out: models, files and folders by their names alone, never by their places."""
        data = self.model_dump(mode="json")
        for part in ("image", "text"):
            if data[part] is not None:
                data[part] |= {key: without_places(data[part][key]) for key in ("model", "adapter")}
        if data["table"] is not None:
            data["table"]["file"] = Path(data["table"]["file"]).name
        data["rewards"] = [without_places(reward) for reward in data["rewards"]]
        for gate in data["gates"]:
            gate |= {key: without_places(gate[key]) for key in ("reward", "images") if key in gate}
        return data

    @cached_property
    def sha256(self) -> str:
        """Of everything in ``public``."""
        return sha256_of(self.public())

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what decides which images and texts are made: all but how the work is cut, and how often a row is
        tried. Seeds derive from it.
        """
        data = self.public()
        for part, section in (("image", "sampler"), ("text", "generation")):
            if data[part] is not None:
                del data[part][section]["batch_size"]
        return sha256_of({name: value for name, value in data.items() if name not in ("chunk", "attempts", "threads")})

    def dump(self) -> str:
        """What ``spec.yaml`` of a dataset holds."""
        text: str = yaml.safe_dump(self.public(), sort_keys=False, allow_unicode=True)
        return text


def sha256_of(data: object) -> str:
    """SHA-256 of the canonical JSON of plain data. Keys keep their order, for that of the axes counts."""
    return hashlib.sha256(json.dumps(data, separators=(",", ":")).encode()).hexdigest()


def load(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """The specification in a YAML file, with ``field=value`` overrides on top, all rows looked through.

    Raises NotFoundError for a missing file, and ConfigError or InputError for anything wrong in it or in its table.
    """
    from diffalign.synthesis import rows

    data, origin = fields_of(path, overrides, "cases: 100")
    spec = parse(data, origin)
    with placed(origin):
        if spec.table is not None:
            spec = spec.model_copy(update={"table": rows.known(spec.table, path.parent)})
            _check_columns(spec)
        rows.survey(spec)
    return spec


def _check_columns(spec: Spec) -> None:
    from diffalign.synthesis import rows

    columns = rows.columns(spec)
    for column in spec.strata:
        kind = columns.get(column)
        if kind is None:
            raise ConfigError(f"strata: the table has no column {column}; {meant(column, columns)}")
        if kind not in ("category", "boolean"):
            raise ConfigError(
                f"strata: {column} is a column of kind {kind}; strata are made of"
                f" categories; where it is one, say so by table.columns: {{{column}: category}}"
            )


def parse(data: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Spec:
    """A specification from plain data; no file is looked at. ``origin`` says where each field stands, for messages."""
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_sentence(error, origin or {})) from None


def _sentence(error: ValidationError, origin: Mapping[str, str]) -> str:
    dotted, sentence = first_of(error, Spec)
    # A sentence about the whole specification begins with the field that it is about.
    return f"{standing_at(dotted or _leading(sentence), origin)}{sentence}"


def _leading(sentence: str) -> str:
    """The dotted field that a sentence begins with."""
    return re.split(r"[: ]", sentence, maxsplit=1)[0]


@contextmanager
def placed(origin: Mapping[str, str]) -> Iterator[None]:
    """Inside it an error whose sentence begins with a field of the specification gets the file and line of it.

    ``origin`` says where each field stands, as ``fields_of`` does.
    """
    try:
        yield
    except (ConfigError, InputError, NotFoundError) as error:
        field = _leading(str(error))
        if field.partition(".")[0] not in Spec.model_fields:
            raise
        raise type(error)(f"{standing_at(field, origin)}{error}") from error.__cause__
