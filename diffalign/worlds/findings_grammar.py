"""How the findings world writes: from facts, a register and a length to one of many texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffalign.worlds import findings_words as words

BRIGHTNESS = {"T1": "dark", "T2": "bright", "FLAIR": "bright"}
"""How a lesion looks, by contrast."""


@dataclass(frozen=True)
class Said:
    """What a text is to say. Facts that are not there are not said."""

    facts: Mapping[str, str]
    signal: str
    """How bright the lesion is: ``bright`` or ``dark``."""
    stressed: bool = False
    """Whether the brightness must be said."""
    invented: bool = False
    """Whether the text adds what no row says."""


class Voice:
    """Chooses words: those of a radiologist with probability ``jargon``, and more of them with ``verbosity``."""

    def __init__(self, rng: np.random.Generator, jargon: float, verbosity: float) -> None:
        self._rng, self._jargon, self._verbosity = rng, jargon, verbosity

    def one(self, choices: Sequence[str]) -> str:
        """One of them, all equally likely."""
        return choices[int(self._rng.integers(len(choices)))]

    def word(self, choices: words.Choices) -> str:
        """One of the plain words or of the jargon."""
        return self.one(choices[int(self.jargon())])

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return bool(self._rng.random() < probability)

    def jargon(self) -> bool:
        """Whether the next choice is a radiologist's."""
        return self.chance(self._jargon)

    def long(self, share: float = 1.0) -> bool:
        """Whether to spend words here."""
        return self.chance(share * self._verbosity)


def findings(said: Said, voice: Voice) -> str:
    """One to four sentences of a report."""
    level = _level(said, voice)
    early = voice.chance(0.65)
    head = _technique(said, level if early else "", voice)
    body = _lesion(said, "" if early else level, voice, alone=head.endswith(".")) if "lesion" in said.facts else ""
    if not body and not early and level:
        body = f"The level is {level}."
    parts = [_joined(head, body, voice)]
    present = said.facts.get("lesion") == "present"
    if voice.long(0.8):
        parts.append(voice.word(words.REST if present else words.QUIET))
    if voice.long(0.4):
        parts.append(voice.word(words.ADVICE))
    if said.invented:
        parts.insert(1 + int(voice.chance(0.5)), voice.word(words.INVENTED))
    return _text(parts)


def explanation(said: Said, voice: Voice) -> str:
    """Two to five sentences for a patient."""
    place = _place(said, voice)
    told, body = voice.chance(0.6), ""
    intro = _intro(said, place if told else "", voice)
    rest = "" if told else place
    if said.facts.get("lesion") == "present":
        body = _told(said, rest, voice)
    elif "lesion" in said.facts:
        body = voice.word(words.NOTHING_TOLD)
        if rest:
            body = f"{_near(rest, voice)}, {_lower(body)}"
    elif rest:
        body = f"The slice is {_near(rest, voice).lower()}."
    parts = [intro, body]
    if said.facts.get("lesion") == "present" and voice.long(0.6):
        parts.append(voice.word(words.REST))
    if voice.long(0.8):
        parts.append(voice.word(words.CLOSING))
    if said.invented:
        parts.insert(2, voice.word(words.INVENTED))
    return _text(parts)


WRITERS: dict[str, Callable[[Said, Voice], str]] = {"findings": findings, "explain": explanation}
"""Per task, who writes it."""


def _level(said: Said, voice: Voice) -> str:
    return voice.word(words.LEVEL[said.facts["level"]]) if "level" in said.facts else ""


def _technique(said: Said, level: str, voice: Voice) -> str:
    """The plane, the contrast and perhaps the level: a heading, a sentence, or the beginning of one (with a comma)."""
    plane = voice.word(words.PLANE[said.facts["plane"]]) if "plane" in said.facts else ""
    contrast = voice.word(words.CONTRAST[said.facts["contrast"]]) if "contrast" in said.facts else ""
    both = f"{plane} {contrast}" if voice.chance(0.7) else f"{contrast} {plane}"
    named = " ".join(both.split())
    if not named:
        return f"At the level of {level}," if level else ""
    at = f" {voice.one(('at the level of', 'through', 'at'))} {level}" if level else ""
    study = voice.word(words.STUDY)
    kind = int(voice.chance(0.5)) + int(voice.long())
    if kind == 0:
        return f"{named}{at}:" if voice.chance(0.7) else f"{named}{', ' + level if level else ''}:"
    if kind == 1:
        return f"{named} {study}{at}" + voice.one((".", ".", ":"))
    shown = f"{named} {study}{at}"
    return voice.one((f"On this {shown},", f"On the {shown},", f"This is {_a(shown)}."))


def _lesion(said: Said, level: str, voice: Voice, *, alone: bool) -> str:
    """The sentence or sentences about the lesion, and about the level where it has not been said.

    ``alone``: they do not go on a sentence that has begun.
    """
    at = f" {voice.one(('at the level of', 'at'))} {level}" if level else ""
    if said.facts["lesion"] == "none":
        text = voice.word(words.NOTHING)
        return f"At the level of {level}, {_lower(text)}" if level else text
    size, where = _size(said, voice), _where(said, voice)
    signal = voice.word(words.SIGNAL[said.signal]) if said.stressed or voice.chance(0.6) else ""
    noun = voice.word(words.NOUN if signal else words.BARE_NOUN)
    side = said.facts.get("side", "")
    if side and voice.chance(0.2):
        where, size = "", f"{size} {words.SIDED[side]}".strip()
    thing = " ".join(f"{size} {signal} {noun}".split())
    kind = voice.one(("there", "seen", "short", "split", "place", *(["shows"] if alone else [])))
    if kind == "there":
        return f"There is {_a(thing)}{_s(where)}{at}."
    if kind == "seen":
        return f"{_a(thing)} is {voice.word(words.SEEN)}{_s(where)}{at}."
    if kind == "shows":
        return f"It {voice.word(words.SHOWS)} {_a(thing)}{_s(where)}{at}."
    if kind == "short":
        return f"{thing}{_s(where)}{at}."
    if kind == "split" and size and "-" not in size and " " not in size:
        first = " ".join(f"{signal} {noun}".split())
        return f"There is {_a(first)}{_s(where)}{at}. It is {size}."
    if where.startswith(("in ", "on ", "towards ", "within ")):
        return f"{where}, there is {_a(thing)}{at}."
    return f"There is {_a(thing)}{_s(where)}{at}."


def _place(said: Said, voice: Voice) -> str:
    """The level in a patient's words, in a radiologist's, or in both."""
    if "level" not in said.facts:
        return ""
    name, plain = said.facts["level"], voice.one(words.PLACE[said.facts["level"]])
    if voice.jargon():
        return voice.word(words.LEVEL[name])
    return f"{plain} ({name})" if voice.chance(0.4) else plain


def _near(place: str, voice: Voice) -> str:
    return f"{voice.one(('Near', 'At', 'At the level of'))} {place}"


def _intro(said: Said, place: str, voice: Voice) -> str:
    """What is shown: the place where there is one, now and then the plane and the contrast."""
    contrast = said.facts.get("contrast", "")
    if voice.long(0.5) and "plane" in said.facts:
        thing = voice.one(words.VIEW[said.facts["plane"]])
        if voice.jargon():
            thing = _a(f"{voice.word(words.PLANE[said.facts['plane']])} {contrast} image".replace("  ", " "))
    else:
        named = f"{contrast} " if contrast and voice.chance(0.25) else ""
        thing = _a(f"{named}{voice.one(('picture', 'scan', 'MRI picture', 'slice'))}") + " of your brain"
    at = f" {voice.one(('near', 'at', 'at the level of', 'through'))} {place}" if place else ""
    if voice.jargon():
        openings = ("This examination is", "This acquisition represents", "The following interpretation concerns")
        opening = voice.one(openings)
    else:
        opening = voice.one(("This is", "This shows", "We looked at", "You had"))
    return f"{opening} {thing}{at}."


def _told(said: Said, rest: str, voice: Voice) -> str:
    """The lesion in one or two sentences to a patient."""
    size, where = _size(said, voice), _where(said, voice)
    signal = voice.word(words.SIGNAL[said.signal]) if said.stressed or voice.chance(0.5) else ""
    noun = voice.word(words.NOUN if signal else words.BARE_NOUN)
    thing = " ".join(f"{size} {signal} {noun}".split())
    at = f"{voice.one(('near', 'at the level of'))} {rest}" if rest else ""
    kind = voice.one(("there", "see", "found", "split"))
    if kind == "split" and size:
        first = " ".join(f"{signal} {noun}".split())
        second = f"It is {size}{' and lies ' + where if where and voice.chance(0.5) else ''}."
        here = "" if where and where in second else _s(where)
        return f"There is {_a(first)}{here}{_s(at)}. {second}"
    if kind == "found":
        found = voice.word((("found", "seen"), ("identified", "demonstrated")))
        return f"{_a(thing)} was {found}{_s(where)}{_s(at)}."
    if kind == "see":
        return f"We see {_a(thing)}{_s(where)}{_s(at)}."
    return f"There is {_a(thing)}{_s(where)}{_s(at)}."


def _size(said: Said, voice: Voice) -> str:
    return voice.word(words.SIZE[said.facts["size"]]) if "size" in said.facts else ""


def _where(said: Said, voice: Voice) -> str:
    return voice.word(words.WHERE[said.facts["side"]]) if "side" in said.facts else ""


def _joined(head: str, body: str, voice: Voice) -> str:
    if head.endswith(","):
        return f"{head} {_lower(body)}" if body else head[:-1] + "."
    if head.endswith(":"):
        return f"{head} {_lower(body) if voice.chance(0.5) else _upper(body)}" if body else head[:-1] + "."
    return f"{head} {_upper(body)}".strip()


def _a(thing: str) -> str:
    letters = ("F", "M", "MR", "MRI")
    first = thing.split(" ", 1)[0]
    return f"{'an' if first[:1].lower() in set('aeiou') or first in letters else 'a'} {thing}"


def _s(text: str) -> str:
    return f" {text}" if text else ""


def _lower(text: str) -> str:
    """With a small first letter, where the first word is no abbreviation."""
    return text if text[1:2].isupper() or text[1:2].isdigit() else text[:1].lower() + text[1:]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(parts: Sequence[str]) -> str:
    return " ".join(_upper(part) for part in parts if part)
