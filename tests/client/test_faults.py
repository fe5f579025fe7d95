"""Servers that refuse, lie, stop, vanish: what callers of the client see, and what stays behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.client.hosting import Host
from tests.client.scripted import BLOCK_BYTES, answer, never, says, scripted

from kvoffload import (
    AccessDeniedError,
    AsyncLRUManager,
    BlockNotFoundError,
    CapacityError,
    ClosedError,
    ConfigError,
    CorruptBlockError,
    LoadTimeoutError,
    MemoryTier,
    NotPinnedError,
    OffloadError,
    TierLockedError,
    TierTimeoutError,
    TierUnavailableError,
)
from kvoffload.client import AsyncLRUClient
from kvoffload.service.access import AccessControl, Right, Token
from kvoffload.service.wire import BATCH, pack_header

SECRET = "a-secret-that-nobody-shows"
A, B = b"a" * BLOCK_BYTES, b"b" * BLOCK_BYTES


def small(hot: int = 8) -> Any:
    return lambda loop: AsyncLRUManager(hot=MemoryTier(hot, BLOCK_BYTES))


def free_buffers(kv: AsyncLRUClient) -> int:
    return kv._buffers._there.slots.free


# Who may not


async def test_a_wrong_token_or_none(host: Host) -> None:
    """Said as what it is, and neither shows."""
    access = AccessControl([Token.of("another")])
    hosted = await host.host(small(), access)
    for token in (None, SECRET):
        client = AsyncLRUClient(host.unix, token=token)
        with pytest.raises(AccessDeniedError) as caught:
            async with client:
                pytest.fail("let in")
        assert isinstance(caught.value, PermissionError)
        assert SECRET not in f"{caught.value!r} {client!r}"
    await hosted.leave()


async def test_a_token_with_less_than_all_rights(host: Host) -> None:
    """It reads in its namespace, and that is all."""
    token = Token.of(SECRET, ["mine"], [Right.READ])
    hosted = await host.host(small(), AccessControl([token]))
    async with AsyncLRUClient(host.unix, token=SECRET, namespace="mine") as kv:
        assert await kv.lookup(["x"]) == 0
        for refused in (kv.store(["x"], [A]), kv.evict(["x"]), kv.flush(), kv.clear()):
            with pytest.raises(AccessDeniedError) as caught:
                await refused
            assert SECRET not in str(caught.value)
        with pytest.raises(AccessDeniedError):
            await kv.namespace("yours").lookup(["x"])
    for options in ({"namespace": "yours"}, {"namespace": "mine", "all_namespaces": True}):
        with pytest.raises(AccessDeniedError):
            async with AsyncLRUClient(host.unix, token=SECRET, **options):
                pytest.fail("let in")
    await hosted.leave()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:80",
        "ftp://host",
        "unix:",
        "http://",
        "http://h:x",
        "http://u:pw@h",
        "http://h?a=b",
    ],
)
def test_impossible_urls(url: str) -> None:
    """Told at once, without repeating what may be a password."""
    with pytest.raises(ConfigError) as caught:
        AsyncLRUClient(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ümlaut"])
def test_impossible_tokens(token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AsyncLRUClient("http://host", token=token)
    assert not token or token not in str(caught.value)


async def test_impossible_settings() -> None:
    for setting in ("timeout_s", "connect_timeout_s", "max_connections", "close_timeout_s"):
        with pytest.raises(ConfigError):
            AsyncLRUClient("http://host", **{setting: 0})  # type: ignore[arg-type]  # of any kind


# Nobody there


async def test_no_service(tmp_path: Path) -> None:
    """It names where it looked; and the client opens only once."""
    client = AsyncLRUClient(f"unix:{tmp_path}/none.sock")
    with pytest.raises(TierUnavailableError, match=r"none\.sock") as caught:
        async with client:
            pytest.fail("opened")
    assert caught.value.tier == "service"
    with pytest.raises(ClosedError):
        await client.__aenter__()


SERVE = f"""
import sys, uvicorn
from kvoffload import AsyncLRUManager, MemoryTier
from kvoffload.service.access import AccessControl
from kvoffload.service.app import create_app
app = create_app(
    lambda: AsyncLRUManager(hot=MemoryTier(8, {BLOCK_BYTES})),
    access=AccessControl(unprotected=True),
)
uvicorn.run(app, uds=sys.argv[1], log_level="error")
"""


class Process:
    """A service in a process of its own."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path = path
        self._process = subprocess.Popen([sys.executable, "-c", SERVE, str(path)])

    async def listening(self) -> None:
        with anyio.fail_after(60):
            while True:
                try:
                    stream = await anyio.connect_unix(self.path)
                except OSError:
                    await anyio.sleep(0.01)  # a process has no event to wait for
                else:
                    await stream.aclose()
                    return

    def kill(self) -> None:
        """As `kill -9`."""
        self._process.kill()
        self._process.wait()


async def test_a_service_that_is_killed_and_comes_back(socket_path: Path) -> None:
    """No chance for it to say goodbye; the next call finds the new one."""
    process = Process(socket_path)
    try:
        await process.listening()
        async with AsyncLRUClient(f"unix:{socket_path}") as kv:
            await kv.store(["x"], [A])
            events = kv.events()
            async with kv.load(["x"]) as lease, kv.request(["x"]) as request:
                process.kill()
                with pytest.raises(TierUnavailableError):
                    await kv.store(["y"], [B])
                assert lease[0] == A
                with pytest.raises((ClosedError, TierUnavailableError)):
                    async with request.load():
                        pytest.fail("loaded from nowhere")
            assert [event async for event in events] == []
            process = Process(socket_path)
            await process.listening()
            assert await kv.lookup(["x"]) == 0
            assert (await kv.store(["x"], [A])).stored == ("x",)
            assert kv.get_stats().pinned == 0
    finally:
        process.kill()


# Answers that are none


BATCH_OF_X = pack_header(["x"], [BLOCK_BYTES], lease="l")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        answer(200, BATCH_OF_X + A, BATCH)[:-1],
        answer(200, BATCH_OF_X + A, BATCH)[:-BLOCK_BYTES],
        answer(200, BATCH_OF_X + A[1:], BATCH),
        answer(200, BATCH_OF_X + A + A, BATCH),
        answer(200, BATCH_OF_X[:5], BATCH),
        answer(200, b"KVB2" + BATCH_OF_X[4:] + A, BATCH),
        answer(200, pack_header(["y"], [BLOCK_BYTES]) + A, BATCH),
        answer(200, pack_header(["x"], [BLOCK_BYTES + 1]) + A + b"x", BATCH),
        answer(502, b"<html>Bad Gateway</html>", "text/html"),
        answer(500, {"detail": "of another server"}),
        b"SMTP ready\r\n\r\n",
    ],
)
async def test_half_an_answer_or_another_one(data: bytes) -> None:
    """An error of the library's own; the call is taken back, and no buffer is lost."""
    async with scripted() as script, AsyncLRUClient(script.url, staging_bytes=BLOCK_BYTES) as kv:
        script.on["/leases"] = [says(data)]
        with pytest.raises(TierUnavailableError) as caught:
            async with kv.load(["x"]):
                pytest.fail("loaded")
        assert caught.value.tier == "service"
        assert free_buffers(kv) == 1
        was_answered = data.startswith(b"HTTP/1.1 5")
        assert was_answered != any("DELETE" in call and "/calls/" in call for call in script.seen)
        assert await kv.lookup(["x"]) == 7


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("BlockNotFoundError", BlockNotFoundError),
        ("CapacityError", CapacityError),
        ("LoadTimeoutError", LoadTimeoutError),
        ("NotPinnedError", NotPinnedError),
        ("ClosedError", ClosedError),
        ("ConfigError", ConfigError),
        ("TierUnavailableError", TierUnavailableError),
        ("TierTimeoutError", TierTimeoutError),
        ("TierLockedError", TierLockedError),
        ("CorruptBlockError", CorruptBlockError),
        ("SomethingNew", TierUnavailableError),
    ],
)
async def test_errors_of_the_service_are_the_librarys(error: str, kind: type[OffloadError]) -> None:
    """With the blocks and the tier that they name."""
    problem = {"error": error, "message": "why", "block_hashes": ["i:5"], "tier": "cold"}
    async with scripted() as script, AsyncLRUClient(script.url) as kv:
        script.on["/leases"] = [says(answer(503, problem))]
        with pytest.raises(kind, match="why") as caught:
            async with kv.load([5]):
                pytest.fail("loaded")
        if isinstance(caught.value, BlockNotFoundError):
            assert caught.value.block_hashes == (5,)
        if isinstance(caught.value, CorruptBlockError):
            assert (caught.value.tier, caught.value.block_hash) == ("cold", 5)


async def test_a_service_that_never_answers() -> None:
    """Given up in time; the caller recomputes."""
    async with scripted() as script, AsyncLRUClient(script.url, timeout_s=0.2) as kv:
        script.on["/leases"] = [never]
        with pytest.raises(LoadTimeoutError) as caught:
            async with kv.load(["x"]):
                pytest.fail("loaded")
        assert isinstance(caught.value, TierTimeoutError)
        assert any("DELETE" in call and "/calls/" in call for call in script.seen)


async def test_reads_are_repeated_once_and_stores_are_not() -> None:
    """A connection that breaks before any byte of the answer."""
    async with scripted() as script, AsyncLRUClient(script.url) as kv:
        script.on["/lookup"] = [says(b"")]
        assert await kv.lookup(["x"]) == 7
        script.on["/lookup"] = [says(b""), says(b"")]
        with pytest.raises(TierUnavailableError):
            await kv.lookup(["x"])
        script.on["/store"] = [says(b"")]
        with pytest.raises(TierUnavailableError):
            await kv.store(["x"], [A])
        assert sum("/store" in call for call in script.seen) == 1


@pytest.mark.parametrize("line", [b"no JSON", b"[]", b'{"n": 2, "event": {}}', b'{"stats": {}}'])
async def test_a_stream_that_makes_no_sense(line: bytes) -> None:
    """The session is lost, and said so; the next call has a new one."""
    async with scripted() as script, AsyncLRUClient(script.url) as kv:
        events = kv.events()
        script.streams[0].write(b"%x\r\n%b\n\r\n" % (len(line) + 1, line))
        assert [event async for event in events] == []
        assert await kv.lookup(["x"]) == 7
        assert sum(call == "POST /v1/sessions" for call in script.seen) == 2


async def test_a_first_line_that_does_not_come() -> None:
    async with scripted() as script:
        script.on["/stream"] = [never]
        with pytest.raises(TierUnavailableError, match="first line"):
            async with AsyncLRUClient(script.url, timeout_s=0.2):
                pytest.fail("opened")


async def test_a_line_that_is_late_holds_no_call_up_for_long() -> None:
    """The answer is right all the same."""
    async with scripted() as script, AsyncLRUClient(script.url, timeout_s=0.2) as kv:
        body = json.dumps({"hit": 3}).encode()
        head = f"HTTP/1.1 200 OK\r\nKVOffload-Sequence: 99\r\nContent-Length: {len(body)}\r\n\r\n"
        script.on["/lookup"] = [says(head.encode() + body)]
        assert await kv.lookup(["x"]) == 3


async def test_closing_is_bounded() -> None:
    """A service that hangs does not hold its clients."""
    async with scripted() as script:
        script.on["/sessions/S"] = [never]
        with anyio.fail_after(20):
            async with AsyncLRUClient(script.url, close_timeout_s=0.2) as kv:
                assert await kv.lookup(["x"]) == 7
        with pytest.raises(ClosedError):
            await kv.lookup(["x"])


# Too much


async def test_more_than_the_buffers_hold(host: Host) -> None:
    """Nothing is sent, nothing is reserved, nothing is pinned."""
    hosted = await host.host(small())
    async with AsyncLRUClient(host.unix, staging_bytes=2 * BLOCK_BYTES) as kv:
        await kv.store(["x", "y", "z"], [A, B, A])
        for hashes in (["x", "y", "z"], ["z", "z", "z"]):
            with pytest.raises(CapacityError, match="staging_bytes"):
                async with kv.load(hashes):
                    pytest.fail("loaded")
        assert await kv.prepare_store(["1", "2", "3"]) is None
        with pytest.raises(CapacityError):
            await kv.prepare_load(["x", "y", "z"])
        async with kv.load(["x", "y"]):
            with pytest.raises(CapacityError):
                await kv.prepare_load(["z"])
        assert free_buffers(kv) == 2
        stats = await kv.fetch_stats()
        assert (stats.pinned, stats.pending) == (0, 0)
    await hosted.leave()
