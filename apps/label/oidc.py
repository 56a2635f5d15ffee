"""Logging in through an OpenID Connect provider, such as the one of a hospital: only where it is configured.

Authorization code with PKCE (RFC 7636), state and nonce; the ID token is verified by the provider's published keys
(OpenID Connect Core 1.0, section 3.1.3.7). These are the only connections that the server ever opens.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from fastapi import APIRouter, Request
from itsdangerous import BadData, URLSafeTimedSerializer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.responses import HTMLResponse, RedirectResponse, Response

from apps.label.accounts import Account, Accounts, checked_name
from apps.label.settings import ROLES, Role, is_loopback
from diffalign.errors import ConfigError, InputError, NotFoundError, RefusedError

if TYPE_CHECKING:
    from apps.label.login import Door

COOKIE = "diffalign-oidc"
"""With the prefix __Host- over https, so that no other host of the domain can set it."""
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Public-key signatures alone: neither none, nor one whose key would be the client's secret."""
BEGUN_SECONDS = 600
SECONDS = 10.0
LEEWAY = 60
"""Seconds by which the clocks of provider and server may differ."""
KEYS_SECONDS = 60.0
"""New keys are asked for at most so often, whatever tokens claim to be signed with."""

log = logging.getLogger("diffalign.label")


class Config(BaseModel):
    """The fields of the YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuer: str
    client_id: str = Field(min_length=1)
    client_secret: str | None = None
    client_secret_env: str | None = None
    """The environment variable that has the secret, which then stands in no file."""
    address: str
    """Where browsers reach this server; the provider has to know ADDRESS/oidc/callback."""
    title: str = "your institution"
    """Stands on the login page."""
    scopes: tuple[str, ...] = ("openid", "profile")
    name: str = "sub"
    """The claim that becomes the rater's name. It must never pass from one person to another."""
    roles: dict[Role, dict[str, tuple[str, ...]]]
    """Per role, which claims give it: one of the values of one of the claims. Who has none may not log in."""

    @field_validator("issuer", "address")
    @classmethod
    def _addresses(cls, url: str) -> str:
        return _safe(url)

    @model_validator(mode="after")
    def _complete(self) -> Config:
        if "openid" not in self.scopes:
            raise ValueError("scopes has to contain openid")
        if self.client_secret and self.client_secret_env:
            raise ValueError("give client_secret or client_secret_env, not both")
        if not any(self.roles.values()):
            raise ValueError("roles gives nobody a role")
        return self

    @property
    def callback(self) -> str:
        """Where the provider sends people back to."""
        return self.address.rstrip("/") + "/oidc/callback"


def _safe(url: str) -> str:
    """The address, if what is sent there is protected on its way; else a ValueError."""
    found = urlsplit(url)
    if found.scheme != "https" and not (found.scheme == "http" and is_loopback(found.hostname or "")):
        raise ValueError("it is an https address (http on the loopback address alone)")
    if not found.hostname or found.query or found.fragment:
        raise ValueError("it is an address without query and fragment")
    return url


@dataclass(frozen=True, slots=True)
class _Begun:
    """A login that is under way. It lies in a signed cookie: its browser alone can finish it, and however many are
    begun, the server remembers none.
    """

    state: str
    nonce: str
    verifier: str
    target: str


class Provider:
    """One provider. What it publishes is read at the first login, and its keys anew where it signs with another."""

    def __init__(self, config: Config, secret: str | None) -> None:
        self.config = config
        self._secret = secret
        self._metadata: dict[str, Any] | None = None
        self._keys: dict[str, Any] | None = None
        self._renewed_at = -KEYS_SECONDS
        # A new key at each start: who is with the provider at that moment begins again.
        self._sealed = URLSafeTimedSerializer(
            secrets.token_bytes(32), salt="oidc", signer_kwargs={"digest_method": hashlib.sha256}
        )
        self._lock = asyncio.Lock()

    @classmethod
    def load(cls, path: str | Path) -> Provider:
        """Reads the YAML file; a ConfigError says what is wrong with it."""
        try:
            config = Config.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no YAML: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path}: {where or 'the file'}: {first['msg'].removeprefix('Value error, ')}") from None
        secret = config.client_secret
        if config.client_secret_env:
            secret = os.environ.get(config.client_secret_env)
            if not secret:
                raise ConfigError(f"{path}: the environment has no {config.client_secret_env}")
        return cls(config, secret)

    def fingerprint(self, role: str) -> str:
        """That of all sessions with this role: another provider, client or rule ends them."""
        ours = f"{self.config.issuer}\n{self.config.client_id}\n{role}\n{sorted(self.config.roles.items())}"
        return hashlib.sha256(ours.encode()).hexdigest()

    async def begin(self, target: str) -> tuple[str, str]:
        """Where to send the browser, and what its cookie has to say when it comes back."""
        from authlib.oauth2.rfc6749.parameters import prepare_grant_uri  # type: ignore[import-untyped]
        from authlib.oauth2.rfc7636 import create_s256_code_challenge  # type: ignore[import-untyped]

        metadata = await self._published()
        begun = _Begun(secrets.token_urlsafe(32), secrets.token_urlsafe(32), secrets.token_urlsafe(48), target)
        url = prepare_grant_uri(
            metadata["authorization_endpoint"],
            client_id=self.config.client_id,
            response_type="code",
            redirect_uri=self.config.callback,
            scope=" ".join(self.config.scopes),
            state=begun.state,
            nonce=begun.nonce,
            code_challenge=create_s256_code_challenge(begun.verifier),
            code_challenge_method="S256",
        )
        return str(url), str(self._sealed.dumps(asdict(begun)))

    async def finish(self, parameters: Mapping[str, str], cookie: str) -> tuple[Account, str]:
        """Who came back, and where they wanted to go. RefusedError with a sentence for whoever may not log in."""
        begun = self._unsealed(cookie)
        given = parameters.get("state", "").encode("utf-8", "surrogatepass")
        if begun is None or not secrets.compare_digest(begun.state.encode(), given):
            raise RefusedError("this login was not begun in this browser, or took too long; please begin again")
        if "error" in parameters or not parameters.get("code"):
            raise RefusedError("the provider did not log you in")
        metadata = await self._published()
        async with self._client() as client:
            token = await client.fetch_token(
                metadata["token_endpoint"], code=parameters["code"], code_verifier=begun.verifier,
                grant_type="authorization_code", redirect_uri=self.config.callback,
            )  # fmt: skip
        claims = await self._verified(str(token.get("id_token") or ""), str(token.get("access_token") or ""), begun)
        return self._account(claims), begun.target

    def _unsealed(self, cookie: str) -> _Begun | None:
        """What a cookie of ours says; None for any other, and for one that is too old."""
        try:
            return _Begun(**self._sealed.loads(cookie.encode("utf-8", "replace"), max_age=BEGUN_SECONDS))
        except BadData:
            return None

    async def _verified(self, id_token: str, access_token: str, begun: _Begun) -> Mapping[str, Any]:
        """The claims of an ID token, after all checks."""
        from authlib.oidc.core import CodeIDToken  # type: ignore[import-untyped]
        from joserfc import jwt
        from joserfc.errors import JoseError
        from joserfc.jwk import KeySet

        found = None
        for again in (False, True):  # the provider may have changed its keys since they were read
            keys = KeySet.import_key_set(await self._public_keys(again))  # type: ignore[arg-type]
            try:
                found = jwt.decode(id_token, keys, algorithms=ALGORITHMS)
                break
            except (JoseError, ValueError) as error:
                refused = f"{type(error).__name__}: {error}"
        if found is None:
            log.warning("OIDC: an ID token was refused: %s", refused)
            raise RefusedError("the provider's answer is not to be trusted: its signature is wrong")
        claims = CodeIDToken(
            found.claims,
            found.header,
            options={
                "iss": {"essential": True, "value": self.config.issuer},
                "aud": {"essential": True, "value": self.config.client_id},
            },
            params={"nonce": begun.nonce, "client_id": self.config.client_id, "access_token": access_token},
        )
        try:
            claims.validate(leeway=LEEWAY)
        except JoseError as error:
            log.warning("OIDC: an ID token was refused: %s", error)
            raise RefusedError("the provider's answer is not to be trusted: it is not for this login") from None
        return dict(claims)

    def _account(self, claims: Mapping[str, Any]) -> Account:
        name = claims.get(self.config.name)
        if not isinstance(name, str) or (self.config.name == "email" and claims.get("email_verified") is not True):
            raise RefusedError("the provider did not say who you are")
        role = next((role for role in reversed(ROLES) if _has(claims, self.config.roles.get(role, {}))), None)
        if role is None:
            raise RefusedError("you have no role in this study; ask who runs it")
        return Account(checked_name(name), role, self.fingerprint(role))

    def _client(self) -> Any:
        from authlib.integrations.httpx_client import AsyncOAuth2Client  # type: ignore[import-untyped]

        return AsyncOAuth2Client(
            self.config.client_id,
            self._secret,
            redirect_uri=self.config.callback,
            token_endpoint_auth_method="client_secret_basic" if self._secret else "none",
            timeout=SECONDS,
            follow_redirects=False,
        )

    async def _published(self) -> dict[str, Any]:
        async with self._lock:
            if self._metadata is None:
                found = await self._fetch(self.config.issuer.rstrip("/") + "/.well-known/openid-configuration")
                if found.get("issuer") != self.config.issuer:
                    raise RefusedError("the provider says that it is another one than the configured")
                for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
                    try:
                        _safe(str(found[name]).partition("?")[0])
                    except (KeyError, ValueError):
                        raise RefusedError(f"the provider publishes no safe {name}") from None
                self._metadata = found
            return self._metadata

    async def _public_keys(self, again: bool) -> dict[str, Any]:
        metadata = await self._published()
        async with self._lock:
            renew = again and time.monotonic() - self._renewed_at > KEYS_SECONDS
            if self._keys is None or renew:
                self._keys = await self._fetch(metadata["jwks_uri"])
            if renew:
                self._renewed_at = time.monotonic()
            return self._keys

    async def _fetch(self, url: str) -> dict[str, Any]:
        import httpx

        async with httpx.AsyncClient(timeout=SECONDS) as client:
            answer = await client.get(url)
            answer.raise_for_status()
            found = answer.json()
        if not isinstance(found, dict):
            raise RefusedError("the provider answers with something else than it should")
        return found


def _has(claims: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> bool:
    for name, values in wanted.items():
        given = claims.get(name)
        if any(value in values for value in (given if isinstance(given, list) else [given])):
            return True
    return False


def router(provider: Provider, accounts: Accounts, door: Door) -> APIRouter:
    """The routes."""
    import httpx
    from authlib.common.errors import AuthlibBaseError  # type: ignore[import-untyped]

    from apps.label.login import local, page

    routes = APIRouter(prefix="/oidc")
    name = f"__Host-{COOKIE}" if door.settings.https else COOKIE
    failures = (httpx.HTTPError, AuthlibBaseError, ValueError, KeyError)

    def sorry(reason: str, status: int) -> Response:
        return page(door.settings, "/rate", error=reason[:1].upper() + reason[1:] + ".", status=status)

    @routes.get("/login")
    async def begin(request: Request) -> Response:
        try:
            url, cookie = await provider.begin(local(request.query_params.get("next")))
        except RefusedError as error:
            return sorry(str(error), 502)
        except failures as error:
            log.error("OIDC: %s: %s", type(error).__name__, error)
            return sorry("the provider cannot be reached", 502)
        response = RedirectResponse(url, 303)
        # Lax, because the browser comes back from the provider's site with it; good for this login alone.
        response.set_cookie(
            name, cookie, max_age=BEGUN_SECONDS, secure=door.settings.https, httponly=True, samesite="lax"
        )  # fmt: skip
        return response

    @routes.get("/callback")
    async def finish(request: Request) -> Response:
        try:
            account, target = await provider.finish(dict(request.query_params), request.cookies.get(name, ""))
            if accounts.get(account.name) is not None:
                raise RefusedError("there is an account with a password that has your name; ask who runs this study")
        except (RefusedError, InputError) as error:
            return sorry(str(error), 403)
        except failures as error:
            log.error("OIDC: %s: %s", type(error).__name__, error)
            return sorry("the provider cannot be reached", 502)
        # Not a redirection: that would still count as coming from the provider, and the cookie would not be sent.
        response = HTMLResponse(f'<!doctype html><title>…</title><meta http-equiv="refresh" content="0; url={target}">')
        response.delete_cookie(name, secure=door.settings.https, httponly=True, samesite="lax")
        return await door.open(request, account, response)

    return routes
