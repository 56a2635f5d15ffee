"""Logging in by name and password, and logging out."""

from __future__ import annotations

import asyncio
import re
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from jinja2 import Environment, FileSystemLoader, Template
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import HTMLResponse, RedirectResponse, Response

from apps.label.accounts import Account, Accounts, spelled
from apps.label.guard import PAGES
from apps.label.limits import Throttle, Turns, network
from apps.label.sessions import Sessions
from apps.label.settings import Settings

TEMPLATES = Path(__file__).with_name("templates")
HASHES_AT_ONCE = 2
"""Each takes 64 MiB and a core for about a twentieth of a second."""
WAITING = 200
NAME_FREE, NAME_LONGEST = 5, 60.0
"""Of one name: short enough that nobody can keep somebody else out for long."""
ADDRESS_FREE, ADDRESS_LONGEST = 20, 900.0


def local(target: object) -> str:
    """Where to go after the login: one of our own pages, whatever was asked for."""
    try:
        found = urlsplit(target if isinstance(target, str) else "")
    except ValueError:
        return "/rate"
    if found.scheme or found.netloc or found.path not in PAGES or found.path == "/":
        return "/rate"
    return found.path + (f"?{found.query}" if re.fullmatch(r"[\w=&.%-]{1,500}", found.query, re.ASCII) else "")


class Door:
    """Opens sessions, and sets and deletes their cookie."""

    def __init__(self, sessions: Sessions, write: Turns, settings: Settings) -> None:
        self.sessions, self.write, self.settings = sessions, write, settings

    async def open(self, request: Request, account: Account, response: Response) -> Response:
        """The response, with a new session in it; one that the browser had before is ended."""
        await self.close(request, response)
        secret = await self.write(self.sessions.begin, account)
        self._set(response, secret, int(self.settings.expiry))
        return response

    async def close(self, request: Request, response: Response) -> Response:
        """The response, with the session of the request ended."""
        if request.state.secret is not None:
            await self.write(self.sessions.end, request.state.secret)
            self._set(response, "", 0)
        return response

    def _set(self, response: Response, secret: str, age: int) -> None:
        # One cookie of a name in a response: the last word counts.
        name = self.settings.cookie.encode() + b"="
        response.raw_headers[:] = [
            field for field in response.raw_headers if not (field[0] == b"set-cookie" and field[1].startswith(name))
        ]
        response.set_cookie(
            self.settings.cookie, secret, max_age=age, secure=self.settings.https, httponly=True, samesite="strict"
        )


def page(settings: Settings, target: str, name: str = "", error: str = "", status: int = 200) -> HTMLResponse:
    """The login page."""
    provider = settings.oidc.config.title if settings.oidc else ""
    text = _template().render(target=target, name=name, error=error, provider=provider)
    return HTMLResponse(text.encode("utf-8", "replace"), status)


@cache
def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)


def _template() -> Template:
    return _environment().get_template("login.html")


class Attempts:
    """Checks names and passwords, not too many at once, and slower and slower for who fails."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._names = Throttle(NAME_FREE, NAME_LONGEST)
        self._addresses = Throttle(ADDRESS_FREE, ADDRESS_LONGEST)
        self._hashing = asyncio.Semaphore(HASHES_AT_ONCE)
        self._waiting = 0

    async def check(self, name: str, password: str, address: str) -> Account | float | None:
        """The account; None for a wrong name or password; or seconds to wait, the password not looked at."""
        if self._waiting >= WAITING:
            return 5.0
        self._waiting += 1
        try:
            # The throttles are asked when it is this attempt's turn, so that many at once get no further than few.
            async with self._hashing:
                name, address = spelled(name)[:LONGEST_KEY], network(address)
                wait = max(self._names.wait(name), self._addresses.wait(address))
                if wait > 0:
                    return wait
                account = await run_in_threadpool(self._accounts.verify, name, password)
                if account is None:
                    self._names.failed(name)
                    self._addresses.failed(address)
                else:
                    self._names.succeeded(name)
                return account
        finally:
            self._waiting -= 1


LONGEST_KEY = 400


def router(accounts: Accounts, door: Door, settings: Settings) -> APIRouter:
    """The routes."""
    routes, attempts = APIRouter(), Attempts(accounts)

    @routes.get("/login")
    async def form(request: Request) -> Response:
        target = local(request.query_params.get("next"))
        return RedirectResponse(target, 303) if request.state.user is not None else page(settings, target)

    @routes.post("/login")
    async def login(request: Request) -> Response:
        async with request.form(max_files=0, max_fields=10) as given:
            fields = {key: "" if isinstance(value, UploadFile) else value for key, value in given.items()}
        name, target = fields.get("name", ""), local(fields.get("next"))
        address = request.client.host if request.client else ""
        found = await attempts.check(name, fields.get("password", ""), address)
        if isinstance(found, float):
            seconds = max(1, round(found + 0.5))
            said = page(settings, target, name, f"Too many attempts. Please wait {seconds} s, then try again.", 429)
            said.headers["retry-after"] = str(seconds)
            return said
        if found is None:
            return page(settings, target, name, "The name or the password is wrong.", 401)
        return await door.open(request, found, RedirectResponse(target, 303))

    @routes.post("/logout")
    async def logout(request: Request) -> Response:
        return await door.close(request, RedirectResponse("/login", 303))

    return routes
