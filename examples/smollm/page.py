"""The chat page, which may do no more than it needs."""

from __future__ import annotations

from pathlib import Path

from kvoffload.service.dashboard import Page, page_of


def load_page() -> Page:
    """Return the page and its headers; it reads a file, so not in an event loop."""
    return page_of(Path(__file__).with_name("chat.html").read_bytes())
