from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from tests.service.exported import parse

from kvoffload.service.exposition import (
    NO_LABELS,
    Exposition,
    Family,
    Labels,
    Sample,
    Turns,
    header,
    lines,
)

TEXT, OPENMETRICS = Exposition.TEXT, Exposition.OPENMETRICS
BYTES = Family("kvoffload_x_bytes", "counter", 'Bytes of "x",\n\\ and more.', "bytes", ("a", "b"))
GAUGE = Family("kvoffload_y", "gauge", "Y.")

PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "exposition"),
    [
        (None, TEXT),
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html,application/xhtml+xml,*/*;q=0.8", TEXT),
        ("text/plain;version=0.0.4", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", OPENMETRICS),
        ('Application/OpenMetrics-Text; VERSION="1.0.0"', OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0;q=0.2,text/plain;q=0.5", TEXT),
        ("application/openmetrics-text;version=2.0.0", TEXT),
        ("application/openmetrics-text;q=0", TEXT),
        ("application/openmetrics-text;q=often", TEXT),
        (PROMETHEUS_3, OPENMETRICS),
    ],
)
def test_what_a_client_is_given(accept: str | None, exposition: Exposition) -> None:
    assert Exposition.accepted(accept) is exposition


def test_content_types() -> None:
    assert TEXT.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert OPENMETRICS.content_type.startswith("application/openmetrics-text; version=1.0.0;")


def read(text: str, exposition: Exposition) -> list[Metric]:
    return list(parse(text.encode(), exposition).values())


def write(samples: Iterable[Sample], exposition: Exposition) -> str:
    return "".join(lines([(BYTES, samples), (GAUGE, [])], exposition))


def test_headers() -> None:
    assert header(BYTES, TEXT) == (
        '# HELP kvoffload_x_bytes_total Bytes of "x",\\n\\\\ and more.\n'
        "# TYPE kvoffload_x_bytes_total counter\n"
    )
    assert header(BYTES, OPENMETRICS) == (
        '# HELP kvoffload_x_bytes Bytes of \\"x\\",\\n\\\\ and more.\n'
        "# TYPE kvoffload_x_bytes counter\n"
        "# UNIT kvoffload_x_bytes bytes\n"
    )


@pytest.mark.parametrize("exposition", Exposition)
def test_a_family_without_series_is_left_out(exposition: Exposition) -> None:
    assert write([], exposition) == ("# EOF\n" if exposition is OPENMETRICS else "")


@pytest.mark.parametrize("exposition", Exposition)
@given(st.text(max_size=20), st.text('\\"\n{},= a', max_size=9))
def test_any_label_value_comes_back(exposition: Exposition, a: str, b: str) -> None:
    text = write([("_total", Labels(a=a, b=b), 1), ("_total", NO_LABELS, 2)], exposition)
    (family,) = read(text, exposition)
    assert [sample.labels for sample in family.samples] == [{"a": a, "b": b}, {}]
    assert family.documentation == BYTES.help
    assert family.name == BYTES.name


@pytest.mark.parametrize("exposition", Exposition)
@given(st.one_of(st.integers(0, 2**70), st.floats(0, allow_nan=False, allow_infinity=True)))
def test_values(exposition: Exposition, value: float) -> None:
    (family,) = read(write([("_total", NO_LABELS, value)], exposition), exposition)
    assert family.samples[0].value == pytest.approx(value)


def test_values_that_are_no_numbers() -> None:
    text = "".join(
        lines([(GAUGE, [("", NO_LABELS, float(name)) for name in ("nan", "inf", "-inf")])], TEXT)
    )
    assert [line.split()[1] for line in text.splitlines()[2:]] == ["NaN", "+Inf", "-Inf"]


def test_a_large_counter_is_exact() -> None:
    assert f" {2**53 + 1}\n" in write([("_total", NO_LABELS, 2**53 + 1)], TEXT)


def test_labels_put_together() -> None:
    a, b = Labels(a='"'), Labels(b="\\")
    both = a | b
    assert (both.pairs, both.text) == ({"a": '"', "b": "\\"}, '{a="\\"",b="\\\\"}')
    assert (a | NO_LABELS) is a
    assert (NO_LABELS | b) is b


class Ticking:
    """A clock that moves by a second each time that it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


async def count_turns(until: asyncio.Event) -> int:
    turns = 0
    while not until.is_set():
        await asyncio.sleep(0)
        turns += 1
    return turns


async def test_others_have_turns_between_steps() -> None:
    """Of 100 steps with a second each, one turn after every ten."""

    def steps() -> Generator[None, None, str]:
        for _ in range(100):
            yield
        return "done"

    done = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        counting = tasks.create_task(count_turns(done))
        await asyncio.sleep(0)
        assert await Turns(10, clock=Ticking()).follow(steps()) == "done"
        done.set()
    assert 8 <= counting.result() <= 14


async def test_others_have_turns_between_lines() -> None:
    done = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        counting = tasks.create_task(count_turns(done))
        await asyncio.sleep(0)
        text = [f"{number}\n" for number in range(1000)]
        assert await Turns(0, clock=Ticking()).join(text) == "".join(text).encode()
        done.set()
    assert counting.result() >= 1000 / 16 - 1


async def test_no_turn_before_it_is_time() -> None:
    turns = Turns(1e9)
    give_way = turns.give_way()
    with pytest.raises(StopIteration):
        give_way.send(None)
