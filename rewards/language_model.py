"""A language model with a scalar head on its last token, as a judge of texts: how it reads them, and what it says.

Models are transformers' own ``AutoModelForSequenceClassification`` of one label, so what is written here loads
elsewhere, and reward models of others load here.

Shape legend: ``B`` texts.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.types import Sample
from rewards.devices import device as usable

HEAD = "score.weight"
"""The head that transformers puts on a causal language model."""
BATCH = 32


class Reader:
    """From a prompt and its text to the tokens that are judged."""

    def __init__(self, tokenizer: Any, name: str, longest: int) -> None:
        """``longest`` is how many tokens there may be. ConfigError for a tokenizer that cannot fill up a batch."""
        self.tokenizer, self.name, self.longest = tokenizer, name, longest
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        end, filler = tokenizer.eos_token_id, tokenizer.pad_token_id
        if filler is None and end is None:
            raise ConfigError(
                f"{name} has neither a padding token nor an end-of-text token, so texts of different lengths cannot be"
                " read together; set pad_token in its tokenizer_config.json"
            )
        self.end = end
        self.filler = int(end if filler is None else filler)
        """Without a padding token of its own the end of a text fills up, as is usual; the head then sees the token
        before it."""

    def tokens(self, sample: Sample) -> list[int]:
        """The conversation by the chat template, if the tokenizer has one; else prompt, text and end of text.

        A text that was cut off has no end. Encoders that begin with a class token read prompt and text as a pair.
        InputError for a sample without a text.
        """
        if sample.text is None:
            raise InputError(f"the sample of {sample.prompt.key[:60]!r} has no text, and a language model reads texts")
        finished = bool(sample.evidence.get("finished", True))
        if self.chat:
            turns = [
                {"role": "user", "content": sample.prompt.text}, {"role": "assistant", "content": sample.text},
            ]  # fmt: skip
            open_end = not finished and bool(sample.text.strip())
            said = self.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=open_end)
            return list(self.tokenizer(said, add_special_tokens=False).input_ids)
        if self.tokenizer.cls_token_id is not None:
            return list(self.tokenizer(sample.prompt.text, sample.text).input_ids)
        before = list(self.tokenizer(sample.prompt.text).input_ids)
        if before and before[-1] == self.end and self.end != self.tokenizer.bos_token_id:
            before = before[:-1]  # some tokenizers close every text
        own = list(self.tokenizer(sample.text, add_special_tokens=False, split_special_tokens=True).input_ids)
        return [*before, *own, self.end] if finished and self.end is not None else [*before, *own]


class Classifier:
    """A model of one label and its reader."""

    def __init__(self, model: Any, reader: Reader, device: str = "cpu") -> None:
        """Takes an ``AutoModelForSequenceClassification``; it is put into evaluation mode, without dropout."""
        self.model, self.reader, self.device = model, reader, usable(device)
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = reader.filler
        model.eval().to(self.device)

    def raw(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """What the head says of these tokens, float32 ``(B,)`` with gradient. Longer ones are no error."""
        tokens = pad_sequence([torch.tensor(row) for row in rows], True, self.reader.filler)
        lengths = torch.tensor([len(row) for row in rows])
        real = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        answer = self.model(input_ids=tokens.to(self.device), attention_mask=real.to(self.device))
        logits: Tensor = answer.logits[:, 0].float()
        return logits

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The same on the CPU, without gradient, texts of like length together."""
        found = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for i in range(0, len(order), BATCH):
            some = order[i : i + BATCH]
            found[some] = self.raw([rows[j] for j in some]).cpu()
        return found


def read_tokenizer(where: str | Path, name: str) -> Any:
    """The tokenizer of a folder or hub id; ``name`` is for messages."""
    with _quiet(), _told(where, name):
        return AutoTokenizer.from_pretrained(where, local_files_only=isinstance(where, Path))


def headed(where: str | Path, name: str) -> Any:
    """A causal language model with a new head, which starts at 0: it finds every text alike. float32.

    InputError for a model on which there is no such head, and for one whose files are broken.
    """
    model, missing = _loaded(where, name, {"num_labels": 1})
    if missing - {HEAD}:
        raise InputError(
            f"encoder {name} is no causal language model that a reward head fits on: it lacks"
            f" {', '.join(sorted(missing - {HEAD})[:3])}"
        )
    with torch.no_grad():
        model.get_parameter(HEAD).zero_()
    return model


def judge(where: str | Path, name: str) -> Any:
    """A reward model as it is. ConfigError for one of several labels, InputError for one without a trained head."""
    model, missing = _loaded(where, name, {})
    if missing:
        raise InputError(
            f"{name} is no reward model: it has no weights for {', '.join(sorted(missing)[:3])}; `diffalign reward fit`"
            " makes one of a language model"
        )
    if model.config.num_labels != 1:
        raise ConfigError(f"{name} tells {model.config.num_labels} classes apart; a reward model has one label")
    return model


def context(model: Any) -> int:
    """The most tokens that a model can read."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _loaded(where: str | Path, name: str, options: dict[str, Any]) -> tuple[Any, set[str]]:
    with _quiet(), _told(where, name):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            where, dtype=torch.float32, use_safetensors=True, local_files_only=isinstance(where, Path),
            output_loading_info=True, **options,
        )  # fmt: skip
    return model, set(info["missing_keys"])


@contextmanager
def _told(where: str | Path, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(where, Path):
            raise InputError(f"{name} is no language model that can be loaded: {reason}") from error
        raise NotFoundError(f"{name} is not on this machine and could not be fetched: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of weights that are new, as the head is."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
