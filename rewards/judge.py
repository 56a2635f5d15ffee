"""A language model behind a chat endpoint as a judge of texts: ``judge?url=http://HOST:PORT&model=NAME&principles=FILE``.

The endpoint is OpenAI's ``POST /v1/chat/completions``, which most local servers speak. As a reward it is asked of each
text and principle *yes or no*; as a judge of pairs (``Judge.judge``) *A or B*, always in both orders, for such models
prefer a place (Zheng et al. 2023, "Judging LLM-as-a-judge", section 3.3). Where the endpoint tells the probabilities of
its answer, the label is soft, as in Bai et al. 2022 ("Constitutional AI", section 4.1): the normalised probability of
the two answers, averaged over orders and principles.

Prompts and texts leave this machine for that address, and nothing else does.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.seeds import derive
from diffalign.types import Modality, Preference, Sample, Scores
from rewards import wire
from rewards.line import Line, first_line

log = logging.getLogger(__name__)

PRINCIPLES = ("It does what the question asks, correctly and completely.", "It is clear and easy to read.")
"""What is judged by where no file of principles is given."""
_PATH = "/v1/chat/completions"
_REMEDY = "go on with a stopped run by --resume"
_HURRY = "a larger timeout= or a smaller max_tokens= may help"
_COMPARE = (
    "You compare two answers to a question by one principle. You reply with one letter, A or B, and nothing else."
)
_GRADE = "You judge an answer to a question by one principle. You reply with one word, yes or no, and nothing else."


@dataclass(frozen=True)
class Answer:
    """One reply, read: the probability of the first option, or None where it is nonsense."""

    first: float | None
    text: str


class Judge:
    """A judge of texts by principles.

    ``asked`` and ``nonsense`` count the questions so far and the replies that were no answer. Requests are sent one
    after the other, at temperature 0.
    """

    modality: Modality = "text"
    unit = "probability"
    range = (0.0, 1.0)
    higher_is_better = True
    waits = True
    """It waits for its endpoint: the next samples are made meanwhile."""

    def __init__(
        self,
        url: str,
        model: str,
        principles: str = "",
        *,
        logprobs: bool = True,
        max_tokens: int = 8,
        timeout: float = 60.0,
        retries: int = 50,
        patience: float = 300.0,
        token_env: str = "",
        name: str = "judge",
    ) -> None:
        """``principles`` is a YAML file: a list of sentences about a good answer.

        ``logprobs=false`` is for endpoints that refuse to tell probabilities. ``timeout``, ``retries``, ``patience``
        and ``token_env`` are those of a remote reward; ``token_env`` names the variable with the API key.
        """
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; the judge needs at least 1 to answer")
        self.name, self.model = name, model
        self.principles = read_principles(Path(principles).expanduser()) if principles else PRINCIPLES
        base = url.rstrip("/").removesuffix(_PATH).removesuffix("/v1")
        self._line = Line(
            base, what="judge", remedy=_REMEDY, hurry=_HURRY, timeout=timeout, retries=retries, patience=patience,
            token_env=token_env,
        )  # fmt: skip
        self.asked = self.nonsense = 0
        self._first_nonsense = ""
        self._settings = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        if logprobs:
            self._settings |= {"logprobs": True, "top_logprobs": 20}

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """The probability ``(B,)`` of *yes*, averaged over the principles, which are the parts.

        NaN where there is no text, or one of the replies is nonsense.
        """
        parts = torch.full((len(self.principles), len(samples)), math.nan)
        for i, sample in enumerate(samples):
            for k, principle in enumerate(self.principles):
                if sample.text is not None:
                    answer = self._ask(_GRADE, _grade(sample.prompt.text, sample.text, principle), ("yes", "no"), 0)
                    parts[k, i] = math.nan if answer.first is None else answer.first
        return Scores(parts.mean(0), {f"principle {k + 1}": part for k, part in enumerate(parts)})

    @property
    def why_nothing(self) -> str:
        """Why texts got no score: how many replies were nonsense, and the first. Empty where none was."""
        if not self.nonsense:
            return ""
        return f"{self.nonsense} of its {self.asked} replies were no answer; at first it {self._first_nonsense}"

    def judge(self, pairs: Sequence[tuple[Sample, Sample]], seed: int = 0) -> list[Preference]:
        """One preference per pair: how probably the first is preferred, averaged over both orders and the principles.

        A principle on which a reply is nonsense counts as a tie; the provenance says how many replies were.
        """
        return [self._preference(first, second, seed) for first, second in pairs]

    def _preference(self, first: Sample, second: Sample, seed: int) -> Preference:
        if first.prompt.key != second.prompt.key:
            raise InputError(f"a pair is of one prompt; got {first.prompt.text!r} beside {second.prompt.text!r}")
        if first.text is None or second.text is None:
            raise InputError(f"the judge {self.name} compares texts; a sample of {first.prompt.text[:80]!r} has none")
        labels, before = [], self.nonsense
        for principle in self.principles:
            question = first.prompt.text
            seeds = derive(seed, "judge", first.prompt.key, principle) % 2**31
            one = self._ask(_COMPARE, _compare(question, first.text, second.text, principle), ("a", "b"), seeds)
            two = self._ask(_COMPARE, _compare(question, second.text, first.text, principle), ("a", "b"), seeds)
            labels.append(0.5 if one.first is None or two.first is None else (one.first + 1 - two.first) / 2)
        provenance = {
            "judge": self.name,
            "model": self.model,
            "principles": list(self.principles),
            "labels": labels,
            "nonsense": self.nonsense - before,
        }
        return Preference(
            first.prompt, first, second, sum(labels) / len(labels), rater=self.name, provenance=provenance
        )

    def _ask(self, system: str, question: str, options: tuple[str, str], seed: int) -> Answer:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        answer = read_answer(self._choice({**self._settings, "messages": messages, "seed": seed}), options)
        self.asked += 1
        if answer.first is None:
            self.nonsense += 1
            if self.nonsense == 1:
                self._first_nonsense = f"was asked {' or '.join(options)} and said {answer.text[:80]!r}"
                log.warning(f"the judge {self.name} {self._first_nonsense}")
        return answer

    def _choice(self, request: Mapping[str, object]) -> dict[str, Any]:
        """The first choice of the answer."""
        answer = self._line.ask("POST", _PATH, json.dumps(request).encode(), self._read)
        choices = answer.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise InputError(f"{self._line.url} is no chat endpoint: its answer to {_PATH} has no choices")
        return choices[0]

    def _read(self, data: bytes) -> dict[str, Any]:
        try:
            return wire.read(data)
        except InputError:
            raise InputError(f"{self._line.url} is no chat endpoint: its answer to {_PATH} is no JSON") from None


def read_principles(path: Path) -> tuple[str, ...]:
    """The sentences of a YAML list; NotFoundError or InputError where there is none."""
    if not path.is_file():
        raise NotFoundError(f"no file of principles {path}; it is a YAML list of sentences")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {first_line(error)}") from None
    if not (isinstance(found, list) and found and all(isinstance(one, str) and one.strip() for one in found)):
        raise InputError(f"{path} holds no principles; it is a YAML list of sentences, such as '- It is kind.'")
    return tuple(one.strip() for one in found)


def read_answer(choice: Mapping[str, Any], options: tuple[str, str]) -> Answer:
    """How probable the first of two options is, by a choice of a chat completion.

    By the probabilities of the token that answers, where they are told, otherwise 1 or 0 by the words. A reply with
    neither option, or with both, is nonsense.
    """
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    text = content if isinstance(content, str) else ""
    said = {word.lower() for word in re.findall(r"[^\W_]+", text)} & set(options)
    if len(said) != 1:
        return Answer(None, text)
    soft = _soft(choice.get("logprobs"), options)
    return Answer(float(options[0] in said) if soft is None else soft, text)


def _soft(logprobs: object, options: tuple[str, str]) -> float | None:
    """The share of the first option in what both have together, at the first token that is one of them."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    for token in tokens if isinstance(tokens, list) else []:
        if not isinstance(token, dict) or _bare(token.get("token")) not in options:
            continue
        told = [one for one in token.get("top_logprobs") or [token] if isinstance(one, dict)]
        mass = [sum(_probability(one) for one in told if _bare(one.get("token")) == option) for option in options]
        return mass[0] / sum(mass) if sum(mass) > 0 else None
    return None


def _probability(token: Mapping[str, Any]) -> float:
    value = token.get("logprob")
    return math.exp(min(0.0, value)) if isinstance(value, int | float) and not math.isnan(value) else 0.0


def _bare(token: object) -> str:
    return re.sub(r"[\W_]+", "", token).lower() if isinstance(token, str) else ""


def _compare(question: str, a: str, b: str, principle: str) -> str:
    return (
        f"Question:\n{question}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\nPrinciple: {principle}\n\n"
        "Which answer keeps to the principle better, A or B?"
    )


def _grade(question: str, answer: str, principle: str) -> str:
    return (
        f"Question:\n{question}\n\nAnswer:\n{answer}\n\nPrinciple: {principle}\n\n"
        "Does the answer keep to the principle, yes or no?"
    )
