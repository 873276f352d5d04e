"""What only a GPU can tell: our own kernels, time and memory of optimizers' steps, whole training
steps, inverse roots.

    python -m benchmarks.gpu --json gpu.json                    # one GPU, at most 10 minutes
    python -m benchmarks.gpu --device cpu --dim 64 --layers 1   # tests the benchmark itself

A Llama's parameters under FSDP2 on one rank, gradients given. Steps are measured by CUDA events,
over whole periods of refreshes; memory is the peak beside parameters, gradients and state. Beside
them is what a dry run of the same step expects (see benchmarks.dry_run; a decomposition is one
kernel there, and many on a GPU). Whole steps are those of the Llama of `transformers`, of the same
sizes, where it is installed. Without a GPU it says so and does nothing.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama, roots
from benchmarks.command import console, parser_of, table
from benchmarks.dry_run import dry_run
from benchmarks.gpu_kernels import measure_kernels, measure_products
from benchmarks.gpu_steps import measure_row
from benchmarks.gpu_training import measure_training
from benchmarks.rows import Row, meta_rows, shampoo_row, torch_rows
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.runtime.choice import excluded_names
from shampoo_fsdp.tools.machine import Machine

_ROWS = "^AdamW, fused|Muon|^ours"  # decompositions of the others would take all of the time
_SECONDS = 480.0  # nothing is begun after that
_ROOT_ELEMENTS = 2**24  # of a stack, as the optimizer takes them at once
_DEFAULT = ShampooConfig()
# The rules with default settings, in the long run.
_OURS: dict[str, dict[str, Any]] = {
    f"ours: {rule}": {
        "preconditioner": rule,
        "exclude": _DEFAULT.exclude,
        "max_preconditioner_dim": _DEFAULT.max_preconditioner_dim,
        "beta3": _DEFAULT.beta3,
        "refresh_warmup_steps": 0,
    }
    for rule in ("kl_shampoo", "shampoo", "soap")
}
_OURS["ours: kl_shampoo, kernels off"] = {**_OURS["ours: kl_shampoo"], "kernels": "off"}
_COLUMNS = {
    "kernels": {
        "kernel": ("kernel", "{}"),
        "ms": ("ms", "{:.3f}"),
        "GB/s": ("gb_per_s", "{:,.0f}"),
        "TFLOP/s": ("tflops", "{:.1f}"),
        "plain PyTorch over it": ("plain", "{:.2f}"),
    },
    "steps": {
        "the optimizer's part of a step": ("row", "{}"),
        "median, ms": ("median_ms", "{:.1f}"),
        "mean": ("mean_ms", "{:.1f}"),
        "slowest": ("slowest_ms", "{:.1f}"),
        "by the model": ("model_ms", "{:.1f}"),
        "kernels": ("kernels", "{:,.0f}"),
        "by the dry run": ("dry_kernels", "{:,.0f}"),
        "peak, MB": ("peak_mb", "{:,.0f}"),
        "of the dry run": ("dry_peak_mb", "{:,.0f}"),
        "bytes of state per parameter": ("state_bytes_per_parameter", "{:.1f}"),
    },
    "training": {
        "a training step with": ("row", "{}"),
        "tokens": ("tokens", "{:,}"),
        "step, ms": ("step_ms", "{:.1f}"),
        "slowest": ("slowest_ms", "{:.1f}"),
        "of it optimizer": ("optimizer_ms", "{:.1f}"),
        "tokens per second": ("tokens_per_second", "{:,.0f}"),
        "peak, MB": ("peak_mb", "{:,.0f}"),
    },
    "roots": None,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU; there is none here.", file=sys.stderr)
        return 0
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "sizes": vars(llama.sizes_of(options)),
        "left_out": [],
        **{part: [] for part in _COLUMNS},
    }
    deadline = time.monotonic() + _SECONDS
    for part, name, measure in _measurements(options):
        if time.monotonic() > deadline:
            figures["left_out"].append(f"{name}: no time left")
            continue
        start = time.monotonic()
        try:
            figures[part] += measure()
        except Exception as error:  # trouble in one costs no other
            traceback.print_exc()
            figures["left_out"].append(f"{name}: {type(error).__name__}: {error}")
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if options.json:  # at once, so that a benchmark that is cut off keeps its figures
            Path(options.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")
    for part, columns in _COLUMNS.items():
        if figures[part]:
            console().print(table(f"{part}, on one {figures['device']}", figures[part], columns))
    for line in figures["left_out"]:
        console().print(f"Left out: {line}", markup=False)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.gpu", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    llama.add_size_arguments(parser, llama.MEASURED)
    parser.add_argument("--rows", default=_ROWS, help="regular expression: which optimizers")
    parser.add_argument("--seconds", type=float, default=15.0, help="timing of a row, about")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[16384], help="of whole training steps"
    )
    parser.add_argument("--root_sizes", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file as well")
    return parser.parse_args(arguments)


_Measurement = tuple[str, str, Callable[[], list[dict[str, Any]]]]


def _measurements(options: argparse.Namespace) -> Iterator[_Measurement]:
    """Each with the part that it belongs to, and its name."""
    sizes, device = llama.sizes_of(options), options.device
    ours = [shampoo_row(name, **settings) for name, settings in _OURS.items()]
    rows = [*torch_rows(excluded_names(_DEFAULT)), *ours, *meta_rows()]
    rows = [row for row in rows if re.search(options.rows, row.name)]
    expected: dict[str, dict[str, float]] = {}

    def measure_dry() -> list[dict[str, Any]]:
        chosen = {row.name: _OURS[row.name] for row in rows if row.name in _OURS}
        expected.update(_dry_runs(sizes, chosen))
        return []

    def measure_step(row: Row) -> list[dict[str, Any]]:
        figures = measure_row(row, sizes, device, options.seconds)
        return [_UNKNOWN | expected.get(row.name, {}) | figures]

    for n in options.root_sizes:
        yield "kernels", f"kernels on {n} x {n}", partial(measure_kernels, n, device)
        yield "kernels", f"products of {n} x {n}", partial(measure_products, n, device)
    yield "steps", "dry runs", measure_dry
    for row in rows:
        yield "steps", row.name, partial(measure_step, row)
    for tokens, row in product(options.tokens, rows):
        name = f"training with {row.name}, {tokens:,} tokens"
        yield "training", name, partial(measure_training, row, sizes, device, tokens)
    for n in options.root_sizes:
        yield "roots", f"roots of {n} x {n}", partial(_roots, n, device)


_UNKNOWN = {"dry_kernels": None, "model_ms": None, "dry_peak_mb": None}


def _dry_runs(sizes: llama.Sizes, ours: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By row what is expected of a step: kernels, milliseconds and the peak of memory."""
    if not ours:
        return {}
    # Of this one's memory on a GPU none shall be taken.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        runs = pool.submit(_run_dry, llama.specs(sizes), ours).result()
    rows = {name: {**run["total"], **run} for name, run in runs.items()}
    rows["AdamW, fused"] = next(iter(runs.values()))["AdamW"]
    return {
        name: {
            "dry_kernels": row["launches"],
            "model_ms": row["ms"],
            "dry_peak_mb": row["peak bytes"] / 1e6,
        }
        for name, row in rows.items()
    }


def _run_dry(
    specs: Sequence[ParameterSpec], ours: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    return {
        name: dry_run(specs, ShampooConfig(**settings), Machine())
        for name, settings in ours.items()
    }


def _roots(n: int, device: str) -> roots.Rows:
    """Milliseconds for a stack, and the error of a root times a gradient for each spectrum."""
    errors = {
        (spectrum, row["exponent"], row["method"]): row["effect"]
        for spectrum in roots.SPECTRA
        for row in roots.measure_errors(n, spectrum, device)
    }
    elements = _ROOT_ELEMENTS if device == "cuda" else n * n
    return [
        {key: row[key] for key in ("n", "blocks", "exponent", "method", "ms", "time / eigh")}
        | {f"effect, {s}": errors.get((s, exponent, row["method"]), "-") for s in roots.SPECTRA}
        for exponent in roots.EXPONENTS
        for row in roots.measure_cost(n, max(1, elements // n**2), exponent, device)
    ]


if __name__ == "__main__":
    sys.exit(main())
