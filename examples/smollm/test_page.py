"""The chat page in a real browser, against a real service."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

try:
    from examples.smollm.page import load_page
    from examples.smollm.serving import ChatService, running
    from playwright.sync_api import Browser, Locator, expect
    from tests.service.browser import Dashboard, chromium
except ModuleNotFoundError as exc:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(f"the page needs the extras server and dev: {exc}", allow_module_level=True)

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run the system's browser."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatService]:
    """Run one service."""
    with running(tmp_path_factory.mktemp("page")) as service:
        yield service


@pytest.fixture
def opened(browser: Browser, service: ChatService) -> Iterator[Callable[..., Dashboard]]:
    """Open pages; none may have complained, or asked for anything elsewhere."""
    pages: list[Dashboard] = []

    def open_page(**options: Any) -> Dashboard:
        pages.append(Dashboard(browser, service.url, **options))
        pages[-1].open()
        return pages[-1]

    yield open_page
    for each in pages:
        assert each.complaints == []
        assert each.foreign_requests() == []
        each.context.close()


def ask(chat: Dashboard, question: str, nth: int = 0) -> Locator:
    """Ask, wait for all that comes of it, and return the facts shown with the answer."""
    chat.page.get_by_label("Message").fill(question)
    chat.page.get_by_role("button", name="Send").click()
    facts = chat.page.locator(".facts").nth(nth)
    expect(facts).to_have_attribute("data-complete", "true")
    return facts


def tokens_of(facts: Locator) -> dict[str, int]:
    """Return the tokens shown, by where they came from."""
    found = facts.locator("li").evaluate_all(
        "items => items.map(item => [item.dataset.from, Number(item.dataset.tokens)])"
    )
    return dict(found)


def test_each_turn_shows_where_its_tokens_came_from(opened: Callable[..., Dashboard]) -> None:
    """A first chat computes; the same one again is hot; a next turn computes its own part."""
    chat = opened()
    chat.page.locator("summary").click()
    chat.page.locator("#system").fill("You keep the lamp of a lighthouse. " * 4)
    first = tokens_of(ask(chat, "who are you"))
    assert set(first) == {"computed"}
    said = chat.page.locator(".assistant").inner_text()
    chat.page.get_by_role("button", name="New chat").click()
    facts = ask(chat, "who are you")
    again = tokens_of(facts)
    assert set(again) == {"hot", "computed"}
    assert sum(again.values()) == first["computed"]
    assert again["computed"] <= 16
    expect(facts).to_contain_text("First token after")
    expect(facts).to_contain_text("without the cache after")
    expect(facts.locator(".error")).to_have_count(0)
    assert chat.page.locator(".assistant").inner_text() == said
    third = tokens_of(ask(chat, "and then", nth=1))
    assert third["hot"] > again["hot"]
    assert third["computed"] < 60


def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(
    opened: Callable[..., Dashboard], service: ChatService
) -> None:
    """The facts are there with the first token; what was stopped is no part of the chat."""
    chat = opened()
    with service.stuck() as is_decoding:
        chat.page.get_by_label("Message").fill("go on for ever")
        chat.page.get_by_label("Message").press("Enter")
        assert is_decoding()
        expect(chat.page.locator(".assistant.busy")).to_be_visible()
        expect(chat.page.locator(".facts").first).to_contain_text("First token after")
        expect(chat.page.get_by_role("button", name="Send")).to_be_disabled()
        chat.page.get_by_role("button", name="Stop").click()
        expect(chat.page.get_by_text("Stopped.")).to_be_visible()
    chat.until(service.is_idle)
    asked: list[str] = []
    chat.page.on("request", lambda request: asked.append(request.post_data or ""))
    ask(chat, "again", nth=1)
    assert "go on for ever" not in asked[0]


def test_text_is_text(opened: Callable[..., Dashboard]) -> None:
    """Markup in a message is shown, not obeyed."""
    chat = opened()
    ask(chat, HOSTILE)
    expect(chat.page.locator(".user")).to_have_text(HOSTILE)
    assert chat.page.locator("img").count() == 0


def test_a_refusal_is_shown(opened: Callable[..., Dashboard]) -> None:
    """With what the service says; the next message can be sent."""
    chat = opened()
    chat.page.get_by_label("Message").fill("x" * 5000)
    chat.page.get_by_role("button", name="Send").click()
    expect(chat.page.locator(".error")).to_contain_text("at most")
    expect(chat.page.get_by_role("button", name="Send")).to_be_enabled()
    # The browser notes each failed request; that one was meant to.
    assert [each for each in chat.complaints if "413" not in each] == []
    chat.complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_windows_of_any_width(
    opened: Callable[..., Dashboard], width: int, scheme: str
) -> None:
    """Nothing is cut off, and text stands out from what it is on."""
    chat = opened(viewport={"width": width, "height": 700}, color_scheme=scheme)
    ask(chat, "w" * 120)
    assert chat.overflow() == 0
    colours = chat.page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; }"
    )
    ink, page = (sum(map(int, c.split("(")[1].rstrip(")").split(",")[:3])) for c in colours)
    assert (ink < page) == (scheme == "light")
    assert abs(ink - page) > 450
    if folder := os.environ.get("SMOLLM_SCREENSHOTS"):
        chat.page.screenshot(path=f"{folder}/chat-{width}-{scheme}.png")


def test_the_policy_names_what_is_in_the_page() -> None:
    """One script and one style, by their hashes, and nothing that is inline elsewhere."""
    page = load_page()
    html, policy = page.html, page.headers["Content-Security-Policy"]
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    assert html.count(b"<script") == html.count(b"<style") == 1
    assert b" style=" not in html
    assert b" onclick=" not in html
