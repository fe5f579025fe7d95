"""The model's own KV memory: pages of one block each, shared by the chats that are under way.

It stands for the memory of an accelerator. A page is one block over all layers, contiguous, in
exactly the bytes that the block has in kvoffload; so a block is copied in with one call and stored
from where it lies.

Bookkeeping is done on the event loop, in plain calls. Arrays are touched on the engine's worker
thread alone, one job after the other. So a page that a cancelled chat gave back while the worker
was still writing to it is written by its next owner later, for certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class PoolFullError(RuntimeError):
    """More pages are asked for than are free: try again when a chat has ended."""


@dataclass(frozen=True, slots=True)
class BlockGeometry:
    """The shape of one block: (layers, keys and values, KV heads, tokens, head width).

    Attributes:
        layers: Layers of the model.
        kv_heads: Heads of keys and values.
        block_tokens: Tokens of a block.
        head_dim: Width of a head.
        dtype: `"float32"` or `"float16"`; what the cache is kept in, not what is computed in.
    """

    layers: int
    kv_heads: int
    block_tokens: int
    head_dim: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Dimensions of a block."""
        return (self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def layout(self) -> str:
        """All that must be the same for bytes to mean the same: a part of the namespace."""
        return f"{'x'.join(map(str, self.shape))}/{self.dtype}"


class PagedPool:
    """Numbered pages, each free or held by one or more chats.

    Args:
        num_pages: Pages.
        geometry: Shape of each.
    """

    def __init__(self, num_pages: int, geometry: BlockGeometry) -> None:
        self.geometry = geometry
        self.num_pages = num_pages
        self._arena = np.zeros((num_pages, *geometry.shape), geometry.dtype)
        self._bytes = self._arena.reshape(num_pages, -1).view(np.uint8)
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    # On the event loop

    @property
    def free_pages(self) -> int:
        """Pages that no chat holds."""
        return len(self._free)

    def share(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Hold the pages of the leading blocks that are here already, and return them."""
        pages = []
        for block_hash in block_hashes:
            if (page := self._page_of.get(block_hash)) is None:
                break
            self._holders[page] += 1
            pages.append(page)
        return pages

    def allocate(self, count: int) -> list[int]:
        """Hold free pages, and return them; whatever was in them last is still there.

        Raises:
            PoolFullError: There are fewer; none is held then.
        """
        if count > len(self._free):
            raise PoolFullError(f"{count} pages are needed, and {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def publish(self, page: int, block_hash: bytes) -> None:
        """Let others share a page, for it is complete; where one has this block already, don't."""
        if block_hash not in self._page_of and page not in self._hash_of:
            self._page_of[block_hash] = page
            self._hash_of[page] = block_hash

    def release(self, pages: Sequence[int]) -> None:
        """Hold these no more; who is the last to let go frees a page."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if (block_hash := self._hash_of.pop(page, None)) is not None:
                    del self._page_of[block_hash]
                self._free.append(page)

    def view(self, page: int) -> memoryview:
        """Return a page's bytes, for `request.store`: no copy."""
        return memoryview(self._bytes[page]).toreadonly()

    # On the worker thread

    def fill(self, pages: Sequence[int], payloads: Sequence[memoryview]) -> None:
        """Copy blocks in, each straight from where the lease shows it.

        With an accelerator this is the copy to the device. The arrays made here over the leased
        views are gone when it returns: a view must not outlive its lease.
        """
        for page, payload in zip(pages, payloads, strict=True):
            np.copyto(self._bytes[page], np.frombuffer(payload, np.uint8))

    def clear(self, pages: Sequence[int]) -> None:
        """Overwrite with zeros: attention multiplies what is masked by 0, and 0 * NaN is NaN."""
        for page in pages:
            self._bytes[page] = 0

    def write(
        self,
        table: NDArray[np.intp],
        layer: int,
        start: int,
        keys: Floats,
        values: Floats,
    ) -> None:
        """Put keys and values, shape (tokens, KV heads, head width), at positions from `start`."""
        positions = np.arange(start, start + len(keys))
        tokens = self.geometry.block_tokens
        pages, places = table[positions // tokens], positions % tokens
        self._arena[pages, layer, 0, :, places] = keys
        self._arena[pages, layer, 1, :, places] = values

    def read(self, table: NDArray[np.intp], layer: int, which: int, head: int) -> Floats:
        """Return keys (0) or values (1) of one head over all of a table's pages, as float32."""
        gathered = self._arena[table, layer, which, head]
        flat: Floats = gathered.reshape(-1, self.geometry.head_dim).astype(np.float32, copy=False)
        return flat
