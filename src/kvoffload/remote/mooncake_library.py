"""Mooncake's library: what is called of it, what it answers, and what it needs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import ConfigError

NO_ROOM = -200
WRONG_ARGUMENTS = -600
NOT_WHOLE = -703
NOT_THERE = -704
ALREADY_THERE = -705
LEASE_IS_OVER = -707
OVER_QUOTA = -1700
_MEANINGS = {
    -1: "internal error",
    NO_ROOM: "no node has room for it",
    WRONG_ARGUMENTS: "it takes no such call",
    -800: "the transfer failed",
    -900: "the master does not answer",
    -901: "the master did not answer in time",
    OVER_QUOTA: "the tenant's quota is used up",
}


class StoreError(Exception):
    """The store, or its library, does not do what it should."""


class Store(Protocol):
    """What is used of `mooncake.store.MooncakeDistributedStore`; what is negative is an error.

    All of it may take any time: the setup with the interpreter's lock, the rest without.
    """

    def setup(
        self,
        local_hostname: str,
        metadata_server: str,
        global_segment_size: int,
        local_buffer_size: int,
        protocol: str,
        rdma_devices: str,
        master_server_addr: str,
    ) -> int:
        """Connect to a master."""

    def setup_dummy(self, mem_pool_size: int, local_buffer_size: int, address: str, /) -> int:
        """Connect to a client on this machine, and share memory with it."""

    def allocate_and_mount_segment(self, size: int, protocol: str) -> Mapping[str, Any]:
        """Let the store have memory of this process."""

    def unmount_and_free_segment(self, segment_ids: list[str]) -> int:
        """Take it back, with all that is in it."""

    def alloc_from_mem_pool(self, size: int, /) -> int:
        """Return an address in the shared memory; 0 if it has no room."""

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """Make memory known that payloads come from and go to."""

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        """Return 1 for each value that is there, else 0."""

    def batch_get_replica_desc(self, keys: list[str]) -> Mapping[str, Sequence[Any]]:
        """Tell where values are; nothing of those that are not there, or if it failed."""

    def get_size(self, key: str, /) -> int:
        """Return the bytes of a value."""

    def batch_get_into(self, keys: list[str], ptrs: list[int], sizes: list[int]) -> list[int]:
        """Read values; return how many bytes they have."""

    def batch_put_from(self, keys: list[str], ptrs: list[int], sizes: list[int]) -> list[int]:
        """Write values; return 0 for each, also where one was there and stays."""

    def batch_remove(self, keys: list[str], force: bool) -> list[int]:
        """Delete values, if forced those too that somebody reads."""

    def remove_by_regex(self, regex_pattern: str, force: bool) -> int:
        """Delete the values in whose names the pattern is found; return how many they were."""


def meaning_of(code: int) -> str:
    """Return what an error of the library's means."""
    return f"{_MEANINGS.get(code, 'it failed')} ({code})"


def new_store() -> Store:
    """Return a store that is not connected.

    Raises:
        ConfigError: The library is missing, or something that it needs.
    """
    # Where nobody answers, each try stops the whole process.
    os.environ.setdefault("MC_STORE_CLIENT_SETUP_RETRIES", "1")
    try:
        library = importlib.import_module("mooncake.store")
    except ImportError as exc:
        raise ConfigError(
            "MooncakeTier needs Mooncake's client: pip install 'kvoffload[mooncake]', and the "
            f"system's libibverbs.so.1 (Debian: apt-get install libibverbs1): {exc}"
        ) from exc
    store: Store = library.MooncakeDistributedStore()
    if "MC_LOG_LEVEL" not in os.environ:
        # What goes wrong is raised; the library would write a line for each block besides.
        with contextlib.suppress(ValueError):
            library_file = ctypes.CDLL(library.__file__)
            ctypes.c_int.in_dll(library_file, "_ZN3fLI17FLAGS_minloglevelE").value = _GLOG_FATAL
    return store


_GLOG_FATAL = 3
