"""What the rating page asks of the server, as JSON. Everything is about the rater of the session and the database.

A page knows an assignment by its token alone. It never sends which sample stood where, so it cannot be wrong about it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from diffalign.study import Answer, Assignment, Point, Study


class PointIn(BaseModel):
    """A marked place."""

    model_config = ConfigDict(extra="forbid")

    side: Literal["left", "right"]
    x: float
    y: float
    label: str = ""


class VoteIn(BaseModel):
    """A vote as the page sends it."""

    model_config = ConfigDict(extra="forbid")

    token: str
    choice: Literal["left", "right", "tie_good", "tie_bad", "cannot_judge"]
    strength: int | None = None
    criteria: dict[str, str | dict[str, int]] = Field(default_factory=dict)
    points: list[PointIn] = Field(default_factory=list)
    comment: str = ""
    shown_at: float | None = None
    decided_at: float | None = None

    def answer(self) -> Answer:
        """The same in the words of the store."""
        points = [Point(point.side, point.x, point.y, point.label) for point in self.points]
        return Answer(
            self.choice, self.strength, dict(self.criteria), points, self.comment, self.shown_at, self.decided_at
        )


class TokenIn(BaseModel):
    """Which assignment is meant."""

    model_config = ConfigDict(extra="forbid")

    token: str
    reason: str = ""


def rater(request: Request) -> str:
    """The name of who is logged in; the guard has put it there."""
    name: str = request.state.user
    return name


Rater = Annotated[str, Depends(rater)]


def router(study: Study) -> APIRouter:
    """The routes for one study."""
    api = APIRouter(prefix="/api")

    def shown(name: str, assignment: Assignment | None) -> dict[str, object] | None:
        if assignment is None:
            return None
        row: dict[str, object] = {
            "token": assignment.token,
            "prompt": assignment.prompt,
            "kind": assignment.kind,
            "lease_until": assignment.lease_until,
            "protocol": assignment.protocol.sha256,
        }
        if assignment.kind == "text":
            for side in ("left", "right"):
                row[side] = study.content(name, assignment.token, side).decode("utf-8", "replace")
        return row

    def turn(name: str) -> dict[str, object]:
        """The pair to judge and the one after it, to be loaded in advance."""
        now = shown(name, study.claim(name))
        return {"now": now, "ahead": now and shown(name, study.claim(name, ahead=1))}

    @api.get("/study")
    def about(name: Rater) -> dict[str, object]:
        protocol = study.protocol()
        return {"rater": name, "protocol": protocol.rules.model_dump(), "sha256": protocol.sha256}

    @api.get("/turn")
    def next_turn(name: Rater) -> dict[str, object]:
        return turn(name)

    @api.post("/vote")
    def vote(name: Rater, given: VoteIn) -> dict[str, object]:
        number = study.vote(name, given.token, given.answer())
        return {"vote": number, **turn(name)}

    @api.post("/undo")
    def undo(name: Rater) -> dict[str, object]:
        study.undo(name)
        return turn(name)

    @api.post("/skip")
    def skip(name: Rater, given: TokenIn) -> dict[str, object]:
        study.skip(name, given.token)
        return turn(name)

    @api.post("/flag")
    def flag(name: Rater, given: TokenIn) -> dict[str, object]:
        study.flag(name, given.token, given.reason)
        return turn(name)

    @api.get("/image/{token}/{side}")
    def image(name: Rater, token: str, side: Literal["left", "right"]) -> Response:
        return Response(study.content(name, token, side), media_type="image/png")

    return api
