"""Dry runs of all cases, without kernels of our own and with them, and beside what was measured.

    python -m benchmarks.dry_run_tables
    python -m benchmarks.dry_run_tables --cases 8b-on-8 665m

In Markdown, as in docs/performance.md. Rates are the default ones. What was measured is an earlier
step, which the model of that time stands beside; roots are today's beside those of that time.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import markdown_table, parser_of
from benchmarks.dry_run import CASES, dry_run_of
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.kernels.language import kernels
from shampoo_fsdp.rules.roots import ROOT_METHODS, inverse_root
from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import Work

_OTHERS: dict[str, dict[str, Any]] = {
    "shampoo": {"preconditioner": "shampoo"},
    "soap": {"preconditioner": "soap"},
    "fp32, coupled_newton": {"matmul_precision": "highest", "root_method": "coupled_newton"},
}
_COLUMNS = "case", "kernels", "all, ms", "of it waiting", "share", "Muon's", "peak"
_RESULTS = Path(__file__).with_name("results") / "h100.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print."""
    parser = parser_of("benchmarks.dry_run_tables", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    print(markdown_table(_COLUMNS, _cases(parser.parse_args(arguments).cases)))
    results = json.loads(_RESULTS.read_text(encoding="utf-8"))
    heads = "665m as it was measured", "its step alone, ms", "in a training", "model", "off by"
    print("\n" + markdown_table(heads, _steps_beside_measured(results)))
    heads = "roots of 16 matrices of 1024 x 1024", "exponent", "ms", "model", "off by"
    roots = [row for row in results["roots"] if row["method"] in ROOT_METHODS]
    print("\n" + markdown_table(heads, map(_root_beside_measured, roots)))


def _cases(cases: Sequence[str]) -> Iterator[list[str]]:
    for case in cases:
        settings = {", off": {"kernels": "off"}, "": {}}
        if case == "8b-on-8":
            settings |= {f", {name}": others for name, others in _OTHERS.items()}
        for title, chosen in settings.items():
            found = dry_run_of(*CASES[case], ShampooConfig(**chosen), Machine())
            times = (f"{found[name]:.1f}" for name in ("ms", "ms waited"))
            shares = (f"{found[name]:.2%}" for name in ("share", "Muon's share"))
            peak = f"{found['peak bytes'] / 2**20:,.0f} MiB"
            yield [f"{case}{title}", f"{found['total']['launches']:,}", *times, *shares, peak]


def _steps_beside_measured(results: dict[str, Any]) -> Iterator[list[str]]:
    trained = {row["row"]: row["optimizer_ms"] for row in results["training"]}
    for row in results["steps"]:
        if model := row.get("model_ms"):
            times = row["median_ms"], trained[row["row"]]
            off = ", ".join(f"{model / took - 1.0:+.0%}" for took in times)
            yield [row["row"], *(f"{took:.1f}" for took in (*times, model)), off]


def _root_beside_measured(row: dict[str, Any]) -> list[str]:
    with pretended_gpu(), kernels("off"), Work(Machine()) as work:
        matrices = torch.empty(row["blocks"], row["n"], row["n"], device=CUDA)
        inverse_root(matrices, row["exponent"], 1e-12, row["method"])
    took, model = row["ms"], work.now
    numbers = (f"{took:.1f}", f"{model:.1f}", f"{model / took - 1.0:+.0%}")
    return [row["method"], f"{row['exponent']}", *numbers]


if __name__ == "__main__":
    sys.exit(main())
