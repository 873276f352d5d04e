"""What only a GPU can tell: time, kernels and memory of optimizers' steps, whole training steps,
inverse roots.

    python -m benchmarks.gpu --json gpu.json                    # one GPU, at most 10 minutes
    python -m benchmarks.gpu --device cpu --dim 64 --layers 1   # tests the benchmark itself

A Llama's parameters under FSDP2 on one rank, gradients given. Steps are measured by CUDA events,
over whole periods of refreshes; memory is the peak beside parameters, gradients and state. Beside
them is what a dry run of the same step expects (see benchmarks.dry_run; a decomposition is one
kernel there, and many on a GPU). Whole steps are those of the Llama of `transformers`, of the same
sizes, where it is installed. Without a GPU it says so and does nothing.
"""

import argparse
import importlib.util
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama, roots
from benchmarks.command import console, parser_of, table
from benchmarks.gpu_references import dry_runs
from benchmarks.gpu_steps import measure_row
from benchmarks.gpu_training import measure_training
from benchmarks.peers import peer_rows
from benchmarks.rows import Row, shampoo_row, torch_rows
from benchmarks.step_time import add_size_arguments, sizes_of
from shampoo_fsdp import ShampooConfig

__all__ = ["main"]

_SIZES = llama.Sizes(dim=1536, layers=20, ffn=4096, vocab=32000)  # 665 M parameters
_ROWS = "^AdamW, fused|Muon|^ours"  # decompositions of the others would take all of the time
_ROOT_ELEMENTS = 2**24  # of a stack, as the optimizer takes them at once
_SPECTRA = ("condition 1e4", "condition 1e12")
_COLUMNS_OF_TRAINING = {
    "optimizer": ("row", "{}"),
    "tokens": ("tokens", "{:,}"),
    "step, ms": ("step_ms", "{:.1f}"),
    "slowest": ("slowest_ms", "{:.1f}"),
    "of it optimizer": ("optimizer_ms", "{:.1f}"),
    "tokens per second": ("tokens_per_second", "{:,.0f}"),
    "peak, MB": ("peak_mb", "{:,.0f}"),
}
_COLUMNS = {
    "optimizer": ("row", "{}"),
    "median, ms": ("median_ms", "{:.1f}"),
    "mean": ("mean_ms", "{:.1f}"),
    "slowest": ("slowest_ms", "{:.1f}"),
    "by the model": ("model_ms", "{:.1f}"),
    "kernels": ("kernels", "{:,.0f}"),
    "by the dry run": ("dry_kernels", "{:,.0f}"),
    "peak, MB": ("peak_mb", "{:,.0f}"),
    "of the dry run": ("dry_peak_mb", "{:,.0f}"),
    "bytes of state per parameter": ("state_bytes_per_parameter", "{:.1f}"),
}


@dataclass
class _Session:
    """What has been measured, and how much time is left; trouble in one part costs no other."""

    deadline: float
    figures: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def measure(self, name: str, measurement: Callable[..., Any], *arguments: Any) -> Any:
        """The measurement, or None where it fails or time is over."""
        if time.monotonic() > self.deadline:
            self.left_out.append(f"{name}: no time left")
            return None
        print(name, end="", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            return measurement(*arguments)
        except Exception as error:
            traceback.print_exc()
            self.left_out.append(f"{name}: {type(error).__name__}: {error}")
            return None
        finally:
            print(f": {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU; there is none here.", file=sys.stderr)
        return 0
    session = _Session(time.monotonic() + 60.0 * options.minutes)
    session.figures = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "sizes": vars(sizes_of(options)),
    }
    session.figures["left_out"] = session.left_out
    of_device = f"on one {session.figures['device']}"
    parts = {
        "steps": (_measure_steps, "The optimizer's part of a step", _COLUMNS),
        "training": (_measure_training, "Training steps", _COLUMNS_OF_TRAINING),
        "roots": (_measure_roots, "Inverse roots", None),
    }
    for name, (measure, title, columns) in parts.items():
        found = session.figures[name] = measure(session, options)
        if options.json:  # at once, so that a benchmark that is cut off keeps its figures
            Path(options.json).write_text(json.dumps(session.figures, indent=2), encoding="utf-8")
        if found:
            console().print(table(title, found, columns), f"({of_device})\n")
    for line in session.left_out:
        console().print(f"Left out: {line}", markup=False)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.gpu", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    add_size_arguments(parser)
    parser.set_defaults(**vars(_SIZES))
    parser.add_argument("--rows", default=_ROWS, help="regular expression: which optimizers")
    parser.add_argument("--seconds", type=float, default=15.0, help="timing of a row, about")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[16384], help="of whole training steps"
    )
    parser.add_argument("--root-sizes", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun after that")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file as well")
    return parser.parse_args(arguments)


def _our_rows() -> dict[str, tuple[Row, ShampooConfig]]:
    """The rules with default settings, in the long run, by name."""
    rows = {}
    default = ShampooConfig()
    common = {
        "exclude": default.exclude,
        "max_preconditioner_dim": default.max_preconditioner_dim,
        "beta3": default.beta3,
        "refresh_warmup_steps": 0,
    }
    for rule in ("kl_shampoo", "shampoo", "soap"):
        settings = common | {"preconditioner": rule}
        name = f"ours: {rule}"
        rows[name] = shampoo_row(name, **settings), ShampooConfig(**settings)
    return rows


def _measure_steps(session: _Session, options: argparse.Namespace) -> list[dict[str, Any]]:
    ours = _our_rows()
    others, missing = peer_rows()
    session.left_out += missing
    rows = [*_torch_rows(), *(row for row, _ in ours.values()), *others]
    sizes = sizes_of(options)
    configs = {name: config for name, (_, config) in ours.items()}
    expected = session.measure("dry runs", dry_runs, llama.specs(sizes), configs) or {}
    found = []
    for row in rows:
        if not re.search(options.rows, row.name):
            continue
        figures = session.measure(
            row.name, measure_row, row, sizes, options.device, options.seconds
        )
        if figures is not None:
            of_model = expected.get(row.name, {})
            figures["model_ms"] = of_model.get("model_ms")
            figures["dry_kernels"] = of_model.get("kernels")
            figures["dry_peak_mb"] = of_model.get("peak_mb")
            found.append(figures)
    return found


def _torch_rows() -> list[Row]:
    return torch_rows(ShampooConfig().excluded_names)


def _measure_training(session: _Session, options: argparse.Namespace) -> list[dict[str, Any]]:
    if importlib.util.find_spec("transformers") is None:
        session.left_out.append("training: there is no `transformers`, whose Llama is trained")
        return []
    rows = [*(row for row, _ in _our_rows().values()), *_torch_rows()]
    found = []
    for tokens in options.tokens:
        for row in rows:
            if re.search(options.rows, row.name):
                name = f"training with {row.name}, {tokens:,} tokens"
                arguments = row, sizes_of(options), options.device, tokens
                if figures := session.measure(name, measure_training, *arguments):
                    found.append(figures)
    return found


def _measure_roots(session: _Session, options: argparse.Namespace) -> roots.Rows:
    found: roots.Rows = []
    for n in options.root_sizes:
        found += session.measure(f"roots of {n} x {n}", _roots, n, options.device) or []
    return found


def _roots(n: int, device: str) -> roots.Rows:
    """Milliseconds for a stack, and the error of a root times a gradient for each spectrum."""
    exponents = (-0.25, -0.5)
    errors = {
        (spectrum, row["exponent"], row["method"]): row["effect"]
        for spectrum in _SPECTRA
        for row in roots.measure_errors(n, spectrum, exponents, device)
    }
    elements = _ROOT_ELEMENTS if device == "cuda" else n * n
    return [
        {key: row[key] for key in ("n", "blocks", "exponent", "method", "ms", "time / eigh")}
        | {f"effect, {s}": errors.get((s, exponent, row["method"]), "-") for s in _SPECTRA}
        for exponent in exponents
        for row in roots.measure_cost(n, max(1, elements // n**2), exponent, device)
    ]


if __name__ == "__main__":
    sys.exit(main())
