"""The demo's table is right, and it notices an answer that is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from examples.smollm.demo import ANSWER_TOKENS, ROOT, Case, table_of, wrong_cases
from examples.smollm.tiny import write_tiny

CASES = [
    Case("recompute", 0, 2.0, 1000, {}, 0, 1000, [1, 2], "a"),
    Case("cold", 0, 0.1, 1000, {"hot": 32, "cold": 960}, 45_000_000, 8, [1, 2], "a"),
    Case("shared", 1, 0.2, 1010, {"cold": 960}, 45_000_000, 50, [3, 4], "b"),
    Case("recompute, other question", 1, 2.0, 1010, {}, 0, 1010, [3, 4], "b"),
]


def test_a_row_for_each_case() -> None:
    """Beside recomputing of the same question."""
    rows = table_of(CASES).splitlines()
    assert len(rows) == 5
    assert rows[2].split() == [
        *("cold", "100", "ms", "0.050", "992", "tokens", "8", "tokens", "45.0", "MB"),
        *("hot,", "cold"),
    ]


def test_other_tokens_or_logits_are_noticed() -> None:
    """Each is compared with recomputing the same question."""
    assert wrong_cases(CASES) == []
    changed = [CASES[0], replace(CASES[1], logits="c"), replace(CASES[2], answer=[3]), CASES[3]]
    assert wrong_cases(changed) == ["cold", "shared"]


def test_it_runs(tmp_path: Path) -> None:
    """In two processes, over a model of no sense; the picture is drawn."""
    weights = {"SMOLLM_GGUF": str(write_tiny(tmp_path / "tiny.gguf"))}
    command = [sys.executable, "-W", "error", "-m", "examples.smollm.demo"]
    done = subprocess.run(
        [*command, "--picture", tmp_path / "demo.png"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | weights,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert rows["hot"].endswith("MB  hot")
    for name in ("cold", "restarted"):
        assert rows[name].endswith("MB  cold")
    assert re.search(r"MB  (hot, )?cold$", rows["shared system prompt"])
    assert f"All answers ({ANSWER_TOKENS} tokens, greedy)" in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
