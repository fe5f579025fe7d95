from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from kvoffload import BlockNotFoundError
from kvoffload.integrations.opentelemetry import OpenTelemetryObserver
from kvoffload.testing import small_manager


class Spans:
    """An observer, and the spans that came of it."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.observer = OpenTelemetryObserver(self.provider)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def spans() -> Iterator[Spans]:
    spans = Spans()
    yield spans
    spans.provider.shutdown()


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def is_current(span: trace.Span) -> bool:
    return trace.get_current_span() is span


def none_is_current() -> bool:
    return trace.get_current_span() is trace.INVALID_SPAN


async def test_an_operation_is_a_span(spans: Spans) -> None:
    with spans.observer("store", "team", 3) as span:
        assert is_current(span)
        await asyncio.sleep(0)
        assert is_current(span)
    assert none_is_current()
    done = spans.one("kvoffload.store")
    assert done.attributes == {"kvoffload.namespace": "team", "kvoffload.blocks": 3}
    assert done.status.status_code is StatusCode.UNSET
    assert done.instrumentation_scope is not None
    assert done.instrumentation_scope.name == "kvoffload"
    assert done.parent is None


async def test_what_is_loaded_in_a_request_is_its_child(spans: Spans) -> None:
    tracer = spans.provider.get_tracer("mine")
    with tracer.start_as_current_span("mine") as mine:
        with spans.observer("request", "", 2) as request:
            await asyncio.sleep(0)
            with spans.observer("load", "", 2):
                await asyncio.sleep(0)
            assert is_current(request)
            with tracer.start_as_current_span("compute"), spans.observer("store", "", 1):
                await asyncio.sleep(0)
            assert is_current(request)
        assert is_current(mine)
    request_id = id_of(spans.one("kvoffload.request"))
    assert parent_of(spans.one("kvoffload.load")) == request_id
    assert parent_of(spans.one("compute")) == request_id
    assert parent_of(spans.one("kvoffload.store")) == id_of(spans.one("compute"))
    assert parent_of(spans.one("kvoffload.request")) == id_of(spans.one("mine"))


async def test_an_error_is_recorded(spans: Spans) -> None:
    with pytest.raises(BlockNotFoundError), spans.observer("load", "", 1):
        raise BlockNotFoundError("no 'x'", block_hashes=["x"])
    done = spans.one("kvoffload.load")
    assert done.status.status_code is StatusCode.ERROR
    assert done.status.description == "BlockNotFoundError: no 'x'"
    (event,) = done.events
    assert event.name == "exception"
    assert event.attributes is not None
    assert event.attributes["exception.type"] == "kvoffload.errors.BlockNotFoundError"
    assert none_is_current()


async def test_a_caller_that_gives_up_is_no_error(spans: Spans) -> None:
    with pytest.raises(asyncio.CancelledError), spans.observer("load", "", 1):
        raise asyncio.CancelledError
    done = spans.one("kvoffload.load")
    assert done.status.status_code is StatusCode.UNSET
    assert done.events == ()
    assert done.attributes is not None
    assert done.attributes["kvoffload.cancelled"] is True
    with pytest.raises(GeneratorExit), spans.observer("store", "", 1):
        raise GeneratorExit
    assert spans.one("kvoffload.store").status.status_code is StatusCode.UNSET


async def test_tasks_do_not_see_each_other(spans: Spans) -> None:
    both_in = asyncio.Barrier(2)

    async def one(namespace: str) -> None:
        with spans.observer("request", namespace, 1):
            await both_in.wait()
            with spans.observer("load", namespace, 1):
                await both_in.wait()

    await asyncio.gather(one("a"), one("b"))
    by_id = {id_of(span): span for span in spans.named("kvoffload.request")}
    loads = spans.named("kvoffload.load")
    assert len(by_id) == len(loads) == 2
    for load in loads:
        parent = by_id[parent_of(load) or 0]
        assert parent.attributes is not None
        assert load.attributes is not None
        assert load.attributes["kvoffload.namespace"] == parent.attributes["kvoffload.namespace"]


async def test_left_in_another_task(spans: Spans, caplog: pytest.LogCaptureFixture) -> None:
    """Entered by the handler of one call, left by that of another: no token is of use there."""
    scope = spans.observer("request", "", 1)
    elsewhere = trace.NonRecordingSpan(trace.INVALID_SPAN_CONTEXT)

    async def leave() -> None:
        with trace.use_span(elsewhere):
            scope.__exit__(None, None, None)
            assert is_current(elsewhere)
        assert none_is_current()

    leaving = asyncio.Event()

    async def wait_and_leave() -> None:
        await leaving.wait()
        await leave()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(wait_and_leave())
        await asyncio.sleep(0)
        scope.__enter__()
        leaving.set()
    assert spans.one("kvoffload.request").end_time is not None
    with spans.observer("store", "", 1):
        pass
    assert parent_of(spans.one("kvoffload.store")) is None
    assert none_is_current()
    assert caplog.records == []


async def test_left_in_a_task_that_was_started_within(spans: Spans) -> None:
    """It inherited the span as the current one; what it does next is below what was there first."""
    tracer = spans.provider.get_tracer("mine")
    with tracer.start_as_current_span("mine") as mine:
        scope = spans.observer("request", "", 1)
        scope.__enter__()

        async def leave() -> None:
            scope.__exit__(None, None, None)
            assert is_current(mine)

        await asyncio.create_task(leave())
        with spans.observer("load", "", 1):
            pass
        assert is_current(mine)
    assert none_is_current()
    assert parent_of(spans.one("kvoffload.load")) == id_of(spans.one("mine"))


async def test_requests_of_one_task_are_siblings_in_whatever_order_they_end(spans: Spans) -> None:
    """A scheduler that has many open in one task."""
    tracer = spans.provider.get_tracer("mine")
    with tracer.start_as_current_span("mine") as mine:
        first, second, third = (spans.observer("request", str(n), 1) for n in range(3))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        in_third = third.__enter__()
        second.__exit__(None, None, None)
        assert is_current(in_third)
        third.__exit__(None, None, None)
        assert is_current(mine)
    assert {parent_of(span) for span in spans.named("kvoffload.request")} == {
        id_of(spans.one("mine"))
    }


async def test_one_that_ended_below_another_is_not_current_again(spans: Spans) -> None:
    first, second = spans.observer("request", "", 1), spans.observer("load", "", 1)
    in_first = first.__enter__()
    in_second = second.__enter__()
    first.__exit__(None, None, None)
    assert is_current(in_second)
    second.__exit__(None, None, None)
    assert none_is_current()
    assert not is_current(in_first)


async def test_a_span_of_ones_own_stays_current(spans: Spans) -> None:
    """Left while something else is current within: that is not ours to take away."""
    tracer = spans.provider.get_tracer("mine")
    scope = spans.observer("request", "", 1)
    scope.__enter__()
    with tracer.start_as_current_span("mine") as mine:
        scope.__exit__(None, None, None)
        assert is_current(mine)
    with spans.observer("load", "", 1):
        pass
    assert parent_of(spans.one("kvoffload.load")) is None
    assert none_is_current()


async def test_requests_that_overlap_without_end_leave_nothing_behind(spans: Spans) -> None:
    """One is always open; those before it are free all the same."""

    last = spans.observer("request", "", 1)
    last.__enter__()
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    for _ in range(50):
        following = spans.observer("request", "", 1)
        alive.add(following.__enter__())
        last.__exit__(None, None, None)
        last = following
        spans.exporter.clear()
    # Without the help of the collector: no cycles.
    assert len(alive) <= 3
    last.__exit__(None, None, None)
    assert none_is_current()


def test_without_a_provider_it_is_the_global_one() -> None:
    with OpenTelemetryObserver()("load", "", 1) as span:
        assert not span.is_recording()
    assert none_is_current()


async def test_a_manager_tells_what_it_does(spans: Spans) -> None:
    async with small_manager() as kv:
        kv.observe(spans.observer)
        await kv.namespace("team").store(["a"], [b"x"])
        async with kv.request(["a", "b"]) as request:
            await request.store([b"x"])
            async with kv.load(["a"]):
                pass
            in_another_task = asyncio.create_task(kv.store(["c"], [b"y"]))
            await in_another_task
        with pytest.raises(BlockNotFoundError):
            async with kv.load(["nowhere"]):
                pass
    request_id = id_of(spans.one("kvoffload.request"))
    stores = [
        (span.attributes and span.attributes["kvoffload.namespace"], parent_of(span))
        for span in spans.named("kvoffload.store")
    ]
    assert stores == [("team", None), ("", request_id), ("", request_id)]
    inside, alone = spans.named("kvoffload.load")
    assert (parent_of(inside), inside.status.status_code) == (request_id, StatusCode.UNSET)
    assert (parent_of(alone), alone.status.status_code) == (None, StatusCode.ERROR)
    assert none_is_current()
