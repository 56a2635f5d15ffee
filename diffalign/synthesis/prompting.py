"""From a row to what the models are asked: the templates of a specification, and the words of the worlds."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter

from diffalign.errors import ConfigError
from diffalign.synthesis.axes import matches
from diffalign.synthesis.cases import Value
from diffalign.synthesis.faults import meant
from diffalign.synthesis.journal import PARTS, Part, Row
from diffalign.synthesis.spec import Spec, Template, TextChoice, WorldCaption
from diffalign.types import Prompt


class Prompting:
    """The prompts of a specification. Building it checks that the templates name columns that there are."""

    def __init__(self, spec: Spec) -> None:
        from diffalign.synthesis.rows import columns

        self.columns = columns(spec)
        self.templates: dict[Part, Template] = {}
        self.negative = spec.image.negative if spec.image is not None else ""
        for part in PARTS:
            section = getattr(spec, part)
            if section is not None:
                self.templates[part] = section.template
                self._check_names(part, section.template)

    def _check_names(self, part: Part, template: Template) -> None:
        if isinstance(template, WorldCaption):
            return
        for choice in template:
            for name in choice.when:
                if name not in self.columns:
                    raise ConfigError(
                        f"{part}.template: when names {name}, which is no column; {meant(name, self.columns)}"
                    )
            for name in _fields(part, choice.text):
                if name not in self.columns:
                    raise ConfigError(f"{part}.template: {{{name}}} is no column; {meant(name, self.columns)}")

    def check(self, row: Row) -> None:
        """Raises ConfigError where a prompt cannot be made of the row."""
        for part in self.templates:
            self.prompt(part, row)

    def prompt(self, part: Part, row: Row) -> Prompt:
        """What the model of this part is asked. Its attributes are what a checker verifies."""
        template = self.templates[part]
        if isinstance(template, WorldCaption):
            made = _of_world(part, template, row)
        else:
            filled = {name: cell for name, cell in row.cells.items() if cell is not None}
            made = Prompt(_filled(part, template, row), attributes=filled)
        negative = self.negative if part == "image" else ""
        return Prompt(made.text, row.id, made.attributes, negative)


def _fields(part: Part, text: str) -> list[str]:
    """The columns that a template names."""
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{part}.template: {text!r}: {error}; write a brace that is meant as one twice") from None
    names = []
    for _, name, layout, conversion in pieces:
        if name is None:
            continue
        if not name or conversion or set(".[]{}") & set(name + (layout or "").replace(".", "")):
            raise ConfigError(f"{part}.template: {text!r}: in braces stands the name of a column, such as {{plane}}")
        names.append(name)
    return names


def _filled(part: Part, choices: list[TextChoice], row: Row) -> str:
    for choice in choices:
        if not matches(choice.when, row.cells):
            continue
        if empty := [name for name in _fields(part, choice.text) if row.cells[name] is None]:
            raise ConfigError(
                f"{part}.template: {{{empty[0]}}} is empty in row {row.index} ({_shown(row.cells)}); give such rows a"
                " template of their own: - {when: {...}, text: ...}"
            )
        try:
            return choice.text.format_map(row.cells)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{part}.template: {choice.text!r} does not fit row {row.index}: {error}") from None
    raise ConfigError(f"{part}.template: none is for row {row.index} ({_shown(row.cells)}); add one without when")


def _of_world(part: Part, caption: WorldCaption, row: Row) -> Prompt:
    from diffalign.worlds import brain_mr, emoji, findings

    if caption.world == "emoji":
        names = ("kind", *emoji.KINDS.get(str(row.cells.get("kind")), (0.0, ()))[1])
    else:
        names = brain_mr.FIELDS
    facts = {name: row.cells[name] for name in names if row.cells.get(name) is not None}
    try:
        if caption.task is not None:
            return findings.prompt(facts, caption.task)
        if caption.world == "emoji":
            return Prompt(emoji.caption(facts), attributes=emoji.validate(facts))
        return Prompt(brain_mr.caption(facts), attributes=dict(brain_mr.validate(facts)))
    except ConfigError as error:
        raise ConfigError(
            f"{part}.template: row {row.index} ({_shown(row.cells)}) is none of the world {caption.world}: {error}"
        ) from None


def _shown(cells: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {cell}" for name, cell in cells.items() if cell is not None)[:200]
