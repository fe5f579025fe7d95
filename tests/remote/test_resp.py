"""The protocol, cut wherever a network may cut it."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from kvoffload.remote.nodes import slot_of
from kvoffload.remote.resp import Connection, LostConnectionError, Reply, ReplyError, Value


class Transport:
    """Takes what is sent, and says nothing."""

    aborted = False

    def set_write_buffer_limits(self, **_: int) -> None:
        """Have none."""

    def write(self, data: bytes) -> None:
        """Take it."""

    def abort(self) -> None:
        self.aborted = True


def connected() -> Connection:
    transport: Any = Transport()
    connection = Connection()
    connection.connection_made(transport)
    return connection


def feed(connection: Connection, data: bytes, step: int) -> None:
    """Give a connection bytes as a loop does, at most so many at a time."""
    start = 0
    while start < len(data):
        buffer = connection.get_buffer(-1)
        count = min(step, len(buffer), len(data) - start)
        buffer[:count] = data[start : start + count]
        connection.buffer_updated(count)
        start += count


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 64, 100_000])
async def test_replies_cut_anywhere(step: int) -> None:
    connection = connected()
    payload = bytes(range(256)) * 300
    values = [Value(4, memoryview(bytearray(n)), 8) for n in (len(payload), 5, 0, 5, 5)]
    plan: list[tuple[bytes, Value | None, Reply]] = [
        (b"+OK\r\n", None, b"OK"),
        (b"$%d\r\nhead%btrailer!\r\n" % (len(payload) + 12, payload), values[0], True),
        (b":17\r\n", None, 17),
        (b"$-1\r\n", values[1], None),
        (b"$12\r\nheadtrailer!\r\n", values[2], True),
        (b"$3\r\nabc\r\n", values[3], None),
        (b"$3\r\n\r\n\r\r\n", None, b"\r\n\r"),
        (b"*3\r\n$1\r\n0\r\n*2\r\n:1\r\n$-1\r\n*0\r\n", None, [b"0", [1, None], []]),
        (b"$17\r\nhead12345trailer!\r\n", values[4], True),
        (b"$-1\r\n", None, None),
    ]
    futures = [connection.expect(value) for _, value, _ in plan]
    error = connection.expect(Value(4, memoryview(bytearray(5)), 8))
    feed(connection, b"".join(data for data, _, _ in plan) + b"-OOM no memory\r\n", step)
    assert [await future for future in futures] == [reply for _, _, reply in plan]
    refused = await error
    assert isinstance(refused, ReplyError)
    assert refused.code == "OOM"
    assert bytes(values[0].payload) == payload
    assert bytes(values[4].payload) == b"12345"
    assert {bytes(values[n].header) for n in (0, 2, 4)} == {b"head"}
    assert {bytes(values[n].trailer) for n in (0, 2, 4)} == {b"trailer!"}
    assert connection.is_idle


async def test_a_reply_longer_than_the_buffer() -> None:
    connection = connected()
    future = connection.expect()
    names = [b"%d" % number * 50 for number in range(5000)]
    data = b"*%d\r\n" % len(names) + b"".join(b"$%d\r\n%b\r\n" % (len(n), n) for n in names)
    feed(connection, data, 60_000)
    assert await future == names


@pytest.mark.parametrize("data", [b"HTTP/1.1 200 OK\r\n", b":1\r\n:2\r\n", b"$x\r\n"])
async def test_what_is_not_the_protocol(data: bytes) -> None:
    connection = connected()
    future = connection.expect()
    feed(connection, data, 100)
    assert isinstance(await future, LostConnectionError | int)
    assert not connection.is_idle


async def test_given_up_it_writes_to_no_buffer() -> None:
    connection = connected()
    payload = bytearray(10)
    future = connection.expect(Value(0, memoryview(payload), 0))
    feed(connection, b"$10\r\nabc", 100)
    connection.abort()
    feed(connection, b"defghij\r\n", 100)
    assert payload == b"abc" + bytes(7)
    assert isinstance(await future, LostConnectionError)
    assert isinstance(await connection.expect(), LostConnectionError)
    with pytest.raises(LostConnectionError):
        await connection.send(b"more")


async def test_who_waits_to_send_is_told_of_the_end() -> None:
    connection = connected()
    connection.pause_writing()
    told: list[Exception] = []

    async def send() -> None:
        with pytest.raises(LostConnectionError) as caught:
            await connection.send(b"data")
        told.append(caught.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await anyio.lowlevel.checkpoint()
        assert not told
        connection.connection_lost(None)
    assert told


def test_slots_of_a_cluster() -> None:
    """As the specification has them."""
    assert slot_of(b"123456789") == 0x31C3
    assert slot_of(b"{user1000}.following") == slot_of(b"{user1000}.followers")
    assert slot_of(b"foo{}{bar}") != slot_of(b"foo")
    assert slot_of(b"foo{{bar}}zap") == slot_of(b"{bar")
    assert slot_of(b"foo{bar}{zap}") == slot_of(b"bar")
