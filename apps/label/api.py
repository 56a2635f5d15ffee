"""What the rating page asks of the server, as JSON. Everything is about the rater of the session and the database.

A page knows an assignment by its token alone. It never sends which sample stood where, so it cannot be wrong about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from apps.label.limits import Turns
from diffalign.errors import InputError, NotFoundError
from diffalign.study import Answer, Assignment, Point, Study, Turn

Queue = Literal["pairs", "disputed"]
LONGEST_REASON = 20_000
TOLD = {
    "question", "guideline", "criteria", "criteria_required", "strength", "points", "min_view_seconds", "lease_minutes",
}  # fmt: skip
"""What a page needs of a protocol. The rest, how many pairs are tests, how they are chosen, its name, might unblind."""
PNG = b"\x89PNG\r\n\x1a\n"


class PointIn(BaseModel):
    """A marked place."""

    model_config = ConfigDict(extra="forbid", strict=True)

    side: Literal["left", "right"]
    x: float
    y: float
    label: str = ""


class VoteIn(BaseModel):
    """A vote as the page sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)

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

    model_config = ConfigDict(extra="forbid", strict=True)

    token: str


class FlagIn(TokenIn):
    """Which assignment is broken, and how."""

    reason: str = ""


class NothingIn(BaseModel):
    """An empty object."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AnyTextResponse(Response):
    """JSON in ASCII, so that every text arrives, broken Unicode too."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """The bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _rater(request: Request) -> str:
    """The name of who is logged in; the guard has put it there."""
    name: str = request.state.user
    return name


def _queue(request: Request, queue: Annotated[Queue, Query()] = "pairs") -> Queue:
    """The queue that is asked for, if it is one for this role."""
    if queue == "disputed" and request.state.role not in ("adjudicator", "admin"):
        raise HTTPException(403, "only an adjudicator judges pairs in dispute")
    return queue


Rater = Annotated[str, Depends(_rater)]
Asked = Annotated[Queue, Depends(_queue)]


def shown(assignment: Assignment | None) -> dict[str, object] | None:
    """An assignment as the page gets it."""
    if assignment is None:
        return None
    row: dict[str, object] = {
        "token": assignment.token,
        "prompt": assignment.prompt,
        "kind": assignment.kind,
        "lease_until": assignment.lease_until,
        "protocol": assignment.protocol.sha256,
        "answer": None if assignment.answer is None else asdict(assignment.answer),
        "others": [asdict(verdict) for verdict in assignment.others],
    }
    if assignment.kind == "text":
        # None and None: a file of the study cannot be read, and the page says that the pair cannot be shown.
        row["left"], row["right"] = assignment.texts or (None, None)
    return row


def turned(turn: Turn) -> dict[str, object]:
    """A turn as the page gets it."""
    return {"now": shown(turn.now), "ahead": shown(turn.ahead), "progress": asdict(turn.progress)}


class Desk:
    """Does what raters ask, those who write one after the other; makes an account a rater when it first comes."""

    def __init__(self, study: Study, write: Turns) -> None:
        self._study, self._write = study, write
        self._known: set[str] = set()

    async def __call__(self, function: Callable[..., Any], name: str, *args: object) -> Any:
        """What a method of the study returns for this rater."""
        if name not in self._known:
            await self._write(self._study.add_rater, name)
            self._known.add(name)
        return await self._write(function, name, *args)


def _token(token: str) -> str:
    """The token, if it can be one; a database may stumble over what cannot."""
    if not re.fullmatch("[0-9a-f]{32}", token):
        raise NotFoundError("you have no such assignment; ask for the next one")
    return token


def router(study: Study, write: Turns, accounts: bool) -> APIRouter:
    """The routes for one study. ``accounts`` says whether one can log out."""
    api = APIRouter(prefix="/api", default_response_class=AnyTextResponse)
    desk = Desk(study, write)

    @api.get("/study")
    async def about(request: Request, name: Rater) -> Response:
        protocol = await run_in_threadpool(study.protocol)
        judge = request.state.role in ("adjudicator", "admin")
        return AnyTextResponse(
            {
                "title": study.title,
                "accounts": accounts,
                "rater": {"name": name, "role": request.state.role},
                "protocol": protocol.rules.model_dump(mode="json", include=TOLD),
                "sha256": protocol.sha256,
                "queues": ["pairs", "disputed"] if judge else ["pairs"],
                "disputed": await run_in_threadpool(study.disputes) if judge else 0,
            }
        )

    @api.get("/turn")
    async def turn(name: Rater, queue: Asked) -> Response:
        return AnyTextResponse(turned(await desk(study.turn, name, queue)))

    @api.post("/vote")
    async def vote(name: Rater, given: VoteIn, queue: Asked) -> Response:
        number, after = await desk(study.vote_and_turn, name, _token(given.token), given.answer(), queue)
        return AnyTextResponse({"vote": number, **turned(after)})

    @api.post("/undo")
    async def undo(name: Rater, _: NothingIn, queue: Asked) -> Response:
        return AnyTextResponse(turned(await desk(study.undo_and_turn, name, queue)))

    @api.post("/skip")
    async def skip(name: Rater, given: TokenIn, queue: Asked) -> Response:
        return AnyTextResponse(turned(await desk(study.skip_and_turn, name, _token(given.token), queue)))

    @api.post("/flag")
    async def flag(name: Rater, given: FlagIn, queue: Asked) -> Response:
        if len(given.reason) > LONGEST_REASON:
            raise InputError(f"the reason has {len(given.reason)} characters; {LONGEST_REASON} are allowed")
        after = await desk(study.flag_and_turn, name, _token(given.token), given.reason, queue)
        return AnyTextResponse(turned(after))

    @api.post("/unflag")
    async def unflag(name: Rater, _: NothingIn, queue: Asked) -> Response:
        return AnyTextResponse(turned(await desk(study.unflag_and_turn, name, queue)))

    @api.get("/image/{token}/{side}")
    def image(name: Rater, token: str, side: str) -> Response:
        if side not in ("left", "right"):
            raise NotFoundError("there is no such side; there are left and right")
        content = study.content(name, _token(token), "left" if side == "left" else "right")
        # No text begins like this: UTF-8 has no character of which 0x89 is the first byte.
        if not content.startswith(PNG):
            raise NotFoundError("this pair has no images; its texts come with the turn")
        return Response(content, media_type="image/png")

    return api
