"""The web server: one guard in front of every route, the JSON interface, the pages."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from starlette.middleware.base import RequestResponseEndpoint
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from apps.label import api, page
from diffalign.errors import NotFoundError, RefusedError, UserError
from diffalign.study import Study

STATIC = Path(__file__).with_name("static")


def create_app(study: Study) -> FastAPI:
    """The app for one study."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        request.state.user = "rater"
        return await call_next(request)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        status = 404 if isinstance(error, NotFoundError) else 409 if isinstance(error, RefusedError) else 400
        return JSONResponse({"error": str(error)}, status)

    @app.get("/")
    async def home() -> Response:
        return RedirectResponse("/rate", 303)

    app.include_router(api.router(study))
    app.mount("/static", StaticFiles(directory=STATIC))
    page.mount(app)
    return app
