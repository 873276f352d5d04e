"""The optimizer's step alone, gradients given: Shampoo beside AdamW, Muon and other Shampoos.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --ranks 4 --rows 'AdamW|256' --json

A Llama's parameters under FSDP2 on forked CPU ranks (gloo, one thread each). All optimizers take
their steps in turns, in one run; a step takes as long as its slowest rank. Times are comparable
within a run only. Everything but times and rates is an exact count.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from benchmarks import llama
from benchmarks.command import console, parser_of, table
from benchmarks.measure import Counts, Products, memory, state_bytes
from benchmarks.peers import peer_rows
from benchmarks.ranks import run_on_ranks
from benchmarks.rows import Row, our_rows, torch_rows
from shampoo_fsdp import Shampoo

__all__ = ["add_size_arguments", "main", "measure_rows", "sizes_of"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("benchmarks.step_time", __doc__)
    parser.add_argument("--ranks", type=int, default=2)
    add_size_arguments(parser)
    parser.add_argument("--rows", default="", help="regular expression: only rows that contain it")
    parser.add_argument("--steps", type=int, default=100, help="timed steps per row")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="end a row after that long and whole periods"
    )
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of tables")
    options = parser.parse_args(arguments)
    others, missing = peer_rows()
    rows = [r for r in torch_rows() + our_rows() + others if re.search(options.rows, r.name)]
    if not rows:
        parser.error(f"--rows {options.rows!r} is in the name of no row")
    sizes = sizes_of(options)
    figures = run_on_ranks(options.ranks, measure_rows, rows, sizes, options.steps, options.seconds)
    if options.json:
        print(json.dumps({"ranks": options.ranks, "sizes": vars(sizes), "rows": figures}, indent=2))
        return
    for title, columns in _TABLES.items():
        console().print(table(title, figures, {"optimizer": ("row", "{}")} | columns))
    for line in missing:
        print(line)


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the model."""
    for name, default in vars(llama.Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)


def sizes_of(options: argparse.Namespace) -> llama.Sizes:
    """The model that the options describe."""
    return llama.Sizes(**{name: getattr(options, name) for name in vars(llama.Sizes())})


_TABLES = {
    "Time of a step": {
        "mean, ms": ("mean_ms", "{:.1f}"),
        "to first row": ("mean_to_first_row", "{:.2f}"),
        "CPU time, ms": ("cpu_ms", "{:.1f}"),
        "median, ms": ("median_ms", "{:.1f}"),
        "plain, ms": ("plain_ms", "{:.1f}"),
        "refresh, ms": ("refresh_ms", "{:.1f}"),
        "slowest, ms": ("slowest_ms", "{:.1f}"),
        "slowest / median": ("slowest_to_median", "{:.2f}"),
        "steps": ("timed_steps", "{}"),
    },
    "What a step does, per rank": {
        "operators": ("operators_per_step", "{:,.0f}"),
        "at most": ("operators_largest", "{:,.0f}"),
        "read-backs": ("read_backs_per_step", "{:.1f}"),
        "MB sent": ("mb_sent_per_step", "{:.2f}"),
        "at least": ("mb_sent_per_step_least", "{:.2f}"),
        "GFLOP": ("gflop_per_step", "{:.2f}"),
        "without roots": ("gflop_per_step_without_roots", "{:.2f}"),
        "products' share": ("product_share", "{:.0%}"),
        "eigh/qr share": ("decomposition_share", "{:.0%}"),
    },
    "Memory per rank (beside it: in buckets, the gradients of its part of the matrices)": {
        "state, MB": ("state_mb", "{:.1f}"),
        "max / mean": ("state_max_to_mean", "{:.3f}"),
        "bytes / parameter": ("state_bytes_per_parameter", "{:.1f}"),
        "beside it, between steps": ("alive_buckets", "{:.2f}"),
        "at the peak": ("peak_buckets", "{:.2f}"),
    },
}


# ------------------------------------------------------------------------------- on the ranks


class _Runner:
    """An optimizer, its model and the gradients that it is given in turns."""

    def __init__(self, row: Row, model: nn.Module, gradients: list[dict[str, Tensor]]) -> None:
        self.row = row
        self.number = 0
        """Of the last step."""
        self._named = dict(model.named_parameters())
        self._gradients = gradients
        self._optimizers: list[Optimizer] = []
        self._model = model
        self.give_gradients()

    def build(self) -> Callable[[], None]:
        """Make the optimizers anew and return what takes a step with the given gradients."""
        self.number = 0
        self._optimizers = []
        self._optimizers = self.row.build(self._model)
        return self.step

    def give_gradients(self) -> None:
        for name, gradient in self._gradients[self.number % len(self._gradients)].items():
            self._named[name].grad = gradient

    def step(self) -> None:
        self.number += 1
        for optimizer in self._optimizers:
            optimizer.step()

    def state_bytes(self) -> int:
        return state_bytes(self._optimizers)

    def counters_on_host(self) -> list[Tensor]:
        """Counts of steps, which Shampoo keeps on the CPU on every machine."""
        states = [s for o in self._optimizers if isinstance(o, Shampoo) for s in o.state.values()]
        names = ("step", "factor_step", "refreshed")
        return [state[name] for state in states for name in names if name in state]

    def parameter_bytes(self) -> tuple[int, int]:
        """Of this rank's part of all parameters, and of the matrices."""
        sizes = [(p.ndim, 4 * _local_numel(p)) for p in self._named.values()]
        return sum(n for _, n in sizes), sum(n for ndim, n in sizes if ndim == 2)


def _local_numel(parameter: Tensor) -> int:
    """Of this rank's part."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def measure_rows(
    rows: Sequence[Row], sizes: llama.Sizes, steps: int, seconds: float
) -> list[dict[str, Any]]:
    """On each rank: time all rows in turns, then count what each does. The same on all ranks."""
    gradients = {
        sharded: llama.gradient_sets(llama.build(sizes, sharded=sharded))
        for sharded in sorted({row.sharded for row in rows})
    }
    runners = [
        _Runner(row, llama.build(sizes, sharded=row.sharded), gradients[row.sharded])
        for row in rows
    ]
    figures = []
    for runner in runners:
        _say(f"memory: {runner.row.name}")
        # Whole periods, so that the first timed step begins one; the first ends with roots.
        period = runner.row.period
        gc.collect()
        alive, peak = memory(runner.build, max(period, 2), period)
        figures.append(_memory_figures(runner, alive, peak))
    gc.collect()
    gc.disable()
    _say("timing all")
    times = _times(runners, steps, seconds)
    gc.enable()
    for runner, figure, own in zip(runners, figures, times, strict=True):
        _say(f"counting: {runner.row.name}")
        figure |= _time_figures(runner.row, own, times[0])
        figure |= _count_figures(runner, sizes, figure["mean_ms"])
    return figures


def _times(
    runners: Sequence[_Runner], steps: int, seconds: float
) -> list[list[tuple[float, float]]]:
    """Seconds, of the clock and of the processor, of each timed step of each row, on its slowest
    rank; the first timed step begins a period."""
    times: list[list[tuple[float, float]]] = [[] for _ in runners]
    for _ in range(steps):
        for runner, own in zip(runners, times, strict=True):
            if sum(clock for clock, _ in own) > seconds and len(own) % runner.row.period == 0:
                continue  # all ranks have the same times
            runner.give_gradients()
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            runner.step()
            elapsed = torch.tensor(
                [time.perf_counter() - start, time.process_time() - start_cpu],
                dtype=torch.float64,
            )
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            own.append((elapsed[0].item(), elapsed[1].item()))
    return times


def _time_figures(
    row: Row, own: list[tuple[float, float]], first: list[tuple[float, float]]
) -> dict[str, Any]:
    periods = len(own) // row.period * row.period or len(own)
    whole = [clock for clock, _ in own[:periods]]
    refreshed = [t for i, t in enumerate(whole, 1) if row.together and i % row.period == 0]
    plain = [t for i, t in enumerate(whole, 1) if row.together and i % row.period]
    median = statistics.median(whole)
    return {
        "mean_ms": 1e3 * statistics.fmean(whole),
        "median_ms": 1e3 * median,
        "plain_ms": 1e3 * statistics.median(plain) if plain else None,
        "refresh_ms": 1e3 * statistics.median(refreshed) if refreshed else None,
        "slowest_ms": 1e3 * max(whole),
        "slowest_to_median": max(whole) / median,
        "mean_to_first_row": statistics.fmean(whole)
        / statistics.fmean(clock for clock, _ in first[:periods]),
        "cpu_ms": 1e3 * statistics.fmean(cpu for _, cpu in own[:periods]),
        "timed_steps": len(whole),
    }


def _count_figures(runner: _Runner, sizes: llama.Sizes, mean_ms: float) -> dict[str, Any]:
    operators, period, ranks = [], runner.row.period, dist.get_world_size()
    counts, products = Counts(runner.counters_on_host()), Products()
    for _ in range(period):
        runner.give_gradients()
        before = counts.operators
        dist.barrier()
        # Counting is no part of compiled code: the operators are those before they were fused.
        with torch.compiler.set_stance("force_eager"), products, counts:
            runner.step()
        operators.append(counts.operators - before)
    needed, least = None, None
    if runner.row.preconditioner is not None:
        shapes = llama.matrix_shapes(sizes, runner.row.exclude)
        flops = llama.block_flops(shapes, runner.row.cap, runner.row.preconditioner)
        needed = flops / ranks / 1e9
        least = llama.least_bytes(shapes, runner.row.cap, ranks) / 1e6
    return {
        "operators_per_step": _largest(statistics.fmean(operators)),
        "operators_largest": _largest(max(operators)),
        "read_backs_per_step": _largest(counts.read_backs / period),
        "mb_sent_per_step": _mean(counts.bytes_sent / period / 1e6),
        "mb_sent_per_step_least": least,
        "gflop_per_step": _mean(products.flops / period / 1e9),
        "gflop_per_step_without_roots": needed,
        "product_share": _mean(1e3 * products.seconds / period / mean_ms),
        "decomposition_share": _mean(1e3 * products.decomposition_seconds / period / mean_ms),
    }


def _memory_figures(runner: _Runner, alive: int, peak: int) -> dict[str, Any]:
    state = runner.state_bytes()
    local, bucket = runner.parameter_bytes()
    total = sum(p.numel() for p in runner._named.values())
    return {
        "row": runner.row.name,
        "state_bytes_per_parameter": _mean(float(state)) * dist.get_world_size() / total,
        "state_max_to_mean": _largest(float(state)) / max(_mean(float(state)), 1.0),
        "state_mb": _mean(state / 1e6),
        "parameter_mb": local / 1e6,
        # What a bucket is: this rank's fp32 gradients of the preconditioned parameters.
        "alive_buckets": _largest((alive - state) / bucket),
        "peak_buckets": _largest((peak - state) / bucket),
    }


def _say(what: str) -> None:
    if dist.get_rank() == 0:
        print(what, file=sys.stderr, flush=True)


def _largest(value: float) -> float:
    return _reduced(value, dist.ReduceOp.MAX)


def _mean(value: float) -> float:
    return _reduced(value, dist.ReduceOp.SUM) / dist.get_world_size()


def _reduced(value: float, operator: Any) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(tensor, operator)
    return float(tensor)


if __name__ == "__main__":
    main()
