"""What a text says about a brain MR slice, read by fixed rules over ``findings_lexicon``.

A text is read in sentences, a sentence in clauses, and a clause in parts between commas. Three things decide what a
word counts for: whether it is negated (*no lesion*, *is not seen*), whether it is doubted (*possible*, *if*, a
question), and whether it is about something else (*no other lesion*, *the rest is normal*).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from rewards.findings_lexicon import expressions

_CLAUSE = re.compile(r"[;:()]|\s-\s|\band (?=(?:an?|the|there|it|this|no|on|in)\b)")
_LESIONS = frozenset({"lesion", "lesions", "signal+lesion", "mass"})
_CLAIMS = _LESIONS | {"normal", "absence"}
_LOOKS = frozenset({"looks", "look", "appears", "appear", "all", "both"})
_PREPOSITIONS = frozenset({"at", "through", "near", "of", "in", "level", "around", "across"})
_FRAME = frozenset({"side", "level", "plane", "contrast", "article", "verb", "word"})
"""What a part may hold that only says where, and goes with the part after it: *On the left, …*"""


class Token(NamedTuple):
    """One phrase: what kind of thing it says, which one, and its words."""

    kind: str
    value: str
    words: str


@dataclass
class Reading:
    """What is said, in sets of values. Empty where nothing is."""

    plane: set[str] = field(default_factory=set)
    contrast: set[str] = field(default_factory=set)
    level: set[str] = field(default_factory=set)
    side: set[str] = field(default_factory=set)
    size: set[str] = field(default_factory=set)
    signal: set[str] = field(default_factory=set)
    denied: set[tuple[str, str]] = field(default_factory=set)
    """(kind, value) of what is said not to be so: *not on the left*."""
    normal_sides: set[str] = field(default_factory=set)
    """Sides on which there is said to be nothing."""
    present: bool = False
    """A lesion is said to be there."""
    absent: bool = False
    """The whole slice is said to have none."""
    doubtful: bool = False
    """A lesion is said to be possible."""
    invented: set[str] = field(default_factory=set)
    """What no row could say, by name."""
    repeats: int = 0
    """Sentences that stand there more than once, counted each time after the first."""

    @property
    def empty(self) -> bool:
        """Whether nothing was understood."""
        said = (self.plane, self.contrast, self.level, self.side, self.size, self.present, self.absent, self.doubtful)
        return not any(said)


@lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """What the text says; the same object for the same text, so it must not be changed."""
    reading = Reading()
    sentences = list(_sentences(text))
    for sentence, asked in sentences:
        for clause in _CLAUSE.split(sentence):
            _clause(clause, reading, asked)
    counts = Counter(re.sub(r"\W+", " ", sentence).strip() for sentence, _ in sentences)
    reading.repeats = sum(count - 1 for sentence, count in counts.items() if sentence and count > 1)
    if reading.normal_sides >= {"left", "right"} or reading.normal_sides >= {"anterior", "posterior"}:
        reading.absent = True
    return reading


def _sentences(text: str) -> Iterator[tuple[str, bool]]:
    """Sentences in small letters, and whether each is a question. ``name=value`` is no language and left out."""
    text = re.sub(r"[\w-]+\s*=\s*\S+", " ", text.lower()).replace("’", "'")
    text = re.sub(r"[‐‑‒–]", "-", text)
    for found in re.finditer(r"((?:[^.!?\n]|\.(?=\d))+)([.!?\n]|$)", text):
        if found[1].strip():
            yield " ".join(found[1].split()), found[2] == "?"


def _clause(text: str, reading: Reading, asked: bool) -> None:
    """Reads the parts of one clause into ``reading``."""
    tokens = _tokens(text)
    starts = [0, *(i + 1 for i, token in enumerate(tokens) if token.kind == "break")]
    for start, end in zip(starts, [*starts[1:], len(tokens) + 1], strict=True):
        negated = False
        waiting: list[Token] = []
        for part in _parts(tokens[start : end - 1 if end <= len(tokens) else end]):
            if part and not waiting and {token.kind for token in part} <= _FRAME:
                waiting = part
                continue
            negated = _part([*waiting, *part], reading, asked, negated and _continues(part))
            waiting = []
        if waiting:
            _part(waiting, reading, asked, False)


def _parts(tokens: list[Token]) -> Iterator[list[Token]]:
    part: list[Token] = []
    for token in tokens:
        if token.kind == "comma":
            yield part
            part = []
        else:
            part.append(token)
    yield part


def _continues(part: list[Token]) -> bool:
    """Whether a part goes on with a list that began with *no*: bare nouns, and nothing said about them."""
    kinds = {token.kind for token in part}
    return bool(kinds) and kinds <= {"invented", "mass", "lesion", "lesions", "word", "negate"}


def _part(tokens: list[Token], reading: Reading, asked: bool, negated: bool) -> bool:
    """Reads one part; returns whether it ended negated."""
    marked, negated = _negations(tokens, negated)
    kinds = {token.kind for token in tokens}
    said = {token.kind for token, no in marked if not no}
    _inventions(marked, reading)
    _lesions(marked, reading, asked or "hedge" in kinds)
    about = bool(said & _LESIONS) and "other" not in said
    elsewhere = bool(said & {"invented", "other"}) and not about  # what is said is about that other thing
    nowhere = bool(kinds & (_LESIONS | {"area", "normal", "absence"})) and not about
    bare = not kinds & (_LESIONS | {"area", "normal", "absence", "invented"})
    for token, no in marked:
        kind = token.kind.partition("+")[0]
        if kind in ("plane", "contrast", "level", "side", "size", "signal") and no and bare:
            reading.denied.add((kind, token.value))
        elif kind in ("plane", "contrast"):
            getattr(reading, kind).add(token.value)
        elif kind == "level" and not elsewhere:
            reading.level.add(token.value)
        elif kind == "sides" and not no and not nowhere:
            reading.invented.add("both sides")
        elif kind in ("side", "size", "signal") and not (no or elsewhere or (nowhere and kinds & _CLAIMS)):
            getattr(reading, kind).add(token.value)
    return negated


def _negations(tokens: list[Token], negated: bool) -> tuple[list[tuple[Token, bool]], bool]:
    """Each token with whether it is negated, and whether the negation is still on at the end."""
    marked: list[tuple[Token, bool]] = []
    for token in tokens:
        if token.kind == "negated":
            marked = [(before, True) for before, _ in marked]
        elif token.kind == "negate":
            negated = True
        elif token.kind == "absence":
            marked.append((Token("normal", "", token.words), False))
        elif token.kind == "around":
            negated = False
        else:
            marked.append((token, negated))
    return marked, negated


def _lesions(marked: list[tuple[Token, bool]], reading: Reading, doubted: bool) -> None:
    """What a part says about whether there is a lesion."""
    kinds = {token.kind for token, _ in marked}
    sides = {token.value for token, _ in marked if token.kind == "side"}
    sized = any(token.kind == "size" for token, _ in marked)
    another = False
    for i, (token, no) in enumerate(marked):
        if token.kind == "area" and not _described(marked, i):
            continue
        if token.kind in _LESIONS or token.kind == "area":
            if "other" in kinds or "rest" in kinds:
                another = another or not no
            elif no:
                _nothing(reading, sides, partly=sized or token.kind == "mass")
            elif doubted:
                reading.doubtful = True
            else:
                reading.present = True
                another = another or token.kind == "lesions" or "count" in kinds
        elif token.kind == "normal" and not kinds & {"rest", "other"} and not doubted:
            if no:
                reading.present = True
            elif not token.words.startswith("nothing") and (subject := _subject(marked[:i])):
                reading.invented.add(f"normal {subject}")
            else:
                _nothing(reading, sides)
    if another:
        reading.invented.add("another lesion")


def _subject(before: list[tuple[Token, bool]]) -> str:
    """The level that is itself said to be normal (*the ventricles are normal*); empty where it is a place."""
    words = [token for token, _ in before if token.kind not in ("article", "verb") and token.words not in _LOOKS]
    placed = any(token.words in _PREPOSITIONS for token in words)
    return words[-1].value if words and words[-1].kind == "level" and not placed else ""


def _described(marked: list[tuple[Token, bool]], i: int) -> bool:
    """Whether *area* at ``i`` is a lesion: it is one where size or brightness stand before it."""
    return any(token.kind in ("size", "signal") for token, _ in marked[max(0, i - 3) : i])


def _nothing(reading: Reading, sides: Iterable[str], *, partly: bool = False) -> None:
    """Nothing is there: on these sides, or anywhere; of nothing *large* or no *mass* that does not follow."""
    if sides:
        reading.normal_sides.update(sides)
    elif not partly:
        reading.absent = True


def _inventions(marked: list[tuple[Token, bool]], reading: Reading) -> None:
    reading.invented.update(token.value for token, no in marked if token.kind in ("invented", "mass") and not no)


def _tokens(text: str) -> list[Token]:
    """The phrases of a clause in order, the longest at each place; other words and numbers are of kind ``word``."""
    found, at = [], 0
    for word in re.finditer(r",|\S+", text):
        if word.start() < at:
            continue
        start = word.start()
        if word[0] == ",":
            found.append(Token("comma", "", ","))
            continue
        while start < word.end() and not (text[start].isalnum()):
            start += 1
        found.append(_longest(text, start))
        at = start + len(found[-1].words)
        if text[at : at + 1] == "," or (at < word.end() and "," in text[at : word.end()]):
            found.append(Token("comma", "", ","))
            at = text.index(",", at) + 1
    return found


@lru_cache(maxsize=65536)
def _phrase(window: str) -> Token:
    best = Token("word", "", (re.match(r"[\w'.-]*", window) or [""])[0] or window[:1])
    length = 0
    for (kind, value), expression in expressions():
        match = expression.match(window)
        if match and match.end() > length:
            best, length = Token(kind, value, match[0]), match.end()
    return best


def _longest(text: str, start: int) -> Token:
    """The longest phrase at ``start``; eight words are as far as a phrase reaches."""
    words = text[start:].split(" ", 8)[:8]
    return _phrase(" ".join(words))
