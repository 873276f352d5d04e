"""The benchmark of GPUs, on the CPU: that it runs, and what it says where there is no GPU."""

import json

import pytest
import torch

from benchmarks import gpu
from shampoo_fsdp.rules.roots import ROOT_METHODS
from tests.benchmarks.test_benchmarks import benchmark


def test_a_tiny_model_on_the_cpu(tmp_path):
    pytest.importorskip("transformers", reason="the Llama of whole steps is theirs")
    file = tmp_path / "gpu.json"
    printed = benchmark(
        "gpu",
        *("--device", "cpu", "--dim", "64", "--layers", "1", "--ffn", "160", "--vocab", "100"),
        *("--rows", "fused|kl_shampoo$", "--seconds", "0", "--root-sizes", "24"),
        *("--tokens", "64"),
        *("--json", str(file)),
    )
    found = json.loads(file.read_text())
    assert not [line for line in found["left_out"] if not line.startswith("No rows for")]
    kernels = {row["kernel"]: row for row in found["kernels"]}
    assert all(row["ms"] > 0.0 for row in kernels.values())
    assert {"gram, [24, 24]", "bmm in TF32, [24, 24]"} < set(kernels)
    adamw, ours = found["steps"]
    assert ours["row"] == "ours: kl_shampoo" and ours["row"] in printed
    assert adamw["timed_steps"] == 1 and adamw["dry_kernels"] < 10
    assert adamw["state_bytes_per_parameter"] == pytest.approx(8.0, rel=0.05)
    assert ours["timed_steps"] == 10  # a period
    assert 0.0 < ours["median_ms"] <= ours["slowest_ms"]
    assert ours["dry_kernels"] > 100 and ours["model_ms"] > 0.0 and ours["dry_peak_mb"] > 0.0
    assert ours["kernels"] is None and ours["peak_mb"] is None
    assert [row["row"] for row in found["training"]] == [row["row"] for row in found["steps"]]
    for row in found["training"]:
        assert row["tokens"] == 64
        assert row["tokens_per_second"] * row["step_ms"] == pytest.approx(64e3)
        assert 0.0 < row["optimizer_ms"] < row["step_ms"]
    effects = {row["method"]: row["effect, condition 1e4"] for row in found["roots"]}
    assert all(0.0 < effects[method] < 0.13 for method in ROOT_METHODS)


def test_nothing_is_measured_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    said = capsys.readouterr()
    assert said.err == "benchmarks.gpu needs a CUDA GPU; there is none here.\n"
    assert said.out == ""
