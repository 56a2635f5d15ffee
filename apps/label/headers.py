"""The headers of every response: what a browser may do with it, and that nothing leaves for elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache

# Leaving out the script that has a source: those are allowed by where they come from.
_INLINE = re.compile(rb"<script(?![^>]*\ssrc\s*=)[^>]*>(.*?)</script>", re.DOTALL | re.IGNORECASE)

_COMMON = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not no-referrer: with that, browsers hide the Origin of a form, which the guard looks at.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=(), browsing-topics=()",
}
REFUSED = (
    "default-src 'none'; style-src 'self'; img-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
)
"""The policy of the page that says that something was refused."""
_NOTHING = "default-src 'none'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"


def policy(path: str, inline: tuple[str, ...] = ()) -> str:
    """The Content-Security-Policy for a path; ``inline`` are the sources of the page's own inline scripts."""
    if path == "/login" or path.startswith("/oidc/"):
        return (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
            " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
    if path == "/results":
        return (
            "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; font-src data:; form-action 'none';"
            " frame-ancestors 'none'; base-uri 'none'"
        )
    if path in ("/rate", "/rate/"):
        scripts = " ".join(("'self'", *inline))
        # Gradio sets styles of elements; its inline scripts are allowed one by one, by their hash.
        return (
            f"default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline';"
            " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob:; worker-src 'self' blob:;"
            " object-src 'none'; frame-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'self'"
        )
    return _NOTHING


@lru_cache(maxsize=16)
def inline_scripts(page: bytes) -> tuple[str, ...]:
    """The hashes of the scripts that stand in a page, as sources of a policy."""
    digests = (hashlib.sha256(script).digest() for script in _INLINE.findall(page))
    return tuple(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def for_path(path: str, https: bool, inline: tuple[str, ...] = ()) -> dict[str, str]:
    """All that a response for this path carries, names in small letters."""
    headers = {**_COMMON, "content-security-policy": policy(path, inline), "cache-control": _cache(path)}
    if https:
        headers["strict-transport-security"] = "max-age=31536000"
    return headers


def _cache(path: str) -> str:
    if path.startswith("/rate/assets/"):  # their names change with what is in them
        return "private, max-age=604800, immutable"
    return "private, no-cache" if path.startswith(("/static/", "/rate/static/", "/rate/theme.css")) else "no-store"
