"""Steps of an optimizer on one GPU: their time, kernels and memory."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import llama
from benchmarks.measure import state_bytes
from benchmarks.rows import Row
from shampoo_fsdp.runtime.bucket import Stopwatch
from shampoo_fsdp.runtime.parameters import local_shard

_WARM_UP = 3  # the first refresh of all blocks is on the second step
_STEPS = 30  # timed, at most, or a period
_PROFILED_MS = 5000.0  # a step may have very many kernels
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


def measure_row(row: Row, sizes: llama.Sizes, device: str, seconds: float) -> dict[str, Any]:
    """Figures of an optimizer, gradients given.

    Args:
        seconds: after which no other period of refreshes is begun.
    """
    with alone(device):
        return _measure(row, sizes, device, seconds)


@contextmanager
def alone(device: str) -> Iterator[None]:
    """This process is the only rank; what it has taken on the device is free afterwards."""
    own_group = not dist.is_initialized()
    if own_group:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if own_group:
            dist.destroy_process_group()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _measure(row: Row, sizes: llama.Sizes, device: str, seconds: float) -> dict[str, Any]:
    model = llama.build(sizes, device)
    optimizers = row.build(model)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    for _ in range(_WARM_UP):
        _new_gradients(model)
        step()
    before = _allocated(device)
    times = _times(model, step, device, row.period, seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    mean = statistics.fmean(times)
    profiled = max(1, min(row.period, int(_PROFILED_MS / mean)))
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "row": row.name,
        "parameters": parameters,
        "median_ms": statistics.median(times),
        "mean_ms": mean,
        "slowest_ms": max(times),
        "timed_steps": len(times),
        "kernels": _kernels(step, profiled) if device == "cuda" else None,
        "peak_mb": (peak - before) / 1e6 if device == "cuda" else None,
        "state_bytes_per_parameter": state_bytes(optimizers) / parameters,
    }


def _new_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        local_shard(parameter.grad).normal_(std=1e-2)


def _allocated(device: str) -> int:
    """Bytes that are in use; from now on the peak is measured."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _times(
    model: nn.Module, step: Callable[[], None], device: str, period: int, seconds: float
) -> list[float]:
    """Milliseconds of each step of some whole periods."""
    times: list[float] = []
    start = time.monotonic()
    while not times or (len(times) < _STEPS and time.monotonic() - start < seconds):
        watch = Stopwatch(torch.device(device))
        watch.start()
        for k in range(period):
            _new_gradients(model)
            watch.lap("gradients")
            step()
            watch.lap(f"step {k}")
        laps = watch.milliseconds()
        times += [laps[f"step {k}"] for k in range(period)]
    return times


def _kernels(step: Callable[[], None], steps: int) -> float:
    """How many there are in a step, copies among them, as traces name them."""
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        traced.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return sum(event.get("cat") in _KERNELS for event in events) / steps
