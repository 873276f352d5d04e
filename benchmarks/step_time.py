"""The optimizer's step alone, gradients given: Shampoo beside AdamW, Muon and Meta's Shampoo.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --ranks 4 --rows 'AdamW|256' --json

A Llama's parameters under FSDP2 on forked CPU ranks (gloo, one thread each). All optimizers take
their steps in turns, in one run; a step takes as long as its slowest rank. Times are comparable
within a run only. Everything else is an exact count.
"""

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
from torch.optim import Optimizer

from benchmarks import llama
from benchmarks.command import console, parser_of, table
from benchmarks.measure import Sent, memory, state_bytes
from benchmarks.ranks import run_on_ranks
from benchmarks.rows import Row, meta_rows, our_rows, torch_rows
from shampoo_fsdp.runtime.parameters import local_shard


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("benchmarks.step_time", __doc__)
    parser.add_argument("--ranks", type=int, default=2)
    llama.add_size_arguments(parser, llama.Sizes())
    parser.add_argument("--rows", default="", help="regular expression: only rows that contain it")
    parser.add_argument("--steps", type=int, default=100, help="timed steps per row")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="end a row after that long and whole periods"
    )
    parser.add_argument("--json", action="store_true", help="figures as JSON instead of a table")
    options = parser.parse_args(arguments)
    rows = [*torch_rows(), *our_rows(), *meta_rows()]
    rows = [row for row in rows if re.search(options.rows, row.name)]
    if not rows:
        parser.error(f"--rows {options.rows!r} is in the name of no row")
    sizes = llama.sizes_of(options)
    figures = run_on_ranks(options.ranks, _measure, rows, sizes, options.steps, options.seconds)
    if options.json:
        print(json.dumps({"ranks": options.ranks, "sizes": vars(sizes), "rows": figures}, indent=2))
    else:
        console().print(table("A step", figures, _COLUMNS))


_COLUMNS = {
    "optimizer": ("row", "{}"),
    "mean, ms": ("mean_ms", "{:.1f}"),
    "slowest / median": ("slowest_to_median", "{:.2f}"),
    "MB sent": ("mb_sent_per_step", "{:.2f}"),
    "at least": ("mb_sent_per_step_least", "{:.2f}"),
    "state, bytes / parameter": ("state_bytes_per_parameter", "{:.1f}"),
    "beside it, in gradients: between steps": ("alive_buckets", "{:.2f}"),
    "at the peak": ("peak_buckets", "{:.2f}"),
}


# ------------------------------------------------------------------------------- on the ranks


class _Runner:
    """An optimizer, its model and the gradients that it is given in turns."""

    def __init__(self, row: Row, model: nn.Module, gradients: list[dict[str, Tensor]]) -> None:
        self.row = row
        self.named = dict(model.named_parameters())
        self.optimizers: list[Optimizer] = []
        self._model, self._gradients = model, gradients
        self._number = 0
        """Of the last step."""
        self.give_gradients()

    def build(self) -> Callable[[], None]:
        """Make the optimizers and return what takes a step with the given gradients."""
        self.optimizers = self.row.build(self._model)
        return self.step

    def give_gradients(self) -> None:
        for name, gradient in self._gradients[self._number % len(self._gradients)].items():
            self.named[name].grad = gradient

    def step(self) -> None:
        self._number += 1
        for optimizer in self.optimizers:
            optimizer.step()


def _measure(
    rows: Sequence[Row], sizes: llama.Sizes, steps: int, seconds: float
) -> list[dict[str, Any]]:
    """Time all rows in turns, then count what each does. The same on all ranks."""
    gradients = llama.gradient_sets(llama.build(sizes))
    runners = [_Runner(row, llama.build(sizes), gradients) for row in rows]
    figures = []
    for runner in runners:
        # Whole periods, so that the first timed step begins one; the first ends with roots.
        period = runner.row.period
        gc.collect()
        alive, peak = memory(runner.build, max(period, 2), period)
        figures.append({"row": runner.row.name, **_memory_figures(runner, alive, peak)})
    gc.collect()
    gc.disable()
    times = _times(runners, steps, seconds)
    gc.enable()
    for runner, figure, own in zip(runners, figures, times, strict=True):
        figure |= {
            "mean_ms": 1e3 * statistics.fmean(own),
            "slowest_to_median": max(own) / statistics.median(own),
            "timed_steps": len(own),
        }
        figure |= _sent_figures(runner, sizes)
    return figures


def _times(runners: Sequence[_Runner], steps: int, seconds: float) -> list[list[float]]:
    """Seconds of each timed step of each row, on its slowest rank; of whole periods."""
    times: list[list[float]] = [[] for _ in runners]
    for number in range(steps):
        if dist.get_rank() == 0 and number % 10 == 0:
            print(f"timed step {number}", file=sys.stderr, flush=True)
        for runner, own in zip(runners, times, strict=True):
            if sum(own) > seconds and len(own) % runner.row.period == 0:
                continue  # all ranks have the same times
            runner.give_gradients()
            dist.barrier()
            start = time.perf_counter()
            runner.step()
            own.append(_largest(time.perf_counter() - start))
    for runner, own in zip(runners, times, strict=True):
        del own[len(own) // runner.row.period * runner.row.period or len(own) :]
    return times


def _sent_figures(runner: _Runner, sizes: llama.Sizes) -> dict[str, Any]:
    row, sent = runner.row, Sent()
    for _ in range(row.period):
        runner.give_gradients()
        dist.barrier()
        with torch.compiler.set_stance("force_eager"), sent:
            runner.step()
    least = None
    if row.cap:
        least = llama.least_bytes(sizes, row.exclude, row.cap, dist.get_world_size()) / 1e6
    return {
        "mb_sent_per_step": _mean(sent.bytes / row.period / 1e6),
        "mb_sent_per_step_least": least,
    }


def _memory_figures(runner: _Runner, alive: int, peak: int) -> dict[str, Any]:
    parameters = runner.named.values()
    state, total = state_bytes(runner.optimizers), sum(p.numel() for p in parameters)
    # This rank's fp32 gradients of the matrices.
    gradients = sum(4 * local_shard(p).numel() for p in parameters if p.ndim == 2)
    return {
        "state_bytes_per_parameter": _mean(state) * dist.get_world_size() / total,
        "alive_buckets": _largest((alive - state) / gradients),
        "peak_buckets": _largest((peak - state) / gradients),
    }


def _largest(value: float) -> float:
    return _reduced(value, dist.ReduceOp.MAX)


def _mean(value: float) -> float:
    return _reduced(value, dist.ReduceOp.SUM) / dist.get_world_size()


def _reduced(value: float, operator: Any) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, operator)
    return float(tensor)


if __name__ == "__main__":
    main()
