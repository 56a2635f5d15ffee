"""``diffalign label serve``: one process that serves one study until it is stopped."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from apps.label import environment
from apps.label.accounts import Accounts
from apps.label.settings import Settings, is_loopback
from diffalign.errors import ConfigError, RefusedError
from diffalign.study import Study

USERS = "users.json"
BACKLOG = 256
STOP_SECONDS = 10
LARGEST_HEADERS = 32_768
SWITCH_SECONDS = 0.0005
"""A vote on PostgreSQL takes a dozen round trips. After each the writer has to get the interpreter back from the
threads that serve images; at Python's 5 ms that wait would be longer than the work."""


def run(
    study_folder: str | Path,
    database: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    users: str | Path | None = None,
    no_auth: bool = False,
    *,
    https: bool = False,
    proxy: str | None = None,
    oidc: str | Path | None = None,
    hours: tuple[float, float] = (12, 2),
    access_log: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Serves until Ctrl-C or SIGTERM, which are the normal end of it.

    Args:
        study_folder: The study.
        database: The URL of its PostgreSQL database, where it has one.
        host: Address to listen on. Beyond the loopback address it needs ``https``.
        port: Port to listen on; 0 takes a free one.
        users: The accounts; STUDY/users.json if not given.
        no_auth: Let whoever reaches the server rate, as one rater. On the loopback address alone.
        https: Browsers reach the server by https, through a reverse proxy.
        proxy: Addresses of the reverse proxy, separated by commas, whose X-Forwarded-For is believed. Goes with https.
        oidc: Configuration of an OpenID Connect provider.
        hours: After so many hours a login ends; and after so many without a request.
        access_log: Log each request, without names and tokens.
        say: Is told the address, and what was ignored.
    """
    settings = _settings(host, no_auth, https, proxy, oidc, hours, access_log)
    # SIGTERM while the server is made ready ends it as Ctrl-C does, with all that is cleaned up on the way.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        study = Study.open(study_folder, database)
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise
    try:
        accounts = None if no_auth else _accounts(users or Path(study_folder) / USERS, settings)
        with environment.quieted() as removed, _listen(host, port) as listening:
            if removed:
                say(f"ignored, because this server decides it itself: {', '.join(removed)}")
            _serve(study, accounts, settings, listening, proxy, say)
    finally:
        signal.signal(signal.SIGTERM, before)
        study.close()


def _settings(
    host: str,
    no_auth: bool,
    https: bool,
    proxy: str | None,
    oidc: str | Path | None,
    hours: tuple[float, float],
    access_log: bool,
) -> Settings:
    if no_auth and (https or oidc):
        raise ConfigError("--no-auth is for this machine alone; it goes neither with --https nor with --oidc")
    if no_auth and not is_loopback(host):
        raise RefusedError(f"--no-auth would let anybody who reaches {host} vote; it goes with --host 127.0.0.1 alone")
    if not is_loopback(host) and not https:
        raise RefusedError(
            f"passwords would travel to {host} unprotected: put a reverse proxy with a certificate in front and add"
            " --https, or listen on 127.0.0.1 (docs/labelling-security.md shows how)"
        )
    if https and not proxy:
        raise ConfigError(
            "--https means that a reverse proxy is in front: give its address by --proxy (127.0.0.1 if it is on this"
            " machine); else everybody seems to come from there, and a few wrong passwords would lock all of them out"
        )
    if min(hours) <= 0:
        raise ConfigError("a login lasts longer than no time: give positive hours")
    settings = Settings(https=https, expiry=3600 * hours[0], idle=3600 * hours[1], access_log=access_log)
    if oidc is None:
        return settings
    from apps.label.oidc import Provider

    return replace(settings, oidc=Provider.load(oidc))


def _accounts(path: str | Path, settings: Settings) -> Accounts:
    accounts = Accounts.load(path)
    if not accounts.list() and settings.oidc is None:
        raise RefusedError(
            f"{path} has no accounts, so nobody could log in: add one by `diffalign label users add`, or serve with"
            " --no-auth on this machine"
        )
    return accounts


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ConfigError where the address is taken, or is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise ConfigError(f"there is no address {host}:{port} to listen on") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is taken; take another one, or --port 0 for a free one") from None
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listening


def _serve(
    study: Study,
    accounts: Accounts | None,
    settings: Settings,
    listening: socket.socket,
    proxy: str | None,
    say: Callable[[str], object],
) -> None:
    import uvicorn

    from apps.label.server import create_app

    _log_to_terminal()
    sys.setswitchinterval(SWITCH_SECONDS)
    config = uvicorn.Config(
        create_app(study, accounts, settings),
        # What the guard knows of the client is what the socket says, unless a proxy was named.
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy or "",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        h11_max_incomplete_event_size=LARGEST_HEADERS,
    )
    address, port = listening.getsockname()[:2]
    name = f"[{address}]" if ":" in address else address
    title = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in study.title)  # may be anything
    server = uvicorn.Server(config)

    def stop(number: int, frame: FrameType | None) -> None:
        # An exception here, while asyncio or the app start, would be told as their failure. uvicorn looks at this when
        # it has started, and hands the signals that it got itself on to here when it has finished.
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        say(f"Serving {title or study.folder.name} at http://{name}:{port}/  (stop: Ctrl-C)")
        sys.stdout.flush()
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    say("stopped")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _log_to_terminal() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("diffalign.label", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if name == "diffalign.label" else logging.WARNING)
        logger.propagate = False
