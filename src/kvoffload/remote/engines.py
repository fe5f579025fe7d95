"""The engines that machines can share, by what their URLs begin with."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from ..errors import ConfigError
from .protocol import RemoteTier


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One kind of engine.

    Attributes:
        schemes: What its URLs begin with.
        module: Where its tier is, imported when it is needed: it may need an extra.
        tier: Name of its class, made as `tier(url, name=..., layout=...)`.
        form: Its URLs, for who has to write one.
    """

    schemes: tuple[str, ...]
    module: str
    tier: str
    form: str


ENGINES = (
    EngineKind(
        ("redis", "valkey", "rediss", "valkeys", "unix"),
        "valkey",
        "ValkeyTier",
        "redis:// or valkey://host:port (with TLS rediss:// or valkeys://; ?cluster=true for a "
        "cluster), unix:///path",
    ),
    EngineKind(
        ("s3", "gs", "az", "file"),
        "object_store",
        "ObjectStoreTier",
        "s3://, gs:// or az://bucket/prefix, file:///folder",
    ),
    EngineKind(
        ("mooncake", "mooncake+shm"),
        "mooncake",
        "MooncakeTier",
        "mooncake://host:port (through shared memory mooncake+shm://)",
    ),
)

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,30})://", re.IGNORECASE | re.ASCII)


def remote_tier(url: str, *, name: str = "remote", layout: str = "") -> RemoteTier:
    """Make the `RemoteTier` that a URL names, by its scheme; nothing is connected yet.

    What only one kind of engine has, its class takes: `ValkeyTier(url, pool=8)`.

    Args:
        url: `redis://`, `valkey://`, `rediss://`, `valkeys://` or `unix://` for a `ValkeyTier`,
            `s3://`, `gs://`, `az://` or `file://` for an `ObjectStoreTier`, `mooncake://` for a
            `MooncakeTier`. It may have a password, which no message and no `repr` shows.
        name: Name of the tier.
        layout: What the payloads look like; blocks of another layout are not there.

    Raises:
        ConfigError: There is no such engine, the URL is none of its, or it needs an extra.
    """
    if not isinstance(url, str):
        raise ConfigError(f"the url of a remote tier must be a str, not {type(url).__name__}")
    begin = _SCHEME.match(url)
    scheme = begin[1].lower() if begin else ""
    engine = next((engine for engine in ENGINES if scheme in engine.schemes), None)
    if engine is None:
        # What has no scheme may be anything, a password too.
        given = f"begins with {scheme}://" if scheme else "has no scheme"
        forms = "; ".join(engine.form for engine in ENGINES)
        raise ConfigError(f"the url of a remote tier must be one of {forms}; this one {given}")
    make: Callable[..., RemoteTier] = getattr(
        import_module(f"{__package__}.{engine.module}"), engine.tier
    )
    return make(url, name=name, layout=layout)
