"""A user's own reward: ``path/to/file.py:attr`` or ``module:attr``.

What ``attr`` may be: a ``Reward``, or a class of one; a function of the samples; or a function as other toolkits write
it, ``fn(images, prompts, metadata) -> scores`` or ``-> (scores, info)``, where ``images`` is float32 ``(B, 3, H, W)``
in [0, 1], ``prompts`` the texts and ``metadata`` the attributes of the prompts. A score of None is a NaN.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

import torch

from diffalign.errors import ConfigError, InputError, NotFoundError, UserError
from diffalign.images import to_tensor
from diffalign.types import Modality, Prompt, Reward, Sample, Scores
from rewards.arguments import typed

_FIELD_SIGNATURE = ("images", "prompts", "metadata")


class FunctionReward:
    """A plain function as a reward: its answers are checked one by one."""

    def __init__(self, function: Callable[..., object], name: str, file: str = "") -> None:
        """``file`` is where the function stands; messages about a failure point into it.

        The function may say more of itself by attributes: ``name``, ``modality``, ``unit``, ``range``,
        ``higher_is_better``; and by ``differentiable = True`` that it takes a tensor of images and returns one of
        scores with a gradient, so that ``draft``, ``align-prop`` and ``refl`` can follow it.
        """
        self.name: str = getattr(function, "name", name)
        self.file = file
        self.modality: Modality = getattr(function, "modality", "image")
        if self.modality not in ("image", "text"):
            raise ConfigError(f"the reward {name} has modality {self.modality!r}; there are 'image' and 'text'")
        self.unit: str = getattr(function, "unit", "score")
        self.range: tuple[float, float] = getattr(function, "range", (-math.inf, math.inf))
        self.higher_is_better: bool = getattr(function, "higher_is_better", True)
        self._function, self._called = function, name
        self._arguments = _arguments(function, name)
        if getattr(function, "differentiable", False):
            if "images" not in self._arguments:
                raise ConfigError(
                    f"the reward {name} says that it is differentiable, and takes no tensor of images; write it as"
                    f" {name}(images, prompts, metadata)"
                )
            self.differentiable = self._with_gradient

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """The function's scores ``(B,)``, and as parts the numbers per sample of its ``info``, if there are any."""
        if not samples:
            return Scores(torch.empty(0))
        if not self._arguments:
            return self._scores(self._answer([samples]), len(samples))
        # A tensor holds images of one size; what has no image cannot be judged.
        sizes = dict.fromkeys(sample.image.size for sample in samples if sample.image is not None)
        total, parts = torch.full((len(samples),), math.nan), dict[str, torch.Tensor]()
        for size in sizes:
            chosen = [i for i, s in enumerate(samples) if s.image is not None and s.image.size == size]
            scores = self._scores(self._answer(self._columns([samples[i] for i in chosen])), len(chosen))
            total[chosen] = scores.total
            for name, part in scores.parts.items():
                parts.setdefault(name, torch.full((len(samples),), math.nan))[chosen] = part
        return Scores(total, parts)

    def _with_gradient(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """The function's scores ``(B,)`` of a tensor ``(B, 3, H, W)`` in [0, 1], with their gradient."""
        columns: dict[str, object] = {
            "images": images,
            "prompts": [prompt.text for prompt in prompts],
            "metadata": [dict(prompt.attributes) for prompt in prompts],
        }
        answer = self._answer([columns[argument] for argument in self._arguments])
        scores = answer[0] if isinstance(answer, tuple) else answer
        if not isinstance(scores, torch.Tensor):
            raise InputError(f"the reward {self.name} says that it is differentiable, and returned {_shown(scores)}")
        return scores

    def _columns(self, samples: Sequence[Sample]) -> list[object]:
        columns: dict[str, object] = {
            "images": to_tensor([sample.image for sample in samples if sample.image is not None]),
            "prompts": [sample.prompt.text for sample in samples],
            "metadata": [dict(sample.prompt.attributes) for sample in samples],
        }
        return [columns[argument] for argument in self._arguments]

    def _answer(self, arguments: Sequence[object]) -> object:
        try:
            return self._function(*arguments)
        except UserError:
            raise
        except Exception as error:
            told = f"the reward {self.name} failed {_where(error, self.file)}: {_told(error)}"
            if self._looked_for_texts(arguments, error):
                told += (
                    "; it got samples with an image and no text, for it does not say what it judges: a function of"
                    f' texts says so by {self._called}.modality = "text", and reads sample.text'
                )
            raise InputError(told) from error

    def _looked_for_texts(self, arguments: Sequence[object], error: Exception) -> bool:
        """Whether this may be a function of texts that got images, because it says nothing of what it judges."""
        if self._arguments or hasattr(self._function, "modality"):
            return False
        without = all(sample.text is None for sample in cast(Sequence[Sample], arguments[0]))
        return without and isinstance(error, AttributeError | TypeError)

    def _scores(self, answer: object, count: int) -> Scores:
        if isinstance(answer, Scores):
            parts = {name: self._column(part, count) for name, part in answer.parts.items()}
            return Scores(self._column(answer.total, count), parts)
        info: object = {}
        # A pair of two sequences is (scores, info); a pair of two numbers is the scores of two samples.
        if isinstance(answer, tuple) and len(answer) == 2 and _length(answer[0]) is not None:
            answer, info = answer
        total = self._column(answer, count)
        parts = {}
        if isinstance(info, Mapping):
            for name, values in info.items():
                if _length(values) == count:
                    try:
                        parts[str(name)] = self._column(values, count)
                    except InputError:
                        continue  # `info` is anything the author likes; texts and lists in it are not scores.
        return Scores(total, parts)

    def _column(self, values: object, count: int) -> torch.Tensor:
        """float32 ``(count,)`` on the CPU, or an error that says what is wrong with the values."""
        tensor = _tensor(values)
        if tensor is not None:
            if tensor.ndim == 2 and tensor.shape[1] == 1:
                tensor = tensor[:, 0]
            if tensor.shape != (count,):
                raise InputError(
                    f"the reward {self.name} returned scores of shape {tuple(tensor.shape)} for {count} samples; "
                    f"return one score per sample, ({count},)"
                )
            return tensor.detach().float().cpu()
        if _length(values) is None:
            raise InputError(f"the reward {self.name} returned {_shown(values)}; return a list of one score per sample")
        scores = list(cast(Sequence[object], values))
        if len(scores) != count:
            raise InputError(
                f"the reward {self.name} returned {len(scores)} scores for {count} samples; return one per sample"
            )
        return torch.tensor([self._number(score) for score in scores], dtype=torch.float32)

    def _number(self, score: object) -> float:
        if score is None:
            return math.nan
        if isinstance(score, str | bytes):
            raise InputError(f"the reward {self.name} returned the text {str(score)!r} as a score, not a number")
        try:
            return float(score)  # type: ignore[arg-type]  # the check is whether it works
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"the reward {self.name} returned {_shown(score)} as a score, not a number") from None


def load(spec: str, arguments: Mapping[str, str] | None = None) -> Reward:
    """The reward that ``path/to/file.py:attr`` or ``module:attr`` names; ``arguments`` are for a class only."""
    place, colon, attribute = spec.rpartition(":")
    if not (colon and place and attribute):
        raise ConfigError(f"{spec!r} does not name a reward; write path/to/file.py:attr or module:attr")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place, spec)
    found: object = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise ConfigError(f"{place} has no {attribute!r}; it has {', '.join(public) or 'no function at all'}")
        found = getattr(found, name)
    file = str(getattr(module, "__file__", None) or place)
    if inspect.isclass(found):
        return _built(found, spec, file, arguments or {})
    if arguments:
        raise ConfigError(f"{spec} is not a class, so it takes no arguments ({', '.join(arguments)})")
    if isinstance(found, Reward):
        return found
    if not callable(found):
        raise ConfigError(f"{spec} is {_shown(found)}; a reward is a function, or an object with __call__(samples)")
    return FunctionReward(found, attribute, file)


def of(function: Callable[..., object]) -> Reward:
    """A function, or an object that can be called, as a reward; what is one already stays as it is."""
    if inspect.isclass(function):
        raise ConfigError(f"{function.__name__} is a class; give an object of it")
    if isinstance(function, Reward):
        return function
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return FunctionReward(
        function, str(getattr(function, "__name__", type(function).__name__)), getattr(code, "co_filename", "")
    )


def _built(kind: type, spec: str, file: str, arguments: Mapping[str, str]) -> Reward:
    try:
        made = kind(**typed(kind, arguments, spec))
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{spec} could not be built {_where(error, file)}: {_told(error)}") from error
    if isinstance(made, Reward):
        return made
    if not callable(made):
        raise ConfigError(f"{spec} is a class without __call__(samples), so it is no reward")
    return FunctionReward(made, kind.__name__, file)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NotFoundError(f"there is no file {path} to load a reward from")
    path = path.resolve()
    # The name must not meet another module's, and must stay the same for the same file.
    name = f"_diffalign_reward_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up there
    # Last, so that the user's folder can serve the file's own imports and hide nothing of ours.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            raise ConfigError(f"{error.filename}, line {error.lineno}, is not valid Python: {error.msg}") from error
        if isinstance(error, Exception):
            raise ConfigError(f"{path.name} could not be loaded {_where(error, str(path))}: {_told(error)}") from error
        raise
    return module


def _from_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise NotFoundError(
                f"{spec}: no module {name!r} is installed; for a file of your own write path/to/file.py:attr"
            ) from None
        raise ConfigError(f"the module {name} could not be loaded: {_told(error)}") from error
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}, is not valid Python: {error.msg}") from error
    except Exception as error:
        raise ConfigError(f"the module {name} could not be loaded {_where(error)}: {_told(error)}") from error


def _arguments(function: Callable[..., object], name: str) -> tuple[str, ...]:
    """What to call it with: no names mean the samples, otherwise columns of them."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return ()  # a builtin without a signature
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = sum(p.default is p.empty for p in positional)
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    keyword = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    if keyword or count > 3 or not (positional or variadic):
        raise ConfigError(
            f"the reward {name}{_signature(function)} cannot be called; write it as {name}(samples) or "
            f"{name}(images, prompts, metadata)"
        )
    if not positional:
        return _FIELD_SIGNATURE
    if count <= 1 and positional[0].name != "images":
        return ()
    while count < min(len(positional), 3) and positional[count].name == _FIELD_SIGNATURE[count]:
        count += 1
    return _FIELD_SIGNATURE[:count]


def _signature(function: Callable[..., object]) -> str:
    return str(inspect.signature(function)).partition(" ->")[0]


def _where(error: Exception, file: str = "") -> str:
    """``at FILE, line N``: the innermost line of the user's file, or the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file and frame.filename == file] or list(frames)
    return f"at {own[-1].filename}, line {own[-1].lineno}" if own else ""


def _told(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _tensor(values: object) -> torch.Tensor | None:
    """A tensor or array as a tensor; None for anything else, arrays of objects and of texts among it."""
    if not (isinstance(values, torch.Tensor) or hasattr(values, "__array__")):
        return None
    try:
        return torch.as_tensor(values)
    except TypeError:
        return None


def _length(values: object) -> int | None:
    """How many there are, or None where it is not a sequence of values."""
    if isinstance(values, str | bytes | Mapping):
        return None
    try:
        return len(values)  # type: ignore[arg-type]  # the check is whether it works
    except TypeError:
        return None


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:59] + '…'} ({type(value).__name__})"
