"""What blocks between heads do to the loss, with wq, wk and wv fused as in TorchTitan 0.3, or not.

    python -m studies.heads run --size 1M --steps 120 240     # a killed study goes on where it was
    python -m studies.heads report

Small Llamas with grouped queries, KL-Shampoo, for each seed the same weights and batches; loss on
65,536 bytes of files that nothing is trained on.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import markdown_table, parser_of
from studies.pretrain.results import Results, Run, complete

_RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
_SEEDS = (1, 2, 3)
_HEAD = 32
# Two heads' queries for each head of keys and values, three for 3M.
_SIZES: dict[str, dict[str, int]] = {
    "1M": {"dim": 128, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32},
    "3M": {"dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 32},
}


def _group(sizes: dict[str, int]) -> int:
    """Rows of a head of keys and values with its queries, as they lie in a fused matrix."""
    return _HEAD * (sizes["n_heads"] // sizes["n_kv_heads"] + 2)


VARIANTS = {
    "separate": (False, None),
    "fused": (True, None),
    "fused, a group": (True, "group"),
    "fused, a head": (True, "head"),
    "fused, a head with both factors": (True, "whole head"),
}
"""Whether wq, wk and wv are one matrix, and what shares a block. (Cut at each head, those that are
separate have the same blocks as fused ones, and the same losses. "Both factors" differ for 3M only,
whose matrices are six times as wide as a head: above 4 there is no factor for that side.)"""


def run_of(size: str, variant: str, steps: int, seed: int) -> Run:
    """A training of a variant."""
    fused, cut = VARIANTS[variant]
    sizes, shampoo = _SIZES[size], dict[str, Any](matmul_precision="medium")
    if cut is not None:
        shampoo["split_heads"] = [r"\.wqkv\."]
        shampoo["head_dim"] = _group(sizes) if cut == "group" else _HEAD
    if cut == "whole head":
        shampoo["max_factor_ratio"] = 8.0
    settings = {
        "model": {**sizes, "fuse_qkv": fused},
        "steps": steps,
        "lr": 1.6e-2 if steps <= 480 else 8e-3,
        "seed": seed,
        "shampoo": shampoo,
    }
    return Run(size=size, contestant=variant, stage=f"{steps} steps", settings=settings)


def markdown(results: Results, lengths: list[int]) -> str:
    """Means of the seeds, and how far they are from that of the matrices that are not cut."""
    columns = [(size, steps) for size in _SIZES for steps in lengths]
    found = {
        (variant, *column): losses
        for variant in VARIANTS
        for column in columns
        if (losses := _losses(results, variant, *column))
    }
    columns = [c for c in columns if any((variant, *c) in found for variant in VARIANTS)]
    heads = [f"{size}, {steps} steps" for size, steps in columns]
    rows = []
    for variant in VARIANTS:
        cells = [_cell(found.get((variant, *c)), found.get(("separate", *c))) for c in columns]
        rows.append([variant, *cells])
    return markdown_table(["wq, wk, wv", *heads], rows)


def _losses(results: Results, variant: str, size: str, steps: int) -> list[float]:
    found = [results.loss(run_of(size, variant, steps, seed)) for seed in _SEEDS]
    return [loss for loss in found if loss is not None]


def _cell(losses: list[float] | None, separate: list[float] | None) -> str:
    if losses is None:
        return "-"
    text = f"{statistics.fmean(losses):.4f}"
    if separate is None or len(separate) != len(losses):
        return text
    over = [loss - other for loss, other in zip(losses, separate, strict=True)]
    return f"{text} ({', '.join(f'{x:+.3f}' for x in over)})" if any(over) else text


def draw(results: Results, path: Path) -> None:
    """The loss of each variant above that of separate matrices, along a training."""
    from studies import plots

    settings = sorted({(record["size"], record["settings"]["steps"]) for record in results})
    figure, axes = plots.panels(len(settings), len(settings))
    for axis, (size, steps) in zip(axes, settings, strict=True):
        for number, variant in enumerate(VARIANTS):
            pairs = [
                (results[own], results[other])
                for seed in _SEEDS
                if (own := run_of(size, variant, steps, seed)) in results
                and (other := run_of(size, "separate", steps, seed)) in results
            ]
            if pairs:
                over = [
                    [x - y for x, y in zip(own["loss"], other["loss"], strict=True)]
                    for own, other in pairs
                ]
                color = plots.shade(number, len(VARIANTS))
                plots.band(axis, pairs[0][0]["step"], over, variant, color=color)
        plots.finish(axis, f"{size}, {steps} steps", xlabel="step")
    axes[0].set_ylabel("held-out loss above separate, uncut")
    plots.save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = parser_of("studies.heads", __doc__)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--size", nargs="+", choices=_SIZES, default=list(_SIZES))
    parser.add_argument("--steps", type=int, nargs="+", default=[120, 240])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--results", type=Path, default=_RESULTS)
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.what == "report":
        if not list(results):
            parser.error(f"there are no results in {options.results}")
        print(markdown(results, options.steps))
        draw(results, options.results.parent / "heads.png")
        return
    from studies.heads.training import train

    torch.set_num_threads(1)
    wanted = [
        run_of(size, variant, steps, seed)
        for steps in options.steps
        for size in options.size
        for seed in _SEEDS
        for variant in options.only
    ]
    complete(wanted, results, train)


if __name__ == "__main__":
    sys.exit(main())
