"""What `test_kill.py` kills: a process that stores, evicts and flushes, and tells of each call.

Run as a script, it forks such a process for each round that it is sent: a fork of one that has
imported everything takes milliseconds. All of them talk over one socket whose packets arrive
whole or not at all, whoever dies.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal, NoReturn, TypeAlias, TypeVar

import uvloop

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockNotFoundError,
    BlockState,
    DiskTier,
    MemoryTier,
    RejectReason,
    StoredBlock,
)
from kvoffload.keys import encode_key
from kvoffload.testing import payload_for

HOT_BLOCKS = 6
PACKET_BYTES = 2**16

Kind: TypeAlias = Literal[
    "forked", "opening", "opened", "begin", "end", "confirmed", "closed", "broken", "over"
]


@dataclass(frozen=True, slots=True)
class Round:
    """What a child has to do, and when to close in good order, if it lives that long."""

    path: str
    num_blocks: int
    block_bytes: int
    num_names: int
    target: Literal["manager", "tier"]
    encrypted: bool
    fsync: str
    direct_io: str
    policy: str
    loop: Literal["asyncio", "uvloop"]
    num_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a child is about to do, or has done; it calls blocks by their numbers.

    Attributes:
        kind: `begin` and `end` of a call; `confirmed` is an `end` that also says what is on disk.
        call: Number of the call.
        what: The method, or what other reports have to say.
        may_come: Blocks that may be there if the call is cut short.
        may_go: Blocks that may not be there any more then.
        may_lose: How many others may not be there any more then.
        may_write: How many blocks it may write to slots that others have to give way for.
        there: Blocks that are on disk for sure, with `opened`, `confirmed` and `closed`.
        newest: Of those, the ones that were written last, in this order.
        gone: Blocks that must not come back.
        doubtful: Blocks that left without a promise.
        room: So many slots can be written before one of those blocks gives way. Less than 0: so
            many blocks may have.
    """

    kind: Kind
    call: int = 0
    what: str = ""
    may_come: Sequence[int] = ()
    may_go: Sequence[int] = ()
    may_lose: int = 0
    may_write: int = 0
    there: Sequence[int] = ()
    newest: Sequence[int] = ()
    gone: Sequence[int] = ()
    doubtful: Sequence[int] = ()
    room: int = 0

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value)


def hash_of(name: int) -> BlockHash:
    """Return a block's hash, of each type in turn."""
    return (name, f"block {name}", b"block %d" % name)[name % 3]


def size_of(name: int, block_bytes: int) -> int:
    """Return a block's size; every fourth block is shorter than its slot."""
    return block_bytes if name % 4 else (name * 7919 + 1) % block_bytes


def new_tier(spec: Round) -> DiskTier:
    """Make the tier of a round, closed."""
    return DiskTier(
        spec.path,
        spec.num_blocks,
        spec.block_bytes,
        fsync=spec.fsync,
        direct_io=spec.direct_io,
        encryption_key=bytes(range(32)) if spec.encrypted else None,
    )


def payload_of(name: int, block_bytes: int) -> bytes:
    """Return a block's bytes, which no other block has."""
    return payload_for(hash_of(name), size_of(name, block_bytes))


class Player:
    """Makes random calls, several at once, and tells of each before and after it."""

    def __init__(self, spec: Round, tell: Callable[[Report], None]) -> None:
        self.spec = spec
        self.tell = tell
        self.dice = random.Random(spec.seed)
        # What picks from the names it is given, and may run beside others of its kind; and what
        # touches blocks of its own choice. With how often.
        self.methods: dict[Callable[[Iterable[int]], Awaitable[None]], int] = {}
        self.lonely_methods: dict[Callable[[], Awaitable[None]], int] = {}
        self._calls = 0
        self._touched: dict[int, set[int]] = {}  # by the calls under way

    async def step(self) -> None:
        """Make one to three calls at once, for different blocks."""
        if self.lonely_methods and self.dice.random() < 0.06:
            (alone,) = self.dice.choices(*_columns(self.lonely_methods))
            await alone()
            return
        shares = self.dice.sample(range(3), self.dice.choice((1, 1, 2, 3)))
        methods = self.dice.choices(*_columns(self.methods), k=len(shares))
        await asyncio.gather(
            *(
                method(range(share, self.spec.num_names, 3))
                for method, share in zip(methods, shares, strict=True)
            )
        )

    async def begin(self) -> None:
        """Do what every round begins with."""
        raise NotImplementedError

    def some(self, names: Iterable[int], most: int) -> list[int]:
        """Pick at least one of these, where there is one."""
        pool = sorted(names)
        return self.dice.sample(pool, min(len(pool), self.dice.randint(1, most)))

    def payloads(self, names: Iterable[int]) -> list[bytes]:
        return [payload_of(name, self.spec.block_bytes) for name in names]

    def call(
        self,
        what: str,
        *,
        come: Sequence[int] = (),
        go: Sequence[int] = (),
        lose: int = 0,
        write: int = 0,
    ) -> int:
        """Tell of a call before it; return its number."""
        self._calls += 1
        self._touched[self._calls] = {*come, *go}
        self.tell(Report("begin", self._calls, what, come, go, lose, write))
        return self._calls

    def end(
        self,
        call: int,
        *,
        there: Collection[int] | None = None,
        newest: Iterable[int] = (),
        gone: Sequence[int] = (),
        doubtful: Sequence[int] = (),
    ) -> None:
        """Tell of a call after it; of a confirmed one, what is there."""
        del self._touched[call]
        # What calls under way may bring or take is nobody's to promise.
        touched = set().union(*self._touched.values())
        report = Report("end", call, gone=gone, doubtful=doubtful, room=self.room())
        if there is not None:
            sure = [name for name in there if name not in touched]
            newest = [name for name in newest if name not in touched]
            report = replace(report, kind="confirmed", there=sure, newest=newest)
        self.tell(report)

    async def close(self) -> None:
        """Close in good order."""
        raise NotImplementedError

    def opened(self) -> Report:
        """Return what to tell of the opening."""
        raise NotImplementedError

    def room(self) -> int:
        """Return `Report.room`."""
        raise NotImplementedError


class ManagerPlayer(Player):
    """Plays with a manager."""

    def __init__(
        self, spec: Round, tell: Callable[[Report], None], manager: AsyncLRUManager
    ) -> None:
        super().__init__(spec, tell)
        self.methods = {self.store: 8, self.evict: 4, self.flush: 4, self.load: 4}
        self.lonely_methods = {self.evict_coldest: 9, self.clear: 1}
        self._manager = manager
        self._names = {hash_of(name): name for name in range(spec.num_names)}
        self._cold = manager.get_stats().tiers["cold"]  # as the last confirmed flush began

    async def begin(self) -> None:
        if self._cold.free_blocks < self.spec.num_blocks // 3 and self.dice.random() < 0.8:
            await self.evict_coldest(self.spec.num_blocks // 2)
        await self.store(range(self.spec.num_names))
        await self.flush(())

    async def store(self, names: Iterable[int]) -> None:
        names = self.some(names, 9)
        call = self.call("store", come=names, write=len(names))
        result = await self._manager.store(list(map(hash_of, names)), self.payloads(names))
        assert RejectReason.FAILED not in result.rejected.values()
        self.end(call, doubtful=[self._names[block_hash] for block_hash in result.evicted])

    async def load(self, names: Iterable[int]) -> None:
        names = self.some(self.ready().intersection(names), 6)
        # A promotion moves another block down.
        call = self.call("load", write=2 * len(names))
        with suppress(BlockNotFoundError):  # it gave way to a store beside it
            async with self._manager.load(list(map(hash_of, names))) as lease:
                assert list(map(bytes, lease)) == self.payloads(names)
        self.end(call)

    async def evict(self, names: Iterable[int]) -> None:
        """Evict some that are there, and some that are not, for these may be on disk still."""
        names = self.some(names, 6)
        call = self.call("evict", go=names)
        await self._manager.evict(list(map(hash_of, names)))
        assert self.ready().isdisjoint(names)
        self.end(call, gone=names)

    async def evict_coldest(self, count: int = 0) -> None:
        count = count or self.dice.randint(1, self.spec.num_blocks // 3)
        call = self.call("evict_coldest", lose=count)
        evicted = await self._manager.evict(num_blocks=count)
        self.end(call, gone=[self._names[block_hash] for block_hash in evicted])

    async def clear(self) -> None:
        everything = list(range(self.spec.num_names))
        call = self.call("clear", go=everything)
        await self._manager.clear()
        assert not self.ready()
        self.end(call, gone=everything)

    async def flush(self, _: Iterable[int]) -> None:
        cold, ready = self._manager.get_stats().tiers["cold"], self.ready()
        call = self.call("flush")
        begun_alone = len(self._touched) == 1
        result = await self._manager.flush()
        if begun_alone and self._calls == call:
            assert result.durable == min(len(ready), self.spec.num_blocks)
        if result.not_durable:
            ready &= self.ready("cold")  # of the others, nobody says which are meant
        else:
            ready &= self.ready()
        self._cold = cold
        self.end(call, there=ready)

    async def close(self) -> None:
        """Close, which lets colder blocks give way to hotter ones."""
        ready = self.ready()
        call = self.call("close", write=len(ready - self.ready("cold")))
        await self._manager.__aexit__(None, None, None)
        surplus = len(ready) - self.spec.num_blocks
        self.tell(Report("closed", call, there=sorted(ready), room=min(0, -surplus)))

    def opened(self) -> Report:
        return Report("opened", there=sorted(self.ready()), room=self.room())

    def ready(self, tier: str | None = None) -> set[int]:
        """Return the blocks that are ready, or those whose highest tier is this one."""
        places = self._manager.locate([hash_of(name) for name in range(self.spec.num_names)])
        return {
            name
            for name, place in enumerate(places)
            if place.state is BlockState.READY and tier in (None, place.tier)
        }

    def room(self) -> int:
        written = self._manager.get_stats().tiers["cold"].blocks_written
        return self._cold.free_blocks - (written - self._cold.blocks_written)


class TierPlayer(Player):
    """Plays with a disk tier alone, whose every call that returned must survive a kill."""

    def __init__(
        self,
        spec: Round,
        tell: Callable[[Report], None],
        tier: DiskTier,
        found: Iterable[StoredBlock],
    ) -> None:
        super().__init__(spec, tell)
        self.methods = {self.write: 8, self.erase: 4, self.flush: 4, self.read: 4}
        self.lonely_methods = {self.move: 1}
        self._tier = tier
        self._keys = [encode_key(hash_of(name), "") for name in range(spec.num_names)]
        self._slots = {self._keys.index(block.key): block.slot for block in found}
        self._written: dict[int, None] = {}  # by this player, in order
        self._free = sorted(set(range(spec.num_blocks)).difference(self._slots.values()))

    async def begin(self) -> None:
        await self.write(range(self.spec.num_names))
        await self.flush(())

    async def write(self, names: Iterable[int]) -> None:
        """Write new blocks, to free slots and over others."""
        names = list(names)
        new = self.some(set(names).difference(self._slots), 9)
        old = self._idle(names)
        self.dice.shuffle(old)
        slots = []
        for _ in new:
            if self._free and (not old or self.dice.random() < 0.6):
                slots.append(self._free.pop(self.dice.randrange(len(self._free))))
            elif old:
                slots.append(self._slots[old.pop()])
        new = new[: len(slots)]
        replaced = [name for name, slot in self._slots.items() if slot in slots]
        call = self.call("write", come=new, go=replaced)
        self._forget(replaced)
        await self._write(new, slots)
        self.end(call, gone=replaced)

    async def move(self) -> None:
        """Write blocks to other slots, and erase them where they were; they are never missing."""
        names = self.some(self._slots, 6)[: len(self._free)]
        old = [self._slots[name] for name in names]
        new = [self._free.pop() for _ in names]
        self._forget(names)
        call = self.call("move")
        await self._write(names, new)
        await self._tier.erase(old)
        self._free += old
        self.end(call)

    async def erase(self, names: Iterable[int]) -> None:
        names = self.some(self._idle(names), 6)
        slots = [self._slots[name] for name in names]
        call = self.call("erase", go=names)
        await self._tier.erase(slots)
        self._forget(names)
        self._free += slots
        self.end(call, gone=names)

    async def read(self, names: Iterable[int]) -> None:
        names = self.some(self._idle(names), 6)
        call = self.call("read")
        buffers = [bytearray(len(payload)) for payload in self.payloads(names)]
        slots = [self._slots[name] for name in names]
        outcomes = await self._tier.read(slots, [memoryview(buffer) for buffer in buffers])
        assert outcomes == [None] * len(names)
        assert list(map(bytes, buffers)) == self.payloads(names)
        self.end(call)

    async def flush(self, _: Iterable[int]) -> None:
        call = self.call("flush")
        await self._tier.flush()
        self.end(call)

    async def close(self) -> None:
        call = self.call("close")
        await self._tier.close(list(self._slots.values()))
        self.tell(Report("closed", call, there=list(self._slots), newest=list(self._written)))

    def end(
        self,
        call: int,
        *,
        there: Collection[int] | None = None,
        newest: Iterable[int] = (),
        gone: Sequence[int] = (),
        doubtful: Sequence[int] = (),
    ) -> None:
        super().end(call, there=self._slots, newest=self._written, gone=gone, doubtful=doubtful)

    def opened(self) -> Report:
        return Report("opened", there=list(self._slots))

    def room(self) -> int:
        return 0

    async def _write(self, names: Sequence[int], slots: Sequence[int]) -> None:
        # Of calls at once, the first one counts as the earlier.
        self._slots.update(zip(names, slots, strict=True))
        self._written.update(dict.fromkeys(names))
        payloads = [memoryview(payload) for payload in self.payloads(names)]
        outcomes = await self._tier.write(slots, payloads, [self._keys[name] for name in names])
        assert outcomes == [None] * len(names)

    def _forget(self, names: Iterable[int]) -> None:
        for name in names:
            del self._slots[name]
            self._written.pop(name, None)

    def _idle(self, names: Iterable[int]) -> list[int]:
        return [name for name in names if name in self._slots]


async def play(spec: Round, tell: Callable[[Report], None]) -> None:
    """Open, make calls until the steps are done, and close."""
    tier = new_tier(spec)
    tell(Report("opening"))
    player: Player
    if spec.target == "tier":
        player = TierPlayer(spec, tell, tier, await tier.open())
    else:
        manager = AsyncLRUManager(
            hot=MemoryTier(HOT_BLOCKS, spec.block_bytes),
            cold=tier,
            policy=spec.policy,
            staging_bytes=16 * spec.block_bytes,
        )
        await manager.__aenter__()
        player = ManagerPlayer(spec, tell, manager)
    tell(player.opened())
    await player.begin()
    for _ in range(spec.num_steps):
        await player.step()
    await player.close()


_T = TypeVar("_T")


def _columns(weighted: dict[_T, int]) -> tuple[list[_T], list[int]]:
    return list(weighted), list(weighted.values())


def main(channel: socket.socket) -> None:
    """Fork a child for each round that comes, and say when it is over; until nobody is there."""

    def tell(report: Report) -> None:
        channel.send(json.dumps(asdict(report)).encode())

    child = 0
    while packet := channel.recv(PACKET_BYTES):
        if child:
            os.waitpid(child, 0)  # not earlier, or its number could be another's when it is killed
        child = os.fork()
        if not child:
            run(Round(**json.loads(packet)), tell)
        over = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        tell(Report("over", what=f"{over}"))


def run(spec: Round, tell: Callable[[Report], None]) -> NoReturn:
    """Play one round in this process, which ends with it."""
    try:
        tell(Report("forked", what=f"{os.getpid()}"))
        new_loop = uvloop.new_event_loop if spec.loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(play(spec, tell))
    except BaseException:  # noqa: BLE001  # whatever it is, the parent has to know
        tell(Report("broken", what=traceback.format_exc()))
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
