"""What `plan` says of the time of a step."""

import dataclasses

import pytest
from rich.console import Console

from benchmarks.dry_run import dry_run
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded
from shampoo_fsdp.tools.dry_step import model_step
from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.plan_figures import JobPlan
from shampoo_fsdp.tools.plan_report import print_plan
from tests.ranks import run_ranks

CONFIG = ShampooConfig(
    max_preconditioner_dim=64, root_method="polynomial", precondition_frequency=4
)
MACHINE = Machine()


def specs(first: int, ranks: tuple[int, ...], rows: int = 128) -> list[ParameterSpec]:
    mesh, placed = (len(ranks),), (Sharded(0),)
    shapes = {"wq.weight": (rows, rows), "norm.weight": (rows,)}
    return [
        ParameterSpec(f"layers.{layer}.{name}", shape, ranks, mesh, placed)
        for layer in range(first, first + 4)
        for name, shape in shapes.items()
    ]


def modelled(models, machine: Machine = MACHINE) -> dict:
    job = JobPlan("a model", models, CONFIG)
    # A process group is of the whole process.
    (step,) = run_ranks(1, model_step, init=False, job=job, machine=machine)
    return step


def test_it_is_the_step_of_the_dry_run():
    models = [specs(0, (0, 1, 2, 3))]
    step = modelled(models)
    arguments = {"specs": models[0], "config": CONFIG, "machine": MACHINE, "rank": step["rank"]}
    (run,) = run_ranks(1, dry_run, init=False, **arguments)
    assert step["share"] == pytest.approx(run["share"])
    assert step["kernels"] == run["total"]["launches"]
    assert step["peak_bytes"] == run["peak bytes"]


def test_two_parts_of_a_pipeline_on_one_rank_take_the_time_of_both():
    one, other = specs(0, (0, 1)), specs(4, (2, 3))
    alone = modelled([one])
    both = modelled([one, specs(8, (0, 1)), other])
    assert both["kernels"] == 2 * alone["kernels"]
    assert both["ms"] == pytest.approx(2 * alone["ms"])
    assert both["training_ms"] == pytest.approx(3 * alone["training_ms"])


def test_experts_that_a_token_does_not_use_make_the_share_larger():
    models = [specs(0, (0, 1))]
    quarter = modelled(models, dataclasses.replace(MACHINE, active=0.25))
    assert quarter["share"] == pytest.approx(4 * modelled(models)["share"])


def printed(models, **step) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        print_plan(JobPlan("a model", models, CONFIG).figures | step, console)
    return " ".join(capture.get().split())


def test_what_is_printed_of_it():
    models = [specs(0, (0, 1))]
    step = modelled(models)
    text = printed(models, step=step)
    assert f"{step['share']:.2%}" in text and f"{step['share'] / 2:.2%} with twice" in text
    less = (step["ms"] - step["parts"]["roots"] / 2) / step["training_ms"]
    assert f"{less:.2%} with precondition_frequency = 8" in text
    assert "tokens 8,192" in text
