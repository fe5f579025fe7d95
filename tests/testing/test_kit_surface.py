from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from blockbuster import BlockingError

import kvoffload
import kvoffload.testing


def test_all_equals_what_is_there() -> None:
    for name in kvoffload.testing.__all__:
        assert getattr(kvoffload.testing, name).__name__ == name
    assert sorted(kvoffload.testing.__all__) == list(kvoffload.testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        kvoffload.testing.Nonsense  # noqa: B018 - the access is the test


def test_the_contracts_alone_need_pytest() -> None:
    """A project on another test framework uses the clock, the tiers and the managers."""
    script = """
import sys
sys.modules.update(pytest=None, hypothesis=None, pytest_asyncio=None)
from kvoffload.testing import FaultyTier, ManualClock, cancel_everywhere, small_manager
try:
    from kvoffload.testing import ManagerContract
except ImportError as error:
    print(error.name)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout.strip()) == (0, "pytest"), run.stderr


async def test_every_asynchronous_test_runs_on_both_loops(request: pytest.FixtureRequest) -> None:
    """The hook in conftest.py does what it says, or the suite would be half as good."""
    module = type(asyncio.get_running_loop()).__module__
    assert module.startswith("uvloop" if "[uvloop" in request.node.name else "asyncio")
    assert "[uvloop" in request.node.name or "[asyncio" in request.node.name


@pytest.mark.parametrize(
    ("module", "may_block"), [("pretended.py", False), ("testing/contracts/pretended.py", True)]
)
async def test_the_library_may_not_block_the_loop(module: str, may_block: bool) -> None:
    """The fixture in conftest.py sees blocking calls from inside kvoffload, and no others."""
    [package] = kvoffload.__path__
    code = compile("import os\nos.stat('.')", f"{package}/{module}", "exec")
    if may_block:
        exec(code)
    else:
        with pytest.raises(BlockingError):
            exec(code)
