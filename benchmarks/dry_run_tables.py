"""Dry runs of all cases, without kernels of our own and with them, and beside what was measured.

    python -m benchmarks.dry_run_tables
    python -m benchmarks.dry_run_tables --cases 8b-on-8 665m

In Markdown, as in docs/performance.md. "B/el" is bytes of device memory that are read and written
per preconditioned element of the rank, with those of excluded parameters; in brackets those of them
that are operands of PyTorch's matrix products, which hide behind FLOPs for the most part. Rates are
the default ones. What was measured is an earlier step, which the model of that time stands beside;
roots are today's beside those of that time.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import parser_of
from benchmarks.dry_run import CASES, dry_run_of
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.kernels.language import kernels
from shampoo_fsdp.rules.roots import ROOT_METHODS, inverse_root
from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import Work

__all__ = ["main"]

_OTHERS: dict[str, dict[str, Any]] = {
    "shampoo": {"preconditioner": "shampoo"},
    "soap": {"preconditioner": "soap"},
    "fp32, coupled_newton": {"matmul_precision": "highest", "root_method": "coupled_newton"},
}
_COLUMNS = "case | kernels | B/el | products, ms | all, ms | of it waiting | share | Muon's | peak"
_RESULTS = Path(__file__).with_name("results") / "h100.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print."""
    parser = parser_of("benchmarks.dry_run_tables", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    cases = parser.parse_args(arguments).cases
    _print_heads(_COLUMNS)
    for case, (title, settings) in _runs(cases):
        figures = dry_run_of(*CASES[case], ShampooConfig(**settings), Machine())
        _print_row(f"{case}{title}", *_cells(figures))
    results = json.loads(_RESULTS.read_text(encoding="utf-8"))
    print()
    _print_heads("665m as it was measured | its step alone, ms | in a training | model | off by")
    for row in results["steps"]:
        if model := row.get("model_ms"):
            alone, trained = row["median_ms"], _trained(results, row["row"])
            off = f"{model / alone - 1.0:+.0%}, {model / trained - 1.0:+.0%}"
            _print_row(row["row"], f"{alone:.1f}", f"{trained:.1f}", f"{model:.1f}", off)
    print()
    _print_heads("roots of 16 matrices of 1024 x 1024 | exponent | ms | model | off by")
    for row in results["roots"]:
        if row["method"] in ROOT_METHODS:
            _print_row(*_root_beside_measured(row))


def _trained(results: dict[str, Any], name: str) -> float:
    return next(row["optimizer_ms"] for row in results["training"] if row["row"] == name)


def _root_beside_measured(row: dict[str, Any]) -> list[str]:
    with pretended_gpu(), kernels("off"), Work(Machine()) as work:
        matrices = torch.empty(row["blocks"], row["n"], row["n"], device=CUDA)
        inverse_root(matrices, row["exponent"], 1e-12, row["method"])
    took, model = row["ms"], work.now
    numbers = (f"{took:.1f}", f"{model:.1f}", f"{model / took - 1.0:+.0%}")
    return [row["method"], f"{row['exponent']}", *numbers]


def _runs(cases: Sequence[str]) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    for case in cases:
        yield case, (", off", {"kernels": "off"})
        yield case, ("", {})
        if case == "8b-on-8":
            yield from ((case, (f", {name}", settings)) for name, settings in _OTHERS.items())


def _cells(figures: dict[str, Any]) -> list[str]:
    total, elements, machine = figures["total"], figures["elements"], Machine()
    muons = figures["Muon's share"]
    products = {kind: total.get(kind, 0) for kind in ("bf16", "tf32", "fp32")}
    return [
        f"{total['launches']:,}",
        f"{total['bytes'] / elements:.0f} ({total.get('operands', 0) / elements:.0f})",
        f"{machine.milliseconds(products):.1f}",
        f"{figures['ms']:.1f}",
        f"{figures['ms waited']:.1f}",
        f"{figures['share']:.2%}",
        f"{muons:.2%}",
        f"{figures['peak bytes'] / 2**20:,.0f} MiB",
    ]


def _print_heads(columns: str) -> None:
    heads = columns.split(" | ")
    _print_row(*heads)
    print("|" + "---|" * len(heads))


def _print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
