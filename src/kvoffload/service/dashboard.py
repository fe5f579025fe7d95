"""The dashboard's page, and the headers that let a page do no more than it needs."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Page:
    """What a browser gets.

    Attributes:
        html: The page, UTF-8.
        headers: To be sent with it, the content type included.
    """

    html: bytes
    headers: Mapping[str, str]


def load_page() -> Page:
    """Return the dashboard; it is read from the package, so not in an event loop."""
    return page_of(files(__package__).joinpath("dashboard.html").read_bytes())


def page_of(html: bytes) -> Page:
    """Return a page of its own script and style, with headers that let it do no more.

    The policy allows those, by their hashes, and connections to the server that it came from:
    nothing from elsewhere, no frame around it, and no markup made of text, whatever a name that it
    shows may hold.
    """
    allowed = {"script": "", "style": ""}
    for kind, text in _INLINE.findall(html):
        allowed[kind.decode()] += f" 'sha256-{b64encode(sha256(text).digest()).decode()}'"
    policy = (
        "default-src 'none'",
        f"script-src{allowed['script']}",
        f"style-src{allowed['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "; ".join(policy),
        "Content-Type": "text/html; charset=utf-8",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Page(html, headers)
