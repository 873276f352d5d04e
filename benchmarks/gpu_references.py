"""What measurements on a GPU stand beside: dry runs of the same steps, and losses of CPUs."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from benchmarks.dry_run import dry_run
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.tools.machine import Machine
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

__all__ = ["ADAMW", "dry_runs", "study_losses"]

ADAMW = "AdamW, fused"
_VARIANT = "GPU default, emulated"  # of studies.arithmetic

T = TypeVar("T")


def dry_runs(
    specs: Sequence[ParameterSpec], configs: Mapping[str, ShampooConfig]
) -> dict[str, dict[str, float]]:
    """By row what is expected of a step: kernels, milliseconds and the peak of memory."""
    # Of this one's memory on a GPU none shall be taken.
    return _in_own_process(_dry_runs, specs, configs)


def _dry_runs(
    specs: Sequence[ParameterSpec], configs: Mapping[str, ShampooConfig]
) -> dict[str, dict[str, float]]:
    found = {}
    for name, config in configs.items():
        figures = dry_run(specs, config, Machine())
        found[ADAMW] = _expected(figures["AdamW"]["launches"], figures["AdamW"])
        found[name] = _expected(figures["total"]["launches"], figures)
    return found


def _expected(launches: float, figures: Mapping[str, float]) -> dict[str, float]:
    return {
        "kernels": launches,
        "model_ms": figures["ms"],
        "peak_mb": figures["peak bytes"] / 1e6,
    }


def study_losses(steps: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Of the study's 1M model trained here, and of the same job on CPUs, in the precision of a
    GPU's units. Weights are drawn on the device, so that each device has its own."""
    return [_in_own_process(_study_loss, steps, seed) for seed in seeds]


def _study_loss(steps: int, seed: int) -> dict[str, Any]:
    if JOBS_ARE_FUNCTIONS:
        raise RuntimeError("the study trains models of TorchTitan 0.2")
    from studies import arithmetic  # what it imports sets torch up for TorchTitan
    from studies.pretrain.job import run
    from studies.pretrain.results import Results

    job = arithmetic.job(_VARIANT, steps, seed)
    record = run(job.settings)
    files = sorted(arithmetic._RESULTS.glob("*.jsonl"))
    known = [loss for file in files if (loss := Results(file).loss(job)) is not None]
    return {
        "seed": seed,
        "steps": steps,
        "device": record["device"],
        "loss": record["loss"][-1],
        "losses_of_cpus": known,
        "seconds": record["seconds"][-1],
    }


def _in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    # With a process group of its own, and what it does to torch's settings.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
