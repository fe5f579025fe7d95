"""A language model's engine over kvoffload: prompts in, tokens out, KV kept and brought back.

The path of one prompt:

1. Its tokens are hashed, block by block, and `kv.request(hashes)` pins what is there of it.
2. Blocks that another chat has in the pool at this moment are shared. The others are leased, and
   copied from the lease into the pool's pages: one copy, as it would be to a device.
3. What is left is computed, chunk by chunk, on the worker thread. The last token always is: its
   logits are what the answer begins with.
4. Computed blocks are stored from where they lie in the pool, once the first token is out.
5. Tokens are decoded one at a time; chats take turns.

Whatever goes wrong with a load (too slow, damaged, no room for it) is no error here: those blocks
are computed, which costs time and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from kvoffload import (
    AsyncLRUManager,
    BlockNotFoundError,
    CapacityError,
    TierError,
    hash_blocks,
)
from kvoffload.types import Request

from .gguf import Floats
from .model import BLOCK_TOKENS, CHUNK_TOKENS, Model
from .pool import PagedPool
from .worker import Worker

log = logging.getLogger(__name__)

PAGES_OF_A_CHUNK = CHUNK_TOKENS // BLOCK_TOKENS


@dataclass(slots=True)
class Origin:
    """Where the KV of a prompt came from, and how long it took.

    Attributes:
        prompt_tokens: All of them.
        shared_tokens: Those in pages that another chat had in the pool.
        loaded_tokens: Those that were loaded, by the tier that they were in.
        loaded_bytes: Bytes that were loaded.
        computed_tokens: The others.
        load_s: Seconds until the loaded ones were in the pool.
        first_token_s: Seconds from the request to the first token of the answer.
    """

    prompt_tokens: int
    shared_tokens: int = 0
    loaded_tokens: Mapping[str, int] = field(default_factory=dict)
    loaded_bytes: int = 0
    computed_tokens: int = 0
    load_s: float = 0.0
    first_token_s: float = 0.0


class Engine:
    """A model, its pool, and a manager of blocks; used inside `async with`.

    Args:
        model: Computes.
        kv: Open manager whose blocks are as large as the pool's pages, or larger. Its user closes
            it, after the engine.
        pool_pages: Pages of the pool: what all chats under way may have at once.
        dtype: What the KV is kept in, `"float32"` or `"float16"`.
        load_timeout_s: Seconds until blocks that are being loaded are computed instead.
    """

    def __init__(
        self,
        model: Model,
        kv: AsyncLRUManager,
        *,
        pool_pages: int = 256,
        dtype: str = "float32",
        load_timeout_s: float = 5.0,
    ) -> None:
        self.model = model
        self.pool = PagedPool(pool_pages, model.geometry(dtype))
        # Bytes mean something with the same weights and the same layout alone: so in every key.
        self.kv = kv.namespace(f"{model.fingerprint}/{self.pool.geometry.layout}")
        self.load_timeout_s = load_timeout_s
        self.worker = Worker()
        self._turns: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    def generate(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        stop: Collection[int] = (),
        use_cache: bool = True,
    ) -> Generation:
        """Return the greedy answer to a prompt, to be entered with `async with`.

        Args:
            tokens: The prompt.
            max_tokens: Longest answer.
            stop: Tokens that end it; they are not part of it.
            use_cache: Whether to use, and to feed, the manager. Without it all is computed.

        Raises:
            ValueError: No tokens, or more than the model's context.
        """
        limit = self.model.config.context_tokens
        if not tokens or max_tokens < 1 or len(tokens) + max_tokens > limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and an answer of {max_tokens}: at least 1 each, "
                f"and {limit} together at most"
            )
        return Generation(self, tokens, max_tokens, stop, use_cache)

    def turn_of(self, first_hash: bytes) -> asyncio.Lock:
        """Return the lock that prompts with this first block take turns with.

        Of two prompts with a beginning in common the second finds in the pool what the first has
        brought, and loads no more than its own part. Prompts that begin differently don't wait.
        """
        return self._turns.setdefault(first_hash, asyncio.Lock())

    async def __aenter__(self) -> Self:
        await self.worker.__aenter__()
        # The first touch of fresh memory is slow; no prompt should pay for it.
        await self.worker.run(self.pool.clear, range(self.pool.num_pages))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.worker.__aexit__(exc_type, exc, traceback)


class Generation:
    """One prompt and its answer: entered, it has its KV; iterated over, it yields tokens.

    Leaving it gives back pages and pins, whatever happened. If nothing did, the answer's blocks are
    stored first.

    Attributes:
        origin: Where the prompt's KV came from; complete with the first token.
        answer: The tokens so far.
        logits: What the last of them was chosen by.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: Sequence[int],
        max_tokens: int,
        stop: Collection[int],
        use_cache: bool,
    ) -> None:
        self.origin = Origin(len(tokens))
        self.answer: list[int] = []
        self.logits: Floats | None = None
        self._engine, self._pool, self._kv = engine, engine.pool, engine.kv
        self._tokens = np.array(tokens, np.int64)
        self._max_tokens, self._stop = max_tokens, frozenset(stop)
        self._hashes = hash_blocks(tokens, BLOCK_TOKENS) if use_cache else []
        self._use_cache = use_cache
        self._pages: list[int] = []
        self._ready = 0  # leading pages that are complete
        self._request: Request | None = None
        self._is_over = self._is_kept = self._has_gap = False
        self._scope = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Find and bring what is there of the prompt.

        Raises:
            PoolFullError: The pool has no room for this chat.
        """
        self._began = time.perf_counter()
        async with AsyncExitStack() as scope:
            if self._use_cache:
                self._request = await scope.enter_async_context(self._kv.request(self._hashes))
            scope.callback(self._release)
            await self._bring()
            self._scope = scope.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Store the answer, if all went well, and give everything back."""
        async with self._scope:
            if exc_type is None and self.answer and self._request is not None:
                await self._keep_prompt()
                if not self._has_gap:  # behind which nothing is of any use
                    await self._keep_answer()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        """Return the next token of the answer."""
        if self._is_over or len(self.answer) == self._max_tokens:
            raise StopAsyncIteration
        if not self.answer:
            logits = await self._prefill()
        else:
            await self._keep_prompt()  # after the first token, which nobody should wait for
            logits = await self._engine.worker.run(self._decode)
        self.logits = logits
        token = int(logits.argmax())
        if token in self._stop:
            self._is_over = True
            raise StopAsyncIteration
        self.answer.append(token)
        return token

    # Bringing

    async def _bring(self) -> None:
        """Get pages, and fill those whose blocks are there."""
        hit = 0 if self._request is None else self._request.hit
        # The last token is computed in any case, so the block that it completes is of no use.
        usable = self._hashes[: min(hit, (len(self._tokens) - 1) // BLOCK_TOKENS)]
        if usable:
            try:
                turn = self._engine.turn_of(usable[0])
                async with asyncio.timeout(self._engine.load_timeout_s), turn:
                    await self._take_pages(usable)
                    await self._load(usable)
            except TimeoutError:
                log.warning("loading took too long; the rest of the prompt is computed")
        if not self._pages:
            await self._take_pages(self._hashes[: (len(self._tokens) - 1) // BLOCK_TOKENS])
        self.origin.load_s = time.perf_counter() - self._began

    async def _take_pages(self, wanted: Sequence[bytes]) -> None:
        """Share what the pool has of these blocks; get pages of our own for all the rest."""
        chunks = -(-(len(self._tokens) + self._max_tokens) // CHUNK_TOKENS)
        shared = self._pool.share(wanted)
        self._pages += shared
        own = self._pool.allocate(chunks * PAGES_OF_A_CHUNK - len(shared))
        self._pages += own
        self._ready = len(shared)
        self.origin.shared_tokens = len(shared) * BLOCK_TOKENS
        await self._engine.worker.run(self._pool.clear, own)

    async def _load(self, usable: Sequence[bytes]) -> None:
        """Copy blocks from their lease into our pages; if one can't be had, those before it."""
        assert self._request is not None
        shared, count = self._ready, len(usable)
        while count > shared:
            tiers = [place.tier for place in self._kv.locate(usable[shared:count])]
            try:
                async with self._request.load(count) as lease:
                    pages, views = self._pages[shared:count], lease[shared:count]
                    loaded_bytes = sum(view.nbytes for view in views)
                    await self._engine.worker.run(self._pool.fill, pages, views)
            except (BlockNotFoundError, TierError) as exc:
                log.warning("a block can't be read; it will be computed: %s", exc)
                there = await self._kv.lookup(usable)
                if there >= count:  # it is there, but its tier can't read it now
                    return
                count = there
            except CapacityError as exc:
                log.warning("no room to load %d blocks; they will be computed: %s", count, exc)
                return
            else:
                found = Counter(tier for tier in tiers if tier is not None)
                self.origin.loaded_tokens = {t: n * BLOCK_TOKENS for t, n in found.items()}
                self.origin.loaded_bytes = loaded_bytes
                self._publish(count)
                return

    # Computing

    async def _prefill(self) -> Floats:
        """Compute what was not brought, and return the logits after the last token."""
        run, model = self._engine.worker.run, self._engine.model
        start = self._ready * BLOCK_TOKENS
        self.origin.computed_tokens = len(self._tokens) - start
        hidden = await self._compute(self._tokens, start)
        logits = await run(model.logits, hidden)
        self.origin.first_token_s = time.perf_counter() - self._began
        return logits

    async def _compute(self, tokens: NDArray[np.int64], start: int) -> Floats:
        """Compute tokens from `start` on, a chunk at a time, so that other chats get their turn."""
        run, chunk = self._engine.worker.run, self._engine.model.prefill_chunk
        table = np.array(self._pages, np.intp)
        while True:
            end = min(len(tokens), (start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
            hidden = await run(chunk, tokens[start:end], start, self._pool, table)
            if end == len(tokens):
                return hidden
            start = end

    def _decode(self) -> Floats:
        """Compute the token chosen last; on the worker thread."""
        model, position = self._engine.model, len(self._tokens) + len(self.answer) - 1
        table = np.array(self._pages, np.intp)
        return model.logits(model.decode(self.answer[-1], position, self._pool, table))

    # Keeping

    async def _keep_prompt(self) -> None:
        """Store the prompt's blocks from where they lie, and share them; once."""
        if self._is_kept or self._request is None:
            return
        self._is_kept = True
        hit, count = self._request.hit, len(self._hashes)
        self._publish(count)
        views = [self._pool.view(page) for page in self._pages[:count]]
        # What was hit and turned out to be damaged is no more, and the request goes on behind it.
        places = enumerate(self._kv.locate(self._hashes[:hit]))
        if lost := [index for index, place in places if place.tier is None]:
            await self._kv.store([self._hashes[i] for i in lost], [views[i] for i in lost])
        result = await self._request.store(views[hit:])
        self._has_gap = bool(result.rejected)

    async def _keep_answer(self) -> None:
        """Store the blocks that the answer completed.

        They were decoded, one row at a time. Here they are computed once more as a prompt would be,
        which for an answer costs a small part of what decoding did; so a block's bytes are the
        same whoever computed it, and a next turn says the same whether or not it finds them.
        """
        begin, tokens = len(self._hashes), [*self._tokens.tolist(), *self.answer]
        hashes = hash_blocks(tokens, BLOCK_TOKENS)
        if len(hashes) == begin:
            return
        complete = np.array(tokens[: len(hashes) * BLOCK_TOKENS], np.int64)
        await self._compute(complete, len(self._tokens))
        views = [self._pool.view(page) for page in self._pages[begin : len(hashes)]]
        # Before the request is left, which then counts as a use of the prompt: so of the whole
        # chain the head is used last, and stays longest.
        await self._kv.store(hashes[begin:], views)

    def _publish(self, count: int) -> None:
        """Let other chats share the pages that are complete by now."""
        for page, block_hash in zip(self._pages[:count], self._hashes[:count], strict=True):
            self._pool.publish(page, block_hash)
        self._ready = max(self._ready, count)

    def _release(self) -> None:
        self._pool.release(self._pages)
        self._pages = []
