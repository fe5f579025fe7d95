"""The chat page, and the headers that let it do no more than it needs."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


def load_page() -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers; it reads a file, so not in an event loop.

    The policy allows the page's own script and style, by their hashes, and connections to where it
    came from. What a model says is shown as text; markup made of text is refused altogether.
    """
    html = Path(__file__).with_name("chat.html").read_bytes()
    allowed = {"script": "", "style": ""}
    for kind, text in INLINE.findall(html):
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
    return html, {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "; ".join(policy),
        "Content-Type": "text/html; charset=utf-8",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
