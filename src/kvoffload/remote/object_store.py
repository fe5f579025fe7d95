"""A tier past one machine that keeps what it has: objects in a bucket, or files in a folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import anyio

from ..checks import check_count
from ..copying import INLINE_COPY_BYTES, copy_in_slices
from ..errors import ClosedError, CorruptBlockError, TierError, TierUnavailableError
from ..keys import check_namespace, decode_key
from ..types import Medium
from .envelope import (
    TRAILER_BYTES,
    added_bytes,
    header_bytes,
    header_of,
    layout_fingerprint,
    mistake,
    trailer_of,
)
from .object_client import ObjectClient, Options, RequestError, check_url
from .object_names import ObjectNames
from .outcomes import Outcome, delete_corrupt, misfits
from .protocol import RemoteOutcome
from .send_buffers import SendBuffers

CHECK_THREADS = 2
"""Threads for checksums: two are faster than the network."""
CONTROL_REQUESTS = 64
"""Requests at a time for what is small, so that it does not queue behind payloads."""

T = TypeVar("T")


class ObjectStoreTier:
    """A `RemoteTier` on S3 and what speaks its protocol, GCS, Azure or a folder; extra `s3`.

    Each block is one object, `kvoffload/1/LAYOUT/NAMESPACE/xx/...`, named by a digest of its
    canonical key: names spread evenly, `clear` lists one prefix, and a namespace of `[a-z0-9._-]`
    has one (`n-tenant`) that rules of the bucket can name. The store evicts nothing: give it a
    lifecycle rule that lets objects expire.

    Args:
        url: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, or
            `file:///folder` (one that machines share, perhaps), which is made if it is not there.
        name: Name of the tier.
        layout: What the payloads look like (model, number format, parallel ranks), where the
            namespace does not say so: blocks of another layout are not there.
        pool: Payloads under way at a time, which is also how many blocks this has memory for, in
            each direction.
        options: Endpoint, region, credentials and so on, by obstore's names for the kind of store:
            `{"endpoint": "http://minio:9000", "region": "us-east-1"}`; what is not told is taken
            from the environment, as `AWS_ACCESS_KEY_ID`. No message and no `repr` shows them.
        client_options: Of its HTTP client, by obstore's names, as `root_certificate`.

    Raises:
        ConfigError: The URL is none of these, `pool` is out of range, or obstore is missing.
    """

    medium = Medium.REMOTE

    def __init__(
        self,
        url: str,
        *,
        name: str = "remote",
        layout: str = "",
        pool: int = 16,
        options: Options | None = None,
        client_options: Options | None = None,
    ) -> None:
        self.name = name
        self._pool = check_count("pool", pool)
        self._url = check_url(url)
        self._options = dict(options or {}), dict(client_options or {})
        self._layout = layout_fingerprint(layout)
        self._names = ObjectNames(self._layout)
        self._open: _Open | None = None

    def __repr__(self) -> str:
        return f"<ObjectStoreTier {self.name!r}: {self._url}>"

    # Life

    async def open(self) -> None:
        """See that the store is there.

        Raises:
            ConfigError: An option is unknown or wrong, or the folder can't be made.
            TierUnavailableError: It does not answer, or does not let us in; later calls try again.
        """
        if self._open is None:
            self._open = _Open(self._pool)
        await self.check()

    async def close(self) -> None:
        """Let go of the store; idempotent."""
        if self._open is not None:
            self._open.close()
            self._open = None

    async def check(self) -> None:
        """Make sure that the store answers, and has the bucket.

        Raises:
            TierUnavailableError: It does not.
        """
        opened, client = await self._ready()
        try:
            async with opened.control:
                await client.check(self._names.nobody)
        except RequestError as exc:
            raise self._unavailable(exc) from exc

    # Blocks

    async def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the payload bytes of each block, `None` where it is not there.

        One request for each, 64 at a time. They are taken for a chain: behind 64 in a row of which
        none is there no more are asked for, and the answer ends. So a chain that nobody stored
        costs 64 requests at most, and one that somebody did, all of them at once. A search by
        halves would take fewer, but one after the other; and a listing, at the price of twelve,
        tells of names in order, which those of a chain are not.

        Raises:
            TierUnavailableError: The store does not answer.
        """
        sizes: list[int | None] = []
        while len(sizes) < len(keys):
            wave = await self._sizes(keys[len(sizes) : len(sizes) + CONTROL_REQUESTS])
            sizes += [None if size is None or size < 0 else size for size in wave]
            if not any(size is not None for size in wave):
                break
        return sizes

    async def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[Outcome]:
        """Fill each buffer with its block; what does not check is deleted.

        Where the store does not answer for one, no more are asked for, and that is the outcome of
        all that are left.
        """
        opened, client = await self._ready()
        outcomes: list[Outcome] = [RemoteOutcome.ABSENT] * len(keys)
        failure: RequestError | None = None

        async def read(number: int) -> None:
            nonlocal failure
            key, buffer = keys[number], into[number].cast("B")
            size = added_bytes(key) + len(buffer)
            async with opened.payloads:
                if failure is not None:
                    outcomes[number] = self._unavailable(failure)
                    return
                try:
                    # One byte more than there should be, to see whether there are.
                    value = await client.read(self._names.of(key), size + 1)
                except RequestError as exc:
                    failure = exc
                    outcomes[number] = self._unavailable(exc)
                    return
                if value is None or len(value) != size:
                    return
                payload = value[header_bytes(key) : -TRAILER_BYTES]
                wrong = await opened.work(len(payload), lambda: self._mistake(key, value, payload))
                if wrong is None:
                    await copy_in_slices(buffer, payload)
                    outcomes[number] = RemoteOutcome.DONE
                else:
                    outcomes[number] = self._corrupt(wrong, key)

        await _in_lanes(range(len(keys)), self._pool, read)
        await delete_corrupt(keys, outcomes, self._delete)
        return outcomes

    async def put(self, keys: Sequence[bytes], payloads: Sequence[memoryview]) -> list[Outcome]:
        """Write the blocks that are not there yet.

        They are asked for first: a write that is refused since there is one has been sent all the
        same. Of two that write one block at a time the store keeps the first, or the last where it
        has no conditional writes; both are the same bytes. Where the store does not take one, no
        more are sent, and that is the outcome of all that are left.

        Raises:
            TierUnavailableError: The store does not answer.
        """
        opened, client = await self._ready()
        found = await self._sizes(keys)
        sizes = [payload.nbytes for payload in payloads]
        wrong = misfits(keys, found, sizes)
        if wrong:
            await self._delete(wrong)
        outcomes: list[Outcome] = [RemoteOutcome.PRESENT] * len(keys)
        failure: RequestError | None = None

        async def write(number: int) -> None:
            nonlocal failure
            key, size, payload = keys[number], sizes[number], payloads[number].cast("B")
            start = header_bytes(key)
            async with opened.payloads:
                if failure is not None:
                    outcomes[number] = self._refusal(failure, key)
                    return
                # The client reads on after it was cancelled: what is sent is a copy.
                with opened.buffers.take(size + added_bytes(key)) as value:
                    header = header_of(key, size, self._layout)
                    view = value.data
                    view[:start] = header
                    copied = view[start : start + size]
                    await copy_in_slices(copied, payload)
                    view[start + size :] = await opened.work(
                        size, lambda: trailer_of(header, copied)
                    )
                    copied.release()
                    view.release()
                    try:
                        created = await client.create(self._names.of(key), value)
                    except RequestError as exc:
                        failure = exc
                        outcomes[number] = self._refusal(exc, key)
                    else:
                        if created:
                            outcomes[number] = RemoteOutcome.DONE
                    del value  # or it would count as one that somebody still looks at

        absent = [n for n, there in enumerate(found) if there is None or there != sizes[n]]
        await _in_lanes(absent, self._pool, write)
        return outcomes

    async def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Delete blocks; say of each whether it was there.

        A store does not tell of what it deletes, so that it is asked before.

        Raises:
            TierUnavailableError: The store does not answer.
            TierError: It refuses.
        """
        there = [size is not None for size in await self._sizes(keys)]
        await self._delete([key for key, is_there in zip(keys, there, strict=True) if is_there])
        return there

    async def clear(self, namespace: str) -> AsyncIterator[int]:
        """Delete all blocks of a namespace, of this layout; see `RemoteTier.clear`.

        Raises:
            TierUnavailableError: The store does not answer.
            TierError: It refuses.
        """
        folder = self._names.folder(check_namespace(namespace))
        _, client = await self._ready()
        try:
            async for page in client.list(folder):
                names = self._names.own(page, namespace)
                await client.delete(names)
                yield len(names)
        except RequestError as exc:
            raise self._refusal(exc) from exc

    # Inside

    async def _ready(self) -> tuple[_Open, ObjectClient]:
        opened = self._open
        if opened is None:
            raise ClosedError(f"{self!r} is not open")
        if opened.client is None:
            # Reads certificates, or makes the folder.
            make = partial(ObjectClient, self._url, *self._options)
            opened.client = await asyncio.get_running_loop().run_in_executor(opened.executor, make)
        return opened, opened.client

    async def _sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the payload bytes of what has the keys' names, negative where it is no block."""
        opened, client = await self._ready()
        sizes: list[int | None] = [None] * len(keys)

        async def ask(number: int) -> None:
            async with opened.control:
                size = await client.size(self._names.of(keys[number]))
            sizes[number] = None if size is None else size - added_bytes(keys[number])

        try:
            await _in_lanes(range(len(keys)), CONTROL_REQUESTS, ask)
        except RequestError as exc:
            raise self._unavailable(exc) from exc
        return sizes

    async def _delete(self, keys: Sequence[bytes]) -> None:
        opened, client = await self._ready()
        try:
            async with opened.control:
                await client.delete([self._names.of(key) for key in keys])
        except RequestError as exc:
            raise self._refusal(exc) from exc

    def _mistake(self, key: bytes, value: memoryview, payload: memoryview) -> str | None:
        header, trailer = bytes(value[: header_bytes(key)]), bytes(value[-TRAILER_BYTES:])
        return mistake(header, trailer, key, payload, self._layout)

    # Inside: what went wrong

    def _unavailable(self, exc: RequestError) -> TierUnavailableError:
        error = TierUnavailableError(f"{self._url}: {exc}", tier=self.name)
        error.__cause__ = exc.with_traceback(None)  # its frames have buffers
        return error

    def _refusal(self, exc: RequestError, key: bytes | None = None) -> TierError:
        if not exc.is_refusal:
            return self._unavailable(exc)
        error = TierError(f"{self._url} refused: {exc}", tier=self.name)
        error.__cause__ = exc.with_traceback(None)  # its frames have buffers
        error.block_hash = None if key is None else decode_key(key)[1]
        return error

    def _corrupt(self, why: str, key: bytes) -> CorruptBlockError:
        return CorruptBlockError(
            f"what {self._url} has for the block does not check: {why}",
            tier=self.name,
            block_hash=decode_key(key)[1],
        )


class _Open:
    """What a tier has while it is open."""

    def __init__(self, pool: int) -> None:
        self.executor = ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="kvoffload-remote")
        self.client: ObjectClient | None = None
        self.buffers = SendBuffers(pool)
        self.payloads = asyncio.Semaphore(pool)
        self.control = asyncio.Semaphore(CONTROL_REQUESTS)
        self._is_closed = False

    def work(self, size: int, work: Callable[[], T]) -> Awaitable[T]:
        """Do something with so many bytes, on a thread where they are many."""
        loop = asyncio.get_running_loop()
        if size > INLINE_COPY_BYTES // 4 and not self._is_closed:
            return loop.run_in_executor(self.executor, work)
        done: asyncio.Future[T] = loop.create_future()
        done.set_result(work())
        return done

    def close(self) -> None:
        """Let go of it all."""
        self._is_closed = True
        self.buffers.close()
        self.executor.shutdown(wait=False)


async def _in_lanes(
    numbers: Iterable[int], width: int, work: Callable[[int], Awaitable[None]]
) -> None:
    """Do something for each number, so many at a time; the first error ends it."""
    todo = list(reversed(list(numbers)))
    errors: list[RequestError] = []

    async def run() -> None:
        try:
            while todo:
                await work(todo.pop())
        except RequestError as exc:
            errors.append(exc)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for _ in range(min(width, len(todo))):
            tasks.start_soon(run)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # or the error and this frame would keep each other
