"""Storing a chain whose payloads arrive little by little, as from a network."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence

from .core import Core, Outcome
from .errors import ConfigError
from .named import Named
from .payloads import check_payloads
from .retention import Retention
from .types import Buffer, Key, RejectReason


async def store_groups(
    core: Core,
    keys: Sequence[Key],
    groups: AsyncIterable[Sequence[Buffer]],
    *,
    chain: Sequence[Key] = (),
    retention: Retention | None = None,
    is_chain: bool = False,
) -> Outcome:
    """Store blocks group by group, without counting a use: all of them, or none that are new.

    The buffers of a group are the caller's again when the next group is asked for. If the groups
    end early, raise, or the call is cancelled, what it stored leaves again, for good. Where the
    keys are told to be a chain, a rejection ends it.

    Raises:
        ConfigError: More or fewer payloads than keys, or one that is longer than a block.
        TypeError: A payload is no buffer.
    """
    stored: dict[Key, None] = {}
    present: dict[Key, None] = {}
    rejected: dict[Key, RejectReason] = {}
    evicted: dict[Key, None] = {}
    waited_s = 0.0
    ended: RejectReason | None = None
    named = Named(core.index, list(dict.fromkeys(keys)))
    done = 0
    try:
        named.hold()
        async for payloads in groups:
            data = check_payloads(payloads, core.block_bytes)
            part = keys[done : done + len(data)]
            if len(part) < len(data):
                raise ConfigError(f"more payloads than the {len(keys)} block hashes")
            done += len(part)
            if ended is not None:
                rejected |= dict.fromkeys(part, ended)
                continue
            outcome = await core.store(part, data, chain, retention)
            stored |= dict.fromkeys(outcome.stored)
            present |= dict.fromkeys(outcome.present)
            rejected |= outcome.rejected
            evicted |= dict.fromkeys(outcome.evicted)
            waited_s += outcome.waited_s
            named.hold()
            if is_chain and outcome.rejected:
                ended = next(iter(outcome.rejected.values()))
        if done < len(keys):
            raise ConfigError(f"{len(keys)} block hashes, but {done} payloads")
    except BaseException:
        named.release()
        core.drop_soon(list(stored))
        raise
    named.release()
    # A hash that was given twice may have come in two groups.
    return Outcome(
        stored=list(stored),
        present=[key for key in present if key not in stored],
        rejected={k: why for k, why in rejected.items() if k not in stored and k not in present},
        evicted=list(evicted),
        waited_s=waited_s,
    )
