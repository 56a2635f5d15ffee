"""Logging in through an OpenID Connect provider: a small real one, with a key of its own, on a loopback port."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
import uvicorn
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from apps.label.accounts import Account
from apps.label.oidc import Config, Provider
from diffalign.errors import ConfigError, NotFoundError, RefusedError
from tests.label_server import LEAN, Server, made, serving, text_pairs

CLIENT, SECRET = "label", "the client's secret"


class Institution:
    """The provider. ``wrong`` says in what way its next answers are to be wrong."""

    def __init__(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": "one"})
        self.wrong = ""
        self.claims: dict[str, Any] = {}
        self.codes: dict[str, dict[str, str]] = {}
        self.issuer = ""
        app = Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self.metadata),
                Route("/authorize", self.authorize),
                Route("/token", self.token, methods=["POST"]),
                Route("/keys", self.keys),
            ]
        )
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.issuer = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)

    async def metadata(self, _: Request) -> Response:
        return JSONResponse(
            {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
                "jwks_uri": f"{self.issuer}/keys",
            }
        )

    async def keys(self, _: Request) -> Response:
        return JSONResponse({"keys": [self.key.as_dict(private=False, use="sig", alg="RS256")]})

    async def authorize(self, request: Request) -> Response:
        """The person agrees at once."""
        asked = dict(request.query_params)
        assert asked["response_type"] == "code" and asked["client_id"] == CLIENT
        assert asked["code_challenge_method"] == "S256" and "openid" in asked["scope"].split()
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        given = {"error": "access_denied"} if self.wrong == "denied" else {"code": code}
        return RedirectResponse(f"{asked['redirect_uri']}?{urlencode({**given, 'state': asked['state']})}", 303)

    async def token(self, request: Request) -> Response:
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        asked = self.codes.pop(form["code"], None)
        basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        if (
            asked is None
            or request.headers["authorization"] != f"Basic {basic}"
            or base64.urlsafe_b64encode(digest).decode().rstrip("=") != asked["code_challenge"]
            or form["redirect_uri"] != asked["redirect_uri"]
        ):
            return JSONResponse({"error": "invalid_grant"}, 400)
        return JSONResponse({"access_token": "a", "token_type": "Bearer", "id_token": self.id_token(asked["nonce"])})

    def id_token(self, nonce: str) -> str:
        now = int(time.time())
        claims = {
            "iss": self.issuer, "sub": "s-1", "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": nonce,
            **self.claims,
        }  # fmt: skip
        changed: dict[str, dict[str, Any]] = {
            "nonce": {"nonce": "another"}, "no nonce": {"nonce": None}, "audience": {"aud": "another"},
            "audiences": {"aud": [CLIENT, "another"], "azp": "another"}, "issuer": {"iss": "https://evil.example"},
            "expired": {"exp": now - 120, "iat": now - 400}, "no expiry": {"exp": None},
        }  # fmt: skip
        claims.update(changed.get(self.wrong, {}))
        claims = {name: value for name, value in claims.items() if value is not None}
        key = RSAKey.generate_key(2048, {"kid": "one"}) if self.wrong == "key" else self.key
        signed = jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)
        if self.wrong == "none":
            return f"{_part({'alg': 'none', 'typ': 'JWT'})}.{_part(claims)}."
        if self.wrong == "changed":
            head, _, signature = signed.split(".")
            return f"{head}.{_part({**claims, 'groups': ['admins']})}.{signature}"
        if self.wrong == "secret":  # signed with what everybody can read: the public key, as if it were a secret
            import hmac

            head = f"{_part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'one'})}.{_part(claims)}"
            code = hmac.new(self.key.as_pem(private=False), head.encode(), hashlib.sha256).digest()
            return f"{head}.{base64.urlsafe_b64encode(code).decode().rstrip('=')}"
        return {"nothing": "", "rubbish": "a.b.c"}.get(self.wrong, signed)


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def configuration(at: str, ours: str, **changes: Any) -> str:
    fields = {
        "issuer": at, "client_id": CLIENT, "client_secret_env": "LABEL_SECRET", "address": ours,
        "title": "<b>St. Elsewhere</b>", "scopes": ["openid", "groups"],
        "roles": {"rater": {"groups": ["raters"]}, "admin": {"groups": ["admins"], "sub": ["s-boss"]}}, **changes,
    }  # fmt: skip
    return json.dumps({name: value for name, value in fields.items() if value is not None})


@pytest.fixture(scope="module")
def institution() -> Iterator[Institution]:
    found = Institution()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def server(institution: Institution, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The address is only known once it has started, so the first start finds it out."""
    folder = tmp_path_factory.mktemp("oidc") / "study"
    made(folder, text_pairs(9)).close()
    with serving(folder, {"ann": "rater", "s-taken": "rater"}, code=LEAN) as plain:
        address = plain.url
    path = folder / "oidc.yaml"
    path.write_text(configuration(institution.issuer, address))
    with serving(
        folder, {"ann": "rater", "s-taken": "rater"}, code=LEAN, environment={"LABEL_SECRET": SECRET},
        oidc=str(path), port=urlsplit(address).port,
    ) as running:  # fmt: skip
        yield running


def come_back(server: Server, institution: Institution, wrong: str = "", **claims: Any) -> httpx.Response:
    """A browser that goes from the login page to the provider and back; returns the answer to the last step."""
    institution.wrong, institution.claims = wrong, {"groups": ["raters"], **claims}
    with httpx.Client(trust_env=False, timeout=30) as browser:
        begun = browser.get(f"{server.url}/oidc/login", params={"next": "/results"})
        assert begun.status_code == 303 and begun.headers["location"].startswith(institution.issuer)
        assert "SameSite=lax" in begun.headers["set-cookie"] and "HttpOnly" in begun.headers["set-cookie"]
        back = browser.get(begun.headers["location"])
        return browser.get(back.headers["location"])


def about(server: Server, answer: httpx.Response) -> Any:
    cookies = {"diffalign": answer.cookies["diffalign"]}
    return httpx.get(f"{server.url}/api/study", cookies=cookies, trust_env=False).json()


def test_who_has_a_role_is_let_in(server: Server, institution: Institution) -> None:
    """By a page that goes on by itself, because a strict cookie is not sent on a redirection from elsewhere."""
    answer = come_back(server, institution)
    assert answer.status_code == 200 and 'content="0; url=/results"' in answer.text
    assert "SameSite=strict" in answer.headers["set-cookie"]
    assert about(server, answer)["rater"] == {"name": "s-1", "role": "rater"}
    # The strongest role counts; a claim may be one text, or a list of them.
    for claims in ({"groups": ["raters", "admins"]}, {"groups": "admins"}, {"sub": "s-boss", "groups": []}):
        assert about(server, come_back(server, institution, **claims))["rater"]["role"] == "admin"
    assert "&lt;b&gt;St. Elsewhere" in httpx.get(f"{server.url}/login", trust_env=False).text


WRONG = [
    "nonce", "no nonce", "audience", "audiences", "issuer", "expired", "no expiry", "key", "none", "changed", "secret",
    "nothing", "rubbish", "denied",
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_an_id_token_that_is_not_right_lets_nobody_in(server: Server, institution: Institution, wrong: str) -> None:
    answer = come_back(server, institution, wrong)
    assert answer.status_code == 403 and "diffalign" not in answer.cookies
    assert 'role="alert"' in answer.text and "Traceback" not in answer.text and institution.issuer not in answer.text


def test_who_has_no_role_or_anothers_name_is_not_let_in(server: Server, institution: Institution) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"groups": []}, "no role"), ({"groups": None}, "no role"), ({"groups": ["others"]}, "no role"),
        ({"groups": {"admins": True}}, "no role"), ({"sub": "s-taken"}, "account with a password"),
        ({"sub": 7}, "not for this login"), ({"sub": "a\0b"}, "control characters"),
    ]  # fmt: skip
    for claims, says in refused:
        answer = come_back(server, institution, **claims)
        assert answer.status_code == 403 and "diffalign" not in answer.cookies, claims
        assert says in answer.text, answer.text


def test_a_login_belongs_to_the_browser_that_began_it(server: Server, institution: Institution) -> None:
    """Another state, another browser's return (somebody else's login slipped under), and the same return twice."""
    institution.wrong, institution.claims = "", {"groups": ["raters"]}

    def begin(browser: httpx.Client) -> str:
        to = browser.get(f"{server.url}/oidc/login").headers["location"]
        return browser.get(to).headers["location"]

    with httpx.Client(trust_env=False) as one, httpx.Client(trust_env=False) as two:
        back = begin(one)
        query = parse_qs(urlsplit(back).query)
        for state in ("", "guess", query["state"][0][:-1]):
            wrong = f"{server.url}/oidc/callback?{urlencode({'code': query['code'][0], 'state': state})}"
            assert one.get(wrong).status_code == 403
        begin(two)
        assert two.get(back).status_code == 403  # has a cookie, but that of another login
        back = begin(one)
        with httpx.Client(trust_env=False) as without:
            assert without.get(back).status_code == 403
        back = begin(one)
        assert one.get(back).status_code == 200
        assert one.get(back).status_code == 403


def test_logins_that_others_begin_do_not_push_out_ones_own(server: Server, institution: Institution) -> None:
    """What is under way lies in the browser's cookie: 2000 beginnings of others later one can still finish."""
    institution.wrong, institution.claims = "", {"groups": ["raters"]}
    with httpx.Client(trust_env=False) as mine, httpx.Client(trust_env=False) as others:
        back = mine.get(mine.get(f"{server.url}/oidc/login").headers["location"]).headers["location"]
        for _ in range(2000):
            assert others.get(f"{server.url}/oidc/login").status_code in (302, 303, 307)
            others.cookies.clear()
        assert mine.get(back).status_code == 200


def test_new_keys_of_the_provider_are_found(institution: Institution) -> None:
    """They are asked for when a signature does not fit, but not each time: not every token deserves a question."""
    institution.wrong, institution.claims = "", {"groups": ["raters"]}
    fields = json.loads(configuration(institution.issuer, "http://127.0.0.1:1"))
    provider = Provider(Config.model_validate({**fields, "client_secret_env": None}), SECRET)

    async def login() -> Account:
        url, browser = await provider.begin("/rate")
        async with httpx.AsyncClient(trust_env=False) as client:
            back = (await client.get(url)).headers["location"]
        query = {name: values[0] for name, values in parse_qs(urlsplit(back).query).items()}
        return (await provider.finish(query, browser))[0]

    async def all_of_it() -> None:
        assert (await login()).name == "s-1"
        institution.key = RSAKey.generate_key(2048, {"kid": "two"})
        assert (await login()).name == "s-1"
        institution.key = RSAKey.generate_key(2048, {"kid": "three"})
        with pytest.raises(RefusedError, match="signature"):
            await login()

    before = institution.key
    try:
        asyncio.run(all_of_it())
    finally:
        institution.key = before


def test_a_password_works_beside_it(server: Server) -> None:
    server.client("ann")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"issuer": "http://idp.example"}, "issuer: it is an https address"),
        ({"address": "ftp://x"}, "address: it is an https address"),
        ({"issuer": "https://x/?a=b"}, "without query"),
        ({"client_id": ""}, "client_id"),
        ({"roles": {}}, "gives nobody a role"),
        ({"roles": {"boss": {"groups": ["x"]}}}, "roles.boss"),
        ({"scopes": ["profile"]}, "openid"),
        ({"client_secret": "x"}, "not both"),
        ({"surprise": 1}, "surprise"),
        ({}, "the environment has no LABEL_SECRET"),
    ],
)
def test_a_configuration_that_is_wrong_says_where(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = tmp_path / "oidc.yaml"
    path.write_text(configuration("https://idp.example", "https://label.example", **changes))
    with pytest.raises(ConfigError, match=says):
        Provider.load(path)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        Provider.load(tmp_path / "nowhere.yaml")
    (tmp_path / "x").write_text("a: [")
    with pytest.raises(ConfigError, match="no YAML"):
        Provider.load(tmp_path / "x")
