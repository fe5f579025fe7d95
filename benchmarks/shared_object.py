"""SeaweedFS in `shared_tier.py`: `obstore` driven bare beside `ObjectStoreTier`, over S3."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
import obstore
from obstore.store import from_url
from shared_engine import BLOCK_BYTES, Engine
from kvoffload import ObjectStoreTier

CONCURRENCY = 8
OPT = {
    "endpoint": "http://127.0.0.1:18006",
    "access_key_id": "kvkey",
    "secret_access_key": "s3cret",
    "region": "us-east-1",
}


@contextmanager
def engine(url):
    if url:
        yield Engine(_Client(url, {}, {}), ObjectStoreTier(url, pool=CONCURRENCY))
        return
    yield Engine(
        _Client("s3://kvb/bare", OPT, {"allow_http": True}),
        ObjectStoreTier("s3://kvb/tier", pool=CONCURRENCY, options=OPT),
    )


class _Client:
    def __init__(self, url, opt, co):
        self._store = (
            from_url(url, config=opt, client_options=co)
            if not url.startswith("file")
            else from_url(url, mkdir=True)
        )

    async def open(self):
        pass

    async def close(self):
        pass

    async def put(self, names, payloads):
        async def lane(first):
            for n in range(first, len(names), CONCURRENCY):
                await obstore.put_async(self._store, names[n], payloads[n])

        await _lanes(lane)

    async def get(self, names):
        async def lane(first):
            for n in range(first, len(names), CONCURRENCY):
                v = await obstore.get_range_async(self._store, names[n], start=0, end=BLOCK_BYTES)
                assert len(v) == BLOCK_BYTES

        await _lanes(lane)

    async def delete(self, names):
        await obstore.delete_async(self._store, list(names))


async def _lanes(lane):
    async with anyio.create_task_group() as tasks:
        for first in range(CONCURRENCY):
            tasks.start_soon(lane, first)
