"""The web server: one guard in front of every route, the JSON interface, the pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from apps.label import api, environment, login, oidc
from apps.label.accounts import Accounts
from apps.label.guard import Guard, log
from apps.label.limits import Turns
from apps.label.sessions import Session, Sessions
from apps.label.settings import Settings
from diffalign.errors import ConfigError, NotFoundError, RefusedError, UserError
from diffalign.study import Study

STATIC = Path(__file__).with_name("static")


def create_app(study: Study, accounts: Accounts | None, settings: Settings) -> FastAPI:
    """The app for one study. Without accounts everybody is one rater: for the loopback address only."""
    if accounts is None and (settings.https or settings.oidc):
        raise ConfigError("without accounts the server is for this machine alone: no https, no OIDC")
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    write = Turns("study-writer")
    sessions = None if accounts is None else Sessions(study.engine, settings.expiry, settings.idle)
    _answer_errors(app)
    _add_pages(app, study)
    app.include_router(api.router(study, write, accounts is not None))
    if accounts is not None and sessions is not None:
        door = login.Door(sessions, write, settings)
        app.include_router(login.router(accounts, door, settings))
        if settings.oidc is not None:
            app.include_router(oidc.router(settings.oidc, accounts, door))
    app.mount("/static", StaticFiles(directory=STATIC))
    # Gradio reads the environment when it is imported and when it makes its page.
    with environment.quieted():
        from apps.label import page

        page.mount(app)
    app.add_middleware(Guard, settings=settings, sessions=sessions, valid=_valid(accounts, settings.oidc), write=write)
    return app


def _valid(accounts: Accounts | None, provider: oidc.Provider | None) -> Callable[[Session], bool]:
    """Whether a session's account is still what it was when it began."""

    def valid(session: Session) -> bool:
        account = accounts.get(session.name) if accounts else None
        if account is not None:
            return account.fingerprint == session.fingerprint
        return provider is not None and provider.fingerprint(session.role) == session.fingerprint

    return valid


def _add_pages(app: FastAPI, study: Study) -> None:
    busy = Turns("report")

    @app.get("/")
    async def home() -> Response:
        return RedirectResponse("/rate", 303)

    @app.get("/healthz")
    async def health() -> Response:
        return PlainTextResponse("ok")

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/results")
    async def results() -> Response:
        from apps.label import report

        return HTMLResponse((await busy(report.html, study)).encode("utf-8", "replace"))


def _answer_errors(app: FastAPI) -> None:
    """Every error as one sentence of ours: no text of a library, no path, no host."""

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        status = 404 if isinstance(error, NotFoundError) else 409 if isinstance(error, RefusedError) else 400
        return JSONResponse({"error": str(error)}, status)

    @app.exception_handler(RequestValidationError)
    async def misread(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str))[:80]
        # JSON in ASCII: a name of a field may hold anything.
        return api.AnyTextResponse({"error": f"{where or 'the request'}: {first['msg']}"}, 400)

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(OperationalError)
    async def database(_: Request, error: OperationalError) -> Response:
        log.error("the database: %s", error.orig)
        return JSONResponse({"error": "the database did not answer; try again"}, 503, {"retry-after": "2"})
