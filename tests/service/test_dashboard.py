"""The dashboard in a real browser, against a real server that has something to do."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Route, expect
from tests.service.browser import Dashboard, Shown, chromium
from tests.service.in_thread import ServiceInThread, until

from kvoffload.service.access import AccessControl, Right, Token
from kvoffload.service.app import PAGE

HOSTILE = "<img src=x onerror=alert(1)>"
TURNING = "a\u202eb\x00\u200b"
NAMES = ("", "team-a", HOSTILE, TURNING)
TOKEN, WEAK_TOKEN = "a-token-that-sees-all", "a-token-that-reads"
ACCESS = AccessControl([Token.of(TOKEN), Token.of(WEAK_TOKEN, ["team-a"], [Right.READ])])
POLLED_TWICE = "#main:not([data-polls='0']):not([data-polls='1'])"
WITHOUT_MEANING = {"wait_s", "read_latency_s", "read_bytes_per_s"}
"""Figures that are no counters: not the same at two moments, however still all is."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def cold(tmp_path: Path) -> str:
    return str(tmp_path / "cold")


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Dashboard]]:
    """Opens dashboards, which are gone after the test."""
    dashboards: list[Dashboard] = []

    def open_dashboard(url: str, **options: Any) -> Dashboard:
        options = {"viewport": {"width": 1280, "height": 900}} | options
        dashboards.append(Dashboard(browser, url, **options))
        dashboards[-1].open()
        return dashboards[-1]

    yield open_dashboard
    for dashboard in dashboards:
        dashboard.context.close()


def counters(overview: dict[str, Any]) -> dict[tuple[str, str, str], float | str | None]:
    """Return all that the page shows of an overview, under the page's names."""
    stats, found = overview["stats"], {}
    for key, value in stats.items():
        if key != "tiers":
            found["service", "", key] = value
    for name, tier in stats["tiers"].items():
        found |= {("tier", name, key): value for key, value in tier.items()}
    for name, one in overview["namespaces"].items():
        found |= {("namespace", name, key): value for key, value in one.items()}
    for name, one in overview["latencies"].items():
        found |= {("operation", name, key): one[key] for key in ("count", "p50_s", "p95_s")}
    return found


def number(text: str | None) -> float | str | None:
    if text is None:
        return None
    return float(text) if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text) else text


def matching(shown: Shown, said: dict[tuple[str, str, str], float | str | None]) -> None:
    """Check that the page shows exactly what the server says."""
    assert {key: number(shown[key]) for key in said if key[2] not in WITHOUT_MEANING} == {
        key: value for key, value in said.items() if key[2] not in WITHOUT_MEANING
    }


def growing(before: dict[str, Any], shown: Shown, after: dict[str, Any]) -> None:
    """Check that what is shown lies between what the server said before and after."""
    low, high = counters(before), counters(after)
    grown = [("service", "", key) for key in ("hits", "misses", "stored", "demotions")]
    grown += [
        ("tier", tier, key)
        for tier in ("hot", "warm", "cold")
        for key in ("blocks_read", "blocks_written", "bytes_read", "bytes_written", "hits")
    ]
    grown += [("namespace", name, key) for name in NAMES for key in ("hits", "misses", "stored")]
    for key in grown:
        least, value, most = low[key], number(shown[key]), high[key]
        assert isinstance(least, int)
        assert isinstance(value, float)
        assert isinstance(most, int)
        assert least <= value <= most, key
    requests = number(shown["overview", "", "requests_total"])
    assert isinstance(requests, float)
    assert before["requests_total"] <= requests <= after["requests_total"]


def test_values_are_the_servers_under_load_and_at_rest(
    cold: str, opened: Callable[..., Dashboard]
) -> None:
    """Twice: while the load runs they lie between two answers, and after it they are equal."""
    with ServiceInThread(cold) as service:
        service.start_load(NAMES)
        dashboard = opened(service.url)
        hits = -1.0
        until(lambda: set(NAMES) <= service.overview()["namespaces"].keys())
        for _ in range(2):
            before = service.overview()
            time, shown = dashboard.shown(after=before["time"])
            after = service.overview()
            assert before["time"] < time < after["time"]
            growing(before, shown, after)

            service.stop_load()
            at_rest = service.overview()
            _, shown = dashboard.shown(after=at_rest["time"])
            matching(shown, counters(at_rest))
            now = number(shown["service", "", "hits"])
            assert isinstance(now, float)
            assert now > hits
            hits = now
            assert shown["overview", "", "version"] == at_rest["version"]
            service.start_load(NAMES)
        assert dashboard.complaints == []
        assert dashboard.foreign_requests() == []


def test_names_are_text_whatever_they_hold(cold: str, opened: Callable[..., Dashboard]) -> None:
    with ServiceInThread(cold) as service:
        dashboard = opened(service.url)
        page = dashboard.page
        expect(page.locator("#log")).to_have_attribute("data-arrivals", "0")
        dashboard.until(lambda: service.service.streams == 1)
        for name in NAMES:
            service.store(range(3), name)
        row = page.locator("#spaces tr")
        expect(row).to_have_count(4)
        expect(row.locator("th").nth(0)).to_have_text("the service's own")
        expect(page.locator("#spaces th", has_text=HOSTILE)).to_have_count(1)
        expect(page.locator("#spaces th", has_text="a\\u{202e}b\\u{0}\\u{200b}")).to_have_count(1)
        expect(page.locator("#log .space", has_text=HOSTILE)).to_have_count(1)
        assert page.locator("img").count() == 0
        page.locator("#filter").fill("onerror")
        expect(row).to_have_count(1)
        assert row.get_attribute("data-namespace") == HOSTILE
        assert dashboard.complaints == []
        assert dashboard.foreign_requests() == []


def test_events_come_as_they_happen_and_can_be_held(
    cold: str, opened: Callable[..., Dashboard]
) -> None:
    with ServiceInThread(cold) as service:
        page = (dashboard := opened(service.url)).page
        dashboard.until(lambda: service.service.streams == 1)
        service.store(range(5), "team-a")
        first = page.locator("#log li").first
        expect(first).to_have_attribute("data-kind", "stored")
        assert first.get_attribute("data-tier") == "hot"
        assert first.get_attribute("data-namespace") == "team-a"
        assert first.get_attribute("data-count") == "5"
        expect(first.locator("time")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))

        pause = page.get_by_role("button", name="Pause")
        pause.click()
        expect(pause).to_have_attribute("aria-pressed", "true")
        service.store(range(10), "team-b")
        expect(page.locator("#events-note")).to_have_text("paused, 1 new")
        assert first.get_attribute("data-namespace") == "team-a"
        pause.click()
        expect(first).to_have_attribute("data-namespace", "team-b")

        service.start_load(NAMES)
        # More than there are rows, of more than one kind.
        chip = page.locator("#kinds [data-kind=demoted]")
        expect(chip).to_be_visible()
        dashboard.until(lambda: int(page.locator("#log").get_attribute("data-arrivals") or 0) > 999)
        service.stop_load()
        assert page.locator("#log li").count() <= 200
        chip.click()
        expect(page.locator("#log li:visible[data-kind=demoted]")).to_have_count(0)
        assert dashboard.complaints == []


def test_it_asks_for_a_token_and_keeps_it_in_the_tab(
    cold: str, opened: Callable[..., Dashboard]
) -> None:
    with ServiceInThread(cold, access=ACCESS, token=TOKEN) as service:
        service.store(range(4), "team-a")
        page = (dashboard := opened(service.url)).page
        ask, field = page.get_by_role("dialog"), page.get_by_label("Token", exact=True)
        expect(ask).to_be_visible()
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#refusal")).to_have_text("The service does not know this token.")
        expect(field).to_have_value("")

        field.fill(WEAK_TOKEN)
        field.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("may not see the whole service")
        page.get_by_role("button", name="Use another token").click()
        field.fill(TOKEN)
        page.get_by_role("button", name="Connect").click()
        expect(page.locator("#state")).to_have_text("live")
        expect(page.locator("#banner")).to_be_hidden()
        said = service.overview()
        _, shown = dashboard.shown(after=said["time"])
        matching(shown, counters(said))
        dashboard.until(lambda: service.service.streams == 1)

        page.reload()
        expect(page.locator("#state")).to_have_text("live")
        assert all(TOKEN not in url for url in dashboard.requested)
        assert TOKEN not in page.content()
        page.get_by_role("button", name="Forget token").click()
        expect(ask).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        dashboard.until(lambda: service.service.streams == 0)
        # The browser itself notes refusals; there is nothing else.
        assert all("status of 40" in each for each in dashboard.complaints)


def test_a_server_that_goes_away_is_waited_for(cold: str, opened: Callable[..., Dashboard]) -> None:
    with ServiceInThread(cold) as service:
        service.store(range(7))
        page = (dashboard := opened(service.url)).page
        banner = page.locator("#banner")
        expect(page.locator("[data-scope=service][data-stat=stored]")).to_have_text("7")
        service.drain()
        expect(banner).to_contain_text("draining")
        expect(page.locator("#state")).to_have_text("draining")
        port = service.port
    expect(banner).to_contain_text("Connection lost. The figures are of ")
    expect(page.locator("#state")).to_have_text("no connection")
    expect(page.locator("[data-scope=service][data-stat=stored]")).to_have_text("7")
    with ServiceInThread(cold, port=port) as service:
        expect(banner).to_be_hidden()
        expect(page.locator("#state")).to_have_text("live")
        said = service.overview()
        _, shown = dashboard.shown(after=said["time"])
        matching(shown, counters(said))
        assert shown["service", "", "stored"] == "0"
        assert shown["tier", "cold", "blocks"] == "7"
        dashboard.until(lambda: service.service.streams == 1)
        service.store([100])
        expect(page.locator("#log li").first).to_have_attribute("data-count", "1")


BRIGHTNESS = """(of) => {
  const [r, g, b] = getComputedStyle(document.body)[of].match(/[\\d.]+/g).map(Number);
  return (r + g + b) / 765;
}"""


def test_it_fits_every_window_in_light_and_dark(
    cold: str, tmp_path: Path, opened: Callable[..., Dashboard]
) -> None:
    """Screenshots are left in the test's directory, to be looked at."""
    with ServiceInThread(cold) as service:
        service.start_load((*NAMES, "a-rather-long-name-" * 6))
        for scheme in ("light", "dark"):
            for width, height in ((360, 800), (820, 1100), (1400, 900)):
                window = {"width": width, "height": height}
                dashboard = opened(service.url, viewport=window, color_scheme=scheme)
                page = dashboard.page
                expect(page.locator("#spaces tr")).to_have_count(5)
                expect(page.locator("#log li").nth(20)).to_be_attached()
                page.locator(POLLED_TWICE).wait_for()
                assert dashboard.overflow() == 0
                page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
                assert dashboard.complaints == []
                assert dashboard.foreign_requests() == []
                back, ink = (page.evaluate(BRIGHTNESS, of) for of in ("backgroundColor", "color"))
                bright, faint = (back, ink) if scheme == "light" else (ink, back)
                assert bright > 0.7
                assert faint < 0.3
                dashboard.context.close()
        service.stop_load()


@pytest.mark.parametrize(("scheme", "clicks"), [("light", 2), ("dark", 1)])
def test_the_toggle_wins_over_the_system_and_is_remembered(
    cold: str, opened: Callable[..., Dashboard], scheme: str, clicks: int
) -> None:
    with ServiceInThread(cold) as service:
        page = opened(service.url, color_scheme=scheme).page
        other = "dark" if scheme == "light" else "light"
        for _ in range(clicks):
            page.locator("#theme").click()
        for _ in range(2):
            expect(page.locator("#theme")).to_have_text(f"Theme: {other}")
            assert (page.evaluate(BRIGHTNESS, "backgroundColor") > 0.7) is (other == "light")
            page.reload()


def test_the_keyboard_reaches_everything_and_reads_the_charts(
    cold: str, opened: Callable[..., Dashboard]
) -> None:
    with ServiceInThread(cold) as service:
        service.store(range(4))
        dashboard = opened(service.url, reduced_motion="reduce")
        page = dashboard.page
        page.locator(POLLED_TWICE).wait_for()
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate(
                    "(e => e.id || e.parentNode.id || e.textContent)(document.activeElement)"
                )
            )
        wanted = ["Skip to the figures", "theme", "chart-ratio", "chart-bytes", "chart-blocks"]
        wanted += ["namespace", "bytes", "filter", "pause", "log"]
        assert [each for each in wanted if each not in reached] == []
        chart = page.get_by_role("slider", name=re.compile("^Throughput"))
        chart.focus()
        expect(chart).to_have_attribute("aria-valuetext", re.compile("^now: read "))
        page.keyboard.press("ArrowLeft")
        expect(chart).to_have_attribute(
            "aria-valuetext", re.compile(r"^\d\d:\d\d:\d\d: read [\d.]+ \w+/s, written ")
        )
        page.keyboard.press("Escape")
        expect(chart).to_have_attribute("aria-valuetext", re.compile("^now: read "))
        page.locator("#spaces-head button", has_text="blocks").press("Enter")
        expect(page.locator("#spaces-head [aria-sort]")).to_have_text("blocks")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, [role=slider], [role=meter]")]
              .filter((e) => !(e.ariaLabel || e.labels?.length || e.textContent.trim()))
              .map((e) => e.outerHTML)"""
        )
        assert nameless == []
        moving = page.evaluate(
            """() => [...document.querySelectorAll("*")]
              .filter((e) => getComputedStyle(e).transitionDuration !== "0s").length"""
        )
        assert moving == 0


def overview_of(namespaces: int) -> dict[str, Any]:
    """Return an overview with all that a service may say."""
    tier = {
        "medium": "disk",
        "state": "read_only",
        "capacity_blocks": 4000,
        "blocks": 3000,
        "bytes": 3000 << 21,
        "blocks_read": 2**53 - 1,
        "blocks_written": 7,
        "bytes_read": 10**15,
        "bytes_written": 5,
        "hits": 4,
        "errors": 3,
        "queue_depth": 2,
        "queue_bytes": 2 << 21,
        "wait_s": 1.5,
        "read_latency_s": 0.0005,
        "read_bytes_per_s": 2.5e9,
        "free_blocks": 0,
        "pending_blocks": 600,
        "retired_blocks": 400,
    }
    space = {
        "hits": 3,
        "misses": 1,
        "stored": 2,
        "rejected": 1,
        "evictions": 0,
        "blocks": 9,
        "bytes": 512 << 20,
        "max_bytes": 1 << 30,
        "reserved_bytes": 256 << 20,
    }
    latency = {"count": 9, "sum_s": 1.0, "p50_s": 2.5e-5, "p95_s": 0.0025, "p99_s": 1.25}
    never = {"count": 0, "sum_s": 0.0, "p50_s": None, "p95_s": None, "p99_s": None}
    return {
        "version": "9.9",
        "time": 1e9,
        "uptime_s": 90061.0,
        "draining": False,
        "stats": {"hits": 3, "misses": 1, "io_errors": 3, "of_the_future": 5, "tiers": {"c": tier}},
        "namespaces": {f"n{number:04}": space for number in range(namespaces)},
        "latencies": {"load": latency, "store": never},
        "loop_lag": {"p50_s": 0.0001, "p99_s": 0.0123, "max_s": 0.2},
        "sessions": 0,
        "requests_total": 12345,
    }


def is_wide(element: Locator, pixels: float) -> bool:
    return abs(float(element.evaluate("e => e.offsetWidth")) - pixels) < 2


def test_all_that_a_service_may_say_is_shown(
    cold: str, opened: Callable[..., Dashboard], browser: Browser
) -> None:
    """With answers made up: 1,500 namespaces, a disk in trouble, fields of a later version."""
    answers: list[tuple[int, str]] = [(200, json.dumps(overview_of(1500)))]

    def answer(route: Route) -> None:
        status, body = answers[0]
        route.fulfill(status=status, body=body)

    with ServiceInThread(cold) as service:
        dashboard = Dashboard(browser, service.url, viewport={"width": 1280, "height": 900})
        page = dashboard.page
        page.route("**/v1/overview", answer)
        dashboard.open()
        _, shown = dashboard.shown()
        matching(shown, counters(overview_of(200)))
        expect(page.locator("#uptime")).to_have_text("1 d 1 h")
        expect(page.locator("#spaces-note")).to_have_text("200 of 1,500; filter to see others")
        page.locator("#filter").fill("n1499")
        expect(page.locator("#spaces tr")).to_have_count(1)
        tier = page.locator(".tier")
        expect(tier.locator(".state")).to_have_text("read only")
        meter = tier.get_by_role("meter")
        assert meter.get_attribute("aria-valuetext") == "75.0 %, 3,000 of 4,000 blocks"
        width = meter.bounding_box()
        assert width is not None
        for part, share in (("ready", 0.75), ("pending", 0.15), ("retired", 0.1)):
            segment, wanted = page.locator(f".bar .{part}").first, share * width["width"]
            dashboard.until(partial(is_wide, segment, wanted))
        expect(page.locator("[data-stat=of_the_future]")).to_have_text("5")
        expect(page.locator("#latencies tr").nth(0)).to_have_text("load925.0 µs2.50 ms1.25 s")
        expect(page.locator("#latencies tr").nth(1)).to_have_text(
            re.compile(r"^store0(\u2013){3}$")
        )
        expect(page.locator("#lag-p99_s")).to_have_text("12.3 ms")

        # What it can't use it says; the next good answer mends all.
        for status, body, words in (
            (200, "[]", "Trouble"),
            (500, "oops", "answered 500"),
            (503, '{"error": "ClosedError", "message": ""}', "draining"),
        ):
            answers[0] = status, body
            expect(page.locator("#banner")).to_contain_text(words)
            answers[0] = 200, json.dumps(overview_of(3))
            expect(page.locator("#banner")).to_be_hidden()
        answers[0] = 429, "{}"
        polls = len(dashboard.requested)
        dashboard.until(lambda: len(dashboard.requested) > polls + 1)
        expect(page.locator("#banner")).to_be_hidden()
        assert dashboard.overflow() == 0
        dashboard.context.close()


def test_an_engine_that_others_share_has_a_queue_and_no_slots(cold: str, browser: Browser) -> None:
    overview = overview_of(1)
    far = {"medium": "remote", "state": "unavailable", "capacity_blocks": 0, "blocks": 0}
    far |= {"backlog_bytes": 3 << 20, "dropped_blocks": 12345}
    overview["stats"]["tiers"]["far"] = overview["stats"]["tiers"]["c"] | far
    with ServiceInThread(cold) as service:
        dashboard = Dashboard(browser, service.url)
        page = dashboard.page
        page.route("**/v1/overview", lambda route: route.fulfill(body=json.dumps(overview)))
        dashboard.open()
        tier, disk = page.locator("[data-tier=far]"), page.locator("[data-tier=c]")
        expect(tier.locator(".state")).to_have_text("unavailable")
        colors = [
            element.evaluate("e => getComputedStyle(e).color")
            for element in (tier.locator(".state"), disk.locator(".state"))
        ]
        assert colors[0] == colors[1]  # as one that is read alone
        expect(tier).to_contain_text("To be sent")
        expect(tier).to_contain_text("3.00 MiB12,345 not sent")
        for part in (".bar", ".fill"):
            expect(tier.locator(part)).to_be_hidden()
            expect(disk.locator(part)).to_be_visible()
        dashboard.context.close()


def test_it_polls_once_a_second_however_often_it_is_looked_at(cold: str, browser: Browser) -> None:
    """Coming back to the tab polls at once; the poll that was under way counts no more."""
    held: list[Route] = []
    body = json.dumps(overview_of(1))
    with ServiceInThread(cold) as service:
        dashboard = Dashboard(browser, service.url)
        page = dashboard.page
        page.clock.install()
        page.route("**/v1/overview", lambda route: held.append(route))
        dashboard.open()
        for polls, looks in ((1, 0), (2, 3), (3, 0), (4, 1)):
            dashboard.until(lambda: len(held) == 1)
            for look in range(looks):
                page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
                dashboard.until(partial(lambda many: len(held) == many, look + 2))
            for route in held:
                route.fulfill(body=body)
            held.clear()
            expect(page.locator("#main")).to_have_attribute("data-polls", str(polls))
            page.clock.run_for(1000)
            # What the page had asked for before this has been seen when this is answered.
            page.evaluate("fetch('/livez').then((answer) => answer.text())")
        assert len(held) == 1
        dashboard.context.close()


def test_the_page_allows_itself_and_nothing_else() -> None:
    page = PAGE
    policy = dict(
        each.split(" ", 1) for each in page.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page.html.decode(), re.DOTALL)
        wanted = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{wanted}'"


def test_the_page_makes_no_markup_of_text_and_names_no_other_host() -> None:
    html = PAGE.html.decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in html
    found = set(re.findall(r"\w+://[\w.]+", html))
    assert found == {"http://www.w3.org"}  # the name of SVG's elements, which nobody fetches
    assert not re.search(r"\son\w+=|\sstyle=|@import|url\(", html)
