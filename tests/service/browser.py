"""The system's Chromium, and the dashboard in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.service.in_thread import DEADLINE_S

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

_SHOWN = """() => ({
  time: Number(document.getElementById("main").dataset.time),
  stats: [...document.querySelectorAll("[data-stat]")].map(
    (one) => [one.dataset.scope, one.dataset.name, one.dataset.stat, one.dataset.value ?? null]),
})"""

Shown = dict[tuple[str, str, str], str | None]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        message = f"no Chromium on PATH; looked for {', '.join(_NAMES)}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    expect.set_options(timeout=DEADLINE_S * 1000)
    # Chromium's sandbox does not work for root, as whom containers run.
    sandbox = os.geteuid() != 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=sandbox)
        try:
            yield browser
        finally:
            browser.close()


class Dashboard:
    """A dashboard in a page of its own; notes what the browser complains of and asks for."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(DEADLINE_S * 1000)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.requested.append(request.url))

    def open(self) -> None:
        """Load the page."""
        self.page.goto(self.url)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that is no single element; let the page go on meanwhile."""
        for _ in range(int(DEADLINE_S / 0.05)):
            if condition():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("it did not come about in time")

    def shown(self, after: float = 0.0) -> tuple[float, Shown]:
        """Return the server's time of what is shown, if later than `after`, and all of it."""
        found: dict[str, Any] = {}

        def is_later() -> bool:
            nonlocal found
            found = self.page.evaluate(_SHOWN)
            return found["time"] is not None and found["time"] > after

        self.until(is_later)
        stats = {(scope, name, stat): value for scope, name, stat, value in found["stats"]}
        assert len(stats) == len(found["stats"])
        return found["time"], stats

    def foreign_requests(self) -> list[str]:
        """Return what was asked for elsewhere than at the server."""
        mine = urlsplit(self.url).netloc
        return [
            url
            for url in self.requested
            if urlsplit(url).scheme != "data" and urlsplit(url).netloc != mine
        ]

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        return int(
            self.page.evaluate(
                "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
                " - document.documentElement.clientWidth"
            )
        )
