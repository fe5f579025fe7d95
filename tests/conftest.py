"""Every asynchronous test runs on asyncio and on uvloop, and kvoffload may not block the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop
from blockbuster import blockbuster_ctx


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    # Test code may block the loop (the contracts are test code); what it tests may not.
    with blockbuster_ctx("kvoffload", excluded_modules=["kvoffload.testing.contracts"]):
        yield
