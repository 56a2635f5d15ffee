"""Whether what was loaded is the whole checkpoint: the libraries fill weights that a file lacks with random ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from diffalign.errors import InputError

REPORT = "LOAD REPORT"
"""What transformers begins its table of missing weights with."""
_COLOUR = re.compile(r"\x1b\[\d*m")
_MISSING = re.compile(r"^(\S.*?)\s*\|\s*MISSING", re.MULTILINE)
"""A row of it; rows of several layers are one, such as ``layers.{0, 1}.fc1.weight``."""


class _Reports(logging.Filter):
    """Keeps transformers' tables of missing weights, which are told as an error, and lets pass what would anyway."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level
        self.missing: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        text = _COLOUR.sub("", record.getMessage())
        found = _MISSING.findall(text) if REPORT in text else []
        self.missing += found
        return not found and record.levelno >= self.level


@contextmanager
def transformers_complete(model: str) -> Iterator[None]:
    """InputError where transformers loads something inside it whose files lack weights."""
    log = logging.getLogger("transformers.modeling_utils")
    own, reports = log.level, _Reports(log.getEffectiveLevel())
    log.addFilter(reports)
    if reports.level > logging.WARNING:  # the table would not even be made
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(own)
        log.removeFilter(reports)
    if reports.missing:
        raise lacking(model, "text encoder", reports.missing)


def require_weights(model: str, part: str, module: nn.Module) -> None:
    """InputError where weights of a part of diffusers were in no file: it leaves them without a value."""
    if missing := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
        raise lacking(model, part, missing)


def lacking(model: str, part: str, missing: list[str]) -> InputError:
    """The sentence, by the first of them."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return InputError(f"model {model} cannot be loaded: the files of its {part} lack weights: {missing[0]}{more}")
