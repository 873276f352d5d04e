"""What a GPU would do on a step, counted without one."""

import json
import os
import subprocess
import sys

import pytest

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
    (found,) = run_ranks(
        1,
        dry_run,
        init=False,
        specs=specs(layers, ranks),
        config=ShampooConfig(**settings),
        machine=Machine(),
    )
    return found


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_number_of_kernels_hardly_grows_with_the_layers(ranks):
    few, many = (figures(layers, ranks) for layers in (4, 16))
    assert many["total"]["launches"] <= 1.3 * few["total"]["launches"]
    assert many["total"]["launches"] <= 300
    assert many["total"]["bf16"] > 3 * few["total"]["bf16"]


@pytest.mark.parametrize(
    "settings",
    [
        {"preconditioner": "shampoo"},
        {"preconditioner": "soap", "root_method": None},
        {"communication_dtype": "bfloat16", "momentum": 0.9},
        {"weight_decay_type": "l2", "symmetric_packing": True},
    ],
)
def test_no_setting_makes_kernels_of_pieces(settings):
    """That nothing is read back, tensors without values prove."""
    few, many = (figures(layers, **settings) for layers in (4, 16))
    assert many["total"]["launches"] <= 1.3 * few["total"]["launches"]


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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--launch=5", ["launch 5", "updates 1", "Muon"]),
        ("--by-line", ["excluded.py", "adamw_masked("]),  # lines with their source
    ],
)
def test_what_is_printed(capsys, option, words):
    main(["8b-on-64", option])
    printed = capsys.readouterr().out
    assert [word for word in words if word not in printed] == []


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
