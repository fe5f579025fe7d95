"""Spans for what a manager does; needs the extra `otel`.

::

    kv.observe(OpenTelemetryObserver())

gives a span `kvoffload.request` for each request scope, and `kvoffload.load` and `kvoffload.store`
for what is loaded and stored, in a request or without one, below whatever span is current.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from importlib.metadata import version
from types import TracebackType

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode, Tracer, TracerProvider

VERSION = version("kvoffload")

_SCOPE = context.create_key("kvoffload-scope")


class OpenTelemetryObserver:
    """Makes a span of each operation of a manager: `kv.observe(OpenTelemetryObserver())`.

    Spans have the attributes `kvoffload.namespace`, `kvoffload.blocks` (how many were named), and
    `kvoffload.cancelled` where the caller gave up, which is no error. An error is recorded, and is
    the status of the span.

    A load or store within a request is a child of its span. Requests are siblings, even where one
    task opens several; what it then loads belongs to the one that it opened last. A scope may be
    left in another task than it was entered in, and in another order: then the span ends when it
    does, and is not current in either task for what comes after.

    Args:
        tracer_provider: Where spans go; the global one unless told otherwise.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("kvoffload", VERSION, tracer_provider)

    def __call__(self, operation: str, namespace: str, blocks: int) -> AbstractContextManager[Span]:
        """Return the scope of an operation; a manager calls this."""
        return _Scope(self._tracer, operation, namespace, blocks)


class _Scope:
    """One operation: its span, and the context that was current around it.

    A token of a context variable is worth something in the context alone that it was made in, and
    only in the reverse order. So none is kept: who leaves, or enters next, makes current what was
    current below the scopes that have ended. In another task's context that is what that task
    inherited.
    """

    __slots__ = ("_attributes", "_tracer", "ended", "operation", "outer", "parent", "span")

    def __init__(self, tracer: Tracer, operation: str, namespace: str, blocks: int) -> None:
        self._tracer = tracer
        self._attributes: dict[str, str | int] = {
            "kvoffload.namespace": namespace,
            "kvoffload.blocks": blocks,
        }
        self.operation = operation
        self.ended = False

    def __enter__(self) -> Span:
        self.outer = self.parent = _settle()
        around = _scope_of(self.outer)
        if around is not None and around.operation == self.operation == "request":
            self.parent = around.parent
        self.span = self._tracer.start_span(
            f"kvoffload.{self.operation}", self.parent, attributes=self._attributes
        )
        inner = trace.set_span_in_context(self.span, self.outer)
        context.attach(context.set_value(_SCOPE, self, inner))
        return self.span

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        span = self.span
        if isinstance(exc, Exception):
            span.record_exception(exc)
            span.set_status(Status(StatusCode.ERROR, f"{type(exc).__name__}: {exc}"))
        elif isinstance(exc, asyncio.CancelledError):
            span.set_attribute("kvoffload.cancelled", True)
        span.end()
        self.ended = True
        self.outer = _below(self.outer)
        _settle()


def _scope_of(current: Context) -> _Scope | None:
    """Return the scope whose span is current, unless another span was made current within it."""
    scope = current.get(_SCOPE)
    if isinstance(scope, _Scope) and trace.get_current_span(current) is scope.span:
        return scope
    return None


def _below(current: Context) -> Context:
    """Return the context below the scopes that have ended."""
    while (scope := _scope_of(current)) is not None and scope.ended:
        current = scope.outer
    return current


def _settle() -> Context:
    """Make current what is below the scopes that have ended; return it."""
    current = context.get_current()
    below = _below(current)
    if below is not current:
        context.attach(below)
    return below
