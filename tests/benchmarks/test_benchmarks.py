"""The benchmarks on tiny models: that they run and what they count, not how fast anything is.

Their ranks are forked, so each that has some runs in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import step_time

_ROOT = Path(__file__).resolve().parents[2]
_TINY = ("--dim", "16", "--ffn", "40", "--vocab", "24", "--layers", "1")


def benchmark(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_step_time_counts_what_rows_do():
    rows = "fused|^Shampoo (256, every 10$|256, every step)"
    found = json.loads(benchmark("step_time", *_TINY, "--steps", "10", "--rows", rows, "--json"))
    adamw, spread, every = found["rows"]
    assert [row["row"] for row in found["rows"]] == [
        "AdamW, fused",
        "Shampoo 256, every 10",
        "Shampoo 256, every step",
    ]
    assert adamw["state_bytes_per_parameter"] == pytest.approx(8.0, rel=0.05)
    assert adamw["alive_buckets"] == adamw["mb_sent_per_step"] == 0.0
    for row in (spread, every):
        assert row["timed_steps"] == 10
        assert row["mb_sent_per_step"] >= row["mb_sent_per_step_least"] > 0.0
        assert row["peak_buckets"] >= row["alive_buckets"] >= 0.0
        assert row["state_bytes_per_parameter"] > adamw["state_bytes_per_parameter"]


def test_a_row_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        step_time.main(["--rows", "no such optimizer"])
    assert end.value.code == 2
    assert "'no such optimizer' is in the name of no row" in capsys.readouterr().err
