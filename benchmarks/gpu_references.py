"""What measurements on a GPU stand beside: dry runs of the same steps."""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

from benchmarks.dry_run import dry_run
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.tools.machine import Machine

__all__ = ["ADAMW", "dry_runs"]

ADAMW = "AdamW, fused"


def dry_runs(
    specs: Sequence[ParameterSpec], configs: Mapping[str, ShampooConfig]
) -> dict[str, dict[str, float]]:
    """By row what is expected of a step: kernels, milliseconds and the peak of memory."""
    # Of this one's memory on a GPU none shall be taken.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_dry_runs, specs, configs).result()


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
