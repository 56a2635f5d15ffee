"""Studies: pairs given to raters, votes kept, preferences exported.

``Study`` is the store; ``Protocol`` what raters are told; ``Answer`` what they say; ``StudyPair`` what goes in.
"""

from __future__ import annotations

from diffalign.study.answers import Answer, Point
from diffalign.study.loading import StudyPair
from diffalign.study.protocol import Protocol
from diffalign.study.store import Assignment, Study

__all__ = ["Answer", "Assignment", "Point", "Protocol", "Study", "StudyPair"]
