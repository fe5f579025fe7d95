"""The quickstart does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_second_request_loads_what_the_first_one_computed() -> None:
    """Run it as a newcomer would."""
    script = Path(__file__).with_name("quickstart.py")
    run = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "first request: loaded 0 bytes, computed 6 blocks",
        "second request: loaded 393216 bytes, computed 0 blocks",
        "blocks are in: ['hot', 'hot', 'hot', 'hot', 'cold', 'cold']",
    ]
