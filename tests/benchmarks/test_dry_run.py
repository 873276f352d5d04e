"""What a GPU would do on a step, counted without one."""

import json
import os
import subprocess
import sys

import pytest

import benchmarks.dry_run
from benchmarks.dry_run import dry_run, main
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded
from shampoo_fsdp.tools.machine import Machine
from tests.ranks import run_ranks


def specs(layers: int, ranks: int = 4, dim: int = 128, hidden: int = 384) -> list[ParameterSpec]:
    shapes = {"wq": (dim, dim), "w1": (hidden, dim), "w2": (dim, hidden), "norm": (dim,)}
    named = {"tok_embeddings.weight": (256, dim)}
    named |= {f"layers.{i}.{name}.weight": s for i in range(layers) for name, s in shapes.items()}
    mesh, placed = ((ranks,), (Sharded(0),)) if ranks > 1 else ((), ())
    return [
        ParameterSpec(name, shape, tuple(range(ranks)), mesh, placed)
        for name, shape in named.items()
    ]


def figures(layers: int, ranks: int = 4, **settings):
    # Its process group is the only one of a process.
    settings = {"max_preconditioner_dim": 32, "root_method": "polynomial"} | settings
    given = {"specs": specs(layers, ranks), "config": ShampooConfig(**settings)}
    return run_ranks(1, dry_run, init=False, machine=Machine(), **given)[0]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {}),
        (4, {}),
        (4, {"preconditioner": "shampoo"}),
        (4, {"preconditioner": "soap", "root_method": None}),
        (4, {"communication_dtype": "bfloat16", "momentum": 0.9}),
        (4, {"weight_decay_type": "l2", "symmetric_packing": True}),
    ],
)
def test_the_number_of_kernels_hardly_grows_with_the_layers(ranks, settings):
    """Whatever the settings. That nothing is read back, tensors without values prove."""
    few, many = (figures(layers, ranks, **settings) for layers in (4, 16))
    assert many["total"]["launches"] <= 1.3 * few["total"]["launches"]
    assert settings or many["total"]["launches"] <= 300
    assert settings or many["total"]["bf16"] > 3 * few["total"]["bf16"]


def test_llama3_8b_on_64_gpus(capsys, monkeypatch):
    main(["--model", "llama3-8b", "--mesh", "dp_shard=64", "--json", "--by-line"])
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["launches"] <= 430
    assert sum(found["parts"][part]["launches"] for part in ("exchange", "apply")) <= 30
    assert found["share"] < found["Muon's share"] < 0.021
    names = [transfer["name"] for transfer in found["timeline"]]
    assert names == ["gradients 0", "gradients 1", "updates 0", "updates 1"]
    begins = [transfer["begins"] for transfer in found["timeline"]]
    assert begins == sorted(begins)
    for kind in ("bytes", "bf16", "operands"):
        assert sum(line.get(kind, 0) for line in found["lines"]) == found["total"][kind]
    monkeypatch.setattr(benchmarks.dry_run, "dry_run_of", lambda *_, **__: found)
    sources = ["excluded.py", "adamw_masked("]
    for option, words in (("--launch=5", ["launch 5", "updates 1"]), ("--by-line", sources)):
        main(["8b-on-64", option])
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)


def test_kernels_of_a_dry_run_are_those_that_a_step_launches():
    command = [sys.executable, "-m", "tests.benchmarks.launches"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    real, dry = json.loads(done.stdout)
    assert real == dry
    assert {name for name, _, _ in real} >= {
        "_adamw_masked",
        "_momenta",
        "_product",
        "_update_factors",
    }
