"""A remote tier by its URL, whatever the engine."""

from __future__ import annotations

import traceback
from importlib.util import find_spec

import pytest

from kvoffload import ConfigError, RemoteTier, remote_tier
from kvoffload.remote.engines import ENGINES, EngineKind

from .servers import Server

SECRET = "Correct-Horse.Battery~Staple"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost", "<ValkeyTier 'far': localhost:6379>"),
        ("VALKEY://localhost:7000/2", "<ValkeyTier 'far': localhost:7000>"),
        ("rediss://user:secret@localhost", "<ValkeyTier 'far': localhost:6379>"),
        ("valkeys://localhost?cluster=true", "<ValkeyTier 'far': cluster at localhost:6379>"),
        ("redis://localhost?cluster=false", "<ValkeyTier 'far': localhost:6379>"),
        ("unix:///run/valkey.sock?database=2", "<ValkeyTier 'far': /run/valkey.sock>"),
    ],
)
def test_urls(url: str, shown: str) -> None:
    assert repr(remote_tier(url, name="far")) == shown


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.module)
def test_each_scheme_makes_the_tier_of_its_engine(engine: EngineKind) -> None:
    """Or says which extra it needs."""
    if find_spec(f"kvoffload.remote.{engine.module}") is None:
        pytest.skip(f"there is no {engine.tier} yet")
    for scheme in engine.schemes:
        place = "/folder" if scheme in ("unix", "file") else "host"
        try:
            tier = remote_tier(f"{scheme}://{place}", name="far", layout="model")
        except ConfigError as exc:
            if "pip install" not in str(exc):
                raise
        else:
            assert isinstance(tier, RemoteTier)
            assert (type(tier).__name__, tier.name) == (engine.tier, "far")


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://cache:6379", "this one begins with http://"),
        ("redis+cluster://cache:6379", "?cluster=true for a cluster"),
        ("cache:6379", "this one has no scheme"),
        ("/run/valkey.sock", "unix:///path"),
        ("", "redis:// or valkey://host:port (with TLS"),
        (b"redis://cache", "must be a str, not bytes"),
        ("redis://cache:port", "the port or the database is no number"),
        ("redis://cache?clutser=true", "all that can follow are ?database= and ?cluster=true"),
        ("redis://cache?cluster=yes", "cluster must be true or false"),
        ("redis://cache/3?cluster=true", "a cluster has a host, a port and one database"),
        ("unix:///run/valkey.sock?cluster=true", "a cluster has a host, a port"),
    ],
)
def test_a_url_of_no_engine(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        remote_tier(url)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{SECRET}@cache",
        f"{SECRET}@cache:6379",
        f":{SECRET}@cache",
        f"redis://:{SECRET}@cache:port",
        f"redis://:{SECRET}@cache/name",
        f"redis://:1/{SECRET}@cache",
        f"redis://user:1#{SECRET}@cache",
        f"redis://user:1?{SECRET}@cache",
        f"redis://user:1?cluster={SECRET}@cache",
        f"redis://:{SECRET}@",
        f"redis://[{SECRET}@cache",
    ],
)
def test_no_mistake_shows_the_password(url: str) -> None:
    """Also where it was not escaped, and so is no password as URLs go."""
    with pytest.raises(ConfigError) as caught:
        remote_tier(url)
    assert caught.value.__context__ is caught.value.__cause__ is None
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in repr(vars(caught.value))


async def test_one_made_of_a_url_works(server: Server) -> None:
    here, there = remote_tier(server.url, layout="a"), remote_tier(server.url, layout="b")
    for tier in (here, there):
        await tier.open()
    await here.put([b"\x01\x00key"], [memoryview(b"payload")])
    assert await here.find([b"\x01\x00key"]) == [7]
    assert await there.find([b"\x01\x00key"]) == [None]
    for tier in (here, there):
        await tier.close()
