"""Studies: pairs given to raters, votes kept, preferences exported.

``Study`` is the store; ``StudyPair`` what goes in; ``Protocol`` what raters are told; ``Turn`` what their screen gets;
``Answer`` what they say.
"""

from __future__ import annotations

from diffalign.study.answers import Answer, Point
from diffalign.study.loading import StudyPair
from diffalign.study.protocol import Criterion, Protocol, Rules
from diffalign.study.store import Study
from diffalign.study.turns import Assignment, Progress, Turn, Verdict

__all__ = [
    "Answer",
    "Assignment",
    "Criterion",
    "Point",
    "Progress",
    "Protocol",
    "Rules",
    "Study",
    "StudyPair",
    "Turn",
    "Verdict",
]
