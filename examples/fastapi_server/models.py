"""What goes in and out as JSON."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from kvoffload import BlockState, TierStats

MAX_HASHES = 2048
"""Blocks that one call may name; to read and answer as many holds the event loop for some ms."""

HEX = re.compile(r"(?:[0-9a-fA-F]{2})+")
EXAMPLE = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def _from_hex(value: object) -> bytes:
    if isinstance(value, bytes):
        return value  # on its way out
    if not isinstance(value, str) or not HEX.fullmatch(value):
        raise ValueError("a block hash is written in hexadecimal digits, two for each byte")
    return bytes.fromhex(value)


HashHex = Annotated[
    bytes,
    BeforeValidator(_from_hex),
    PlainSerializer(bytes.hex, return_type=str),
    WithJsonSchema({"type": "string", "pattern": f"^{HEX.pattern}$", "examples": [EXAMPLE]}),
]
"""A block hash: bytes in here, hexadecimal outside."""

Hashes = Annotated[
    list[HashHex],
    Field(max_length=MAX_HASHES, description="Blocks of one prompt, head first"),
]


class Chain(BaseModel):
    """The blocks of one prompt."""

    model_config = ConfigDict(extra="forbid")

    hashes: Hashes


class Eviction(BaseModel):
    """What to evict: these blocks, or so many of the coldest."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"hashes": [EXAMPLE]}, {"num_blocks": 100}]},
    )

    hashes: Hashes | None = None
    num_blocks: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.hashes is None) == (self.num_blocks is None):
            raise ValueError("give either hashes or num_blocks")
        return self


class ManifestEntry(BaseModel):
    """One block of a batch."""

    hash: HashHex
    size: PositiveInt = Field(description="Bytes of its payload", examples=[65536])


class Manifest(BaseModel):
    """First line of a batch; the payloads follow it, one right after the other."""

    blocks: list[ManifestEntry] = Field(max_length=MAX_HASHES)
    prefix: Hashes = Field(
        default=[], description="Blocks of the same prompt that come before these"
    )


class Stored(BaseModel):
    """What became of the blocks of an upload."""

    stored: list[HashHex]
    present: list[HashHex] = Field(description="Blocks that were there, and were left as they are")
    evicted: list[HashHex] = Field(description="Other blocks that left to make room")


class Location(BaseModel):
    """Where a block is."""

    hash: HashHex
    state: BlockState
    tier: str | None = Field(description="Highest tier that has it", examples=["hot"])


class Found(BaseModel):
    """Prefix hit of a prompt."""

    hit: int = Field(description="Leading blocks that are ready", examples=[1])
    blocks: list[Location]


class Queued(BaseModel):
    """Outcome of a prefetch hint."""

    queued: int = Field(description="Blocks that lie lower and will be brought up", examples=[3])


class Evicted(BaseModel):
    """Blocks that left; those that someone is reading stay."""

    evicted: list[HashHex]


class Health(BaseModel):
    """The whole service, all namespaces together."""

    status: Literal["ok"] = "ok"
    pinned: int = Field(description="Blocks that someone is reading", examples=[0])
    pending: int = Field(description="Blocks that are being stored", examples=[0])
    tiers: dict[str, TierStats]


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    title: str = Field(examples=["Block not found"])
    status: int = Field(examples=[404])
    detail: str
    block_hashes: list[HashHex] = Field(default=[], description="The blocks concerned")
    rejected: dict[str, str] = Field(
        default={},
        description="Blocks of an upload that were not stored, with the reason",
        examples=[{EXAMPLE: "pinned"}],
    )
