"""Which keys of a batch go to which server; what a cluster says belongs elsewhere goes there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import anyio

from .nodes import Node, Nodes
from .outcomes import Outcome
from .resp import LostConnectionError, Reply, ReplyError

_REFUSALS = ("OOM", "READONLY", "MISCONF", "NOPERM", "NOREPLICAS", "NOGOODREPLICAS")
"""Errors of a server that serves all the same, but not this."""
_REDIRECTIONS = ("MOVED", "ASK")

Work: TypeAlias = Callable[[Node, Sequence[int], bool], Awaitable[None]]
"""Does something for the keys with these numbers at a node; the last says whether to ask it for
keys that are only on their way to it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply to a command of one key."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Redirection:
    """A key is at another server of the cluster; or, while it is moved, perhaps there."""

    place: str
    is_ask: bool


Told: TypeAlias = Outcome | Answer | Redirection | None
"""What is known of one key of a batch so far."""


def redirection(reply: Reply) -> Redirection | None:
    """Return where a key is, if a reply says so."""
    if isinstance(reply, ReplyError) and reply.code in _REDIRECTIONS:
        code, _, place = str(reply).split(" ")[:3]
        return Redirection(place, is_ask=code == "ASK")
    return None


def is_down(reply: Reply) -> bool:
    """Tell whether a reply says that the server does not serve."""
    known = (*_REFUSALS, *_REDIRECTIONS, "WRONGTYPE")
    return isinstance(reply, ReplyError) and reply.code not in known


async def route(nodes: Nodes, names: Sequence[bytes], told: list[Told], work: Work) -> None:
    """Have the work done for all keys of which nothing is told, at the servers concerned.

    What a server says belongs to another is done there, once.

    Raises:
        OSError: A server does not answer, or none has a key.
        ReplyError: One does not let us in.
    """
    asking: dict[int, Node] = {}
    for is_last in (False, True):
        await nodes.refresh()
        groups: dict[tuple[Node, bool], list[int]] = {}
        for number, name in enumerate(names):
            if told[number] is None:
                node = asking.get(number) or nodes.of(name)
                if node is None:
                    nodes.is_stale = True
                    raise LostConnectionError("no server of the cluster has the key")
                groups.setdefault((node, number in asking), []).append(number)
        try:
            await all_of([(work, node, numbers, on) for (node, on), numbers in groups.items()])
        except (OSError, ReplyError):
            nodes.is_stale = True
            raise
        moved = [(n, each) for n, each in enumerate(told) if isinstance(each, Redirection)]
        if moved and is_last:
            nodes.is_stale = True
            raise LostConnectionError("the servers of the cluster disagree on who has a key")
        for number, each in moved:
            told[number] = None
            if each.is_ask:
                asking[number] = nodes.at(each.place)
            else:
                nodes.is_stale = True


Call: TypeAlias = tuple[Work, Node, Sequence[int], bool]


async def all_of(calls: Sequence[Call]) -> None:
    """Do several things at once; raises the first error once all have ended."""
    if len(calls) == 1:
        work, node, numbers, asking = calls[0]
        await work(node, numbers, asking)
        return
    errors: list[Exception] = []

    async def run(work: Work, node: Node, numbers: Sequence[int], asking: bool) -> None:
        try:
            await work(node, numbers, asking)
        except (OSError, ReplyError) as exc:
            errors.append(exc)

    async with anyio.create_task_group() as tasks:
        for call in calls:
            tasks.start_soon(run, *call)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # or the error and this frame would keep each other
