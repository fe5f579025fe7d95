"""The JSON bodies of the service, as pydantic models; OpenAPI is made from these."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..retention import Retention

HASH_PATTERN = r"^(b:([0-9a-fA-F]{2})*|i:-?[0-9]{1,600}|s:[\s\S]*|x:([0-9a-fA-F]{2})*)$"
HashText = Annotated[
    str,
    Field(
        pattern=HASH_PATTERN,
        examples=["b:9f86d081", "s:system-prompt/0", "i:42"],
        description="A block hash with its type: `b:` hexadecimal bytes, `s:` text, `i:` integer",
    ),
]
Hashes = Annotated[
    list[HashText], Field(fail_fast=True, description="A chain of blocks, head first")
]
"""The first that is none ends the check: there may be very many."""
Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class Body(BaseModel):
    """Base of all that comes in: unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid")


class Chain(Body):
    """Some blocks."""

    block_hashes: Hashes


class LoadChain(Chain):
    """Blocks to load."""

    timeout_s: Seconds | None = None


class Eviction(Body):
    """Either blocks, or how many of the coldest."""

    block_hashes: Hashes | None = None
    num_blocks: Annotated[int, Field(ge=0, le=2**53)] | None = None


class StoreChain(Chain):
    """Blocks to reserve slots for."""

    sizes: Annotated[list[Annotated[int, Field(ge=0, le=2**53)]], Field(fail_fast=True)] | None = (
        None
    )


class RetentionBody(Body):
    """What the caller knows of when the chain returns."""

    likelihood: Annotated[float, Field(ge=0, le=1)] | None = None
    within_s: PositiveSeconds | None = None

    def as_retention(self) -> Retention:
        """Return it as the manager takes it."""
        return Retention(self.likelihood, self.within_s)


Likelihood = Annotated[float, Field(ge=0, le=1)]


class RetentionChange(Body):
    """How likely, or how soon, a chain is used again; `0` frees what only it uses."""

    retention: Likelihood | RetentionBody | None = None

    def as_retention(self) -> Retention | float | None:
        """Return it as the manager takes it."""
        said = self.retention
        return said.as_retention() if isinstance(said, RetentionBody) else said


class RequestChain(Chain, RetentionChange):
    """The chain of one prompt."""

    wait_pending_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 0.0


class LoadHit(Body):
    """How much of a request's hit to load."""

    num_blocks: Annotated[int, Field(ge=0, le=2**53)] | None = None
    timeout_s: Seconds | None = None


class PlanBody(Body):
    """What an engine can compute, and by when it needs the blocks."""

    tokens_per_s: PositiveSeconds
    block_tokens: Annotated[int, Field(ge=1, le=2**31)] = 16
    deadline_s: Seconds | None = None


class Problem(BaseModel):
    """What went wrong."""

    error: Annotated[str, Field(examples=["BlockNotFoundError"])]
    message: str
    block_hashes: list[str] | None = None
    tier: str | None = None


class Hit(BaseModel):
    """How many leading blocks are ready."""

    hit: int


class Location(BaseModel):
    """Where a block is."""

    state: str
    tier: str | None = None


class Locations(BaseModel):
    """Where each block is, in the order asked."""

    blocks: list[Location]


class Stored(BaseModel):
    """What became of the blocks of a store: each is in exactly one of the first three."""

    stored: list[str]
    present: list[str]
    rejected: dict[str, str]
    evicted: list[str]
    waited_s: float


class Evicted(BaseModel):
    """The blocks that left."""

    evicted: list[str]


class Flushed(BaseModel):
    """Blocks that survive a power loss now, and that don't."""

    durable: int
    not_durable: int


class Queued(BaseModel):
    """How many blocks were queued for prefetch."""

    queued: int


class Cancelled(BaseModel):
    """How many blocks were taken back out of the prefetch queue."""

    cancelled: int


class TierInfo(BaseModel):
    """A tier of the service."""

    name: str
    medium: str
    num_blocks: int


class SessionInfo(BaseModel):
    """A session that was opened."""

    session: str
    ttl_s: float
    namespace: str
    block_bytes: int
    tiers: list[TierInfo]


class SlotInfo(BaseModel):
    """Where a prepared block lies in the service."""

    slot: int
    tier: str
    medium: str


class Prepared(BaseModel):
    """What to send on complete_store."""

    to_store: list[str]
    entries: list[SlotInfo]
    evicted: list[str]


class PrepareAnswer(BaseModel):
    """Slots that were reserved; `null` if there is no room."""

    prepared: Prepared | None


class RequestInfo(BaseModel):
    """A request scope that was opened."""

    request: str
    hit: int


class Plan(BaseModel):
    """How many of the hit blocks are worth loading."""

    blocks: int
    load_s: float
    compute_s: float


class Alive(BaseModel):
    """That the process answers."""

    status: str


class Readiness(BaseModel):
    """Whether the service takes work, and what each tier can do."""

    status: str
    tiers: dict[str, str]


class Stats(BaseModel):
    """Counters, as `ManagerStats`; `tiers` has those of each tier, as `TierStats`."""

    model_config = ConfigDict(extra="allow")

    hits: int
    misses: int
    tiers: dict[str, dict[str, Any]]


class Overview(BaseModel):
    """The whole service at one moment."""

    version: str
    time: float
    uptime_s: float
    draining: bool
    block_bytes: int
    stats: Stats
    namespaces: dict[str, dict[str, float | None]]
    namespaces_total: int
    latencies: dict[str, dict[str, float]]
    loop_lag: dict[str, float]
    sessions: int
    requests_total: int
