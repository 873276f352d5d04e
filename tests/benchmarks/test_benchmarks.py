"""The benchmarks on tiny models: that they run and what they count, not how fast anything is.

Their ranks are forked, so each that has some runs in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import step_time
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

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
    assert adamw["mean_to_first_row"] == 1.0
    assert adamw["state_bytes_per_parameter"] == pytest.approx(8.0, rel=0.05)
    assert adamw["alive_buckets"] == adamw["mb_sent_per_step"] == 0.0
    for row in (spread, every):
        assert row["timed_steps"] == 10
        # Streaks of bad gradients, every ten steps: what set out for the host ten steps before.
        assert row["read_backs_per_step"] <= 0.1
        assert row["mb_sent_per_step"] >= row["mb_sent_per_step_least"] > 0.0
        assert row["gflop_per_step"] >= row["gflop_per_step_without_roots"] > 0.0
        assert row["peak_buckets"] >= row["alive_buckets"] >= 0.0
        assert row["state_bytes_per_parameter"] > adamw["state_bytes_per_parameter"]
    assert every["operators_per_step"] > spread["operators_per_step"]


@pytest.mark.skipif(JOBS_ARE_FUNCTIONS, reason="it trains models of TorchTitan 0.2")
def test_train_overhead_compares_whole_steps():
    found = json.loads(
        benchmark(
            "train_overhead",
            *("--dim", "64", "--layers", "1", "--vocab", "64", "--tokens", "256"),
            *("--frequency", "2", "--cap", "64", "--preconditioner", "shampoo", "--json"),
        )
    )
    adamw, shampoo = found["rows"]
    assert adamw["over_adamw"] == adamw["over_adamw_pooled"] == adamw["predicted"] == 1.0
    assert shampoo["optimizer_ms"] < shampoo["step_ms"]
    # Four matrices of 64 x 64 and three of 64 x 192 in blocks of 64: 4 m n (m + n) each, over six
    # times the parameters (with embeddings, output layer and norms) and tokens.
    products = 4 * 64 * 64 * 128 * (4 + 3 * 3)
    parameters = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64 * 64 + 3 * 64
    assert shampoo["predicted"] == pytest.approx(1 + products / (6 * parameters * 2 * 256))


def test_growth_measures_each_axis(tmp_path):
    pytest.importorskip("matplotlib")
    plot, figures = tmp_path / "growth.png", tmp_path / "growth.json"
    benchmark(
        "growth",
        *_TINY,
        *("--axes", "layers", "--values", "2", "--plot", str(plot), "--json", str(figures)),
    )
    one, two = json.loads(figures.read_text())
    assert (one["axis"], one["value"], two["value"]) == ("layers", 1, 2)
    assert two["operators_per_step"] <= 1.2 * one["operators_per_step"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_row_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        step_time.main(["--rows", "no such optimizer"])
    assert end.value.code == 2
    assert "'no such optimizer' is in the name of no row" in capsys.readouterr().err
