"""How the cost of Shampoo's step grows: layers, width, ranks, block size, refresh frequency.

    python -m benchmarks.growth --plot growth.png --json growth.json

Starting from one setting (see --dim and so on), one thing is changed at a time. Times are those of
`benchmarks.step_time`, as multiples of fused AdamW's in the same run; the rest are exact counts.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import llama
from benchmarks.command import parser_of
from benchmarks.ranks import run_on_ranks
from benchmarks.rows import shampoo_row, torch_rows
from benchmarks.step_time import add_size_arguments, measure_rows, sizes_of
from shampoo_fsdp import ShampooConfig

__all__ = ["main"]

_AXES: dict[str, tuple[int, ...]] = {
    "layers": (1, 2, 4, 8),
    "width": (128, 256, 512),
    "ranks": (1, 2, 4),
    "largest block": (64, 128, 256, 512, 1024),
    "steps between refreshes": (1, 2, 5, 10, 20),
}


class _Setting(NamedTuple):
    sizes: llama.Sizes
    ranks: int = 2
    cap: int = 256
    frequency: int = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, plot and write."""
    parser = parser_of("benchmarks.growth", __doc__)
    add_size_arguments(parser)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--axes", nargs="+", choices=list(_AXES), default=list(_AXES))
    parser.add_argument("--values", type=int, help="only the first so many values of each axis")
    parser.add_argument("--periods", type=int, default=1, help="of refreshes that are timed")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    if options.plot:
        _pyplot()  # says now, and not after the measurement, that it is missing
    start = _Setting(sizes_of(options), options.ranks)
    known: dict[_Setting, dict[str, Any]] = {}
    points = []
    for axis in options.axes:
        for value, setting in _settings(start, axis, _AXES[axis][: options.values]):
            if setting not in known:
                known[setting] = _measure(setting, options.periods)
            points.append({"axis": axis, "value": value, **known[setting]})
            _print(points[-1])
    if options.json:
        options.json.write_text(json.dumps(points, indent=2) + "\n")
    if options.plot:
        _plot(points, options.plot)


def _settings(start: _Setting, axis: str, values: Sequence[int]) -> Iterator[tuple[int, _Setting]]:
    for value in values:
        sizes = start.sizes
        if axis == "layers":
            changed = start._replace(sizes=dataclasses.replace(sizes, layers=value))
        elif axis == "width":
            ffn = sizes.ffn * value // sizes.dim
            changed = start._replace(sizes=dataclasses.replace(sizes, dim=value, ffn=ffn))
        elif axis == "ranks":
            changed = start._replace(ranks=value)
        elif axis == "largest block":
            changed = start._replace(cap=value)
        else:
            changed = start._replace(frequency=value)
        yield value, changed


def _measure(setting: _Setting, periods: int) -> dict[str, Any]:
    rows = [
        torch_rows()[0],
        shampoo_row(
            "Shampoo",
            preconditioner=ShampooConfig().preconditioner,
            max_preconditioner_dim=setting.cap,
            precondition_frequency=setting.frequency,
        ),
    ]
    # At least so many, since a period may be one step.
    steps = max(setting.frequency * periods, 10)
    _, figures = run_on_ranks(setting.ranks, measure_rows, rows, setting.sizes, steps, 1e9)
    return dict(figures)


def _print(point: dict[str, Any]) -> None:
    shown = ", ".join(
        f"{name} {form.format(point[key])}" for name, key, form in _SHOWN if point[key] is not None
    )
    print(f"{point['axis']} = {point['value']}: {shown}", flush=True)


_SHOWN = [
    ("times AdamW", "mean_to_first_row", "{:.1f}"),
    ("operators per step", "operators_per_step", "{:,.0f}"),
    ("GFLOP per step and rank", "gflop_per_step", "{:.2f}"),
    ("MB sent per step and rank", "mb_sent_per_step", "{:.2f}"),
    ("bytes of state per parameter", "state_bytes_per_parameter", "{:.1f}"),
]


def _plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    pyplot = _pyplot()
    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    figure, grid = pyplot.subplots(
        len(_SHOWN),
        len(axes_names),
        figsize=(2.6 * len(axes_names), 1.7 * len(_SHOWN)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, axis in enumerate(axes_names):
        chosen = [point for point in points if point["axis"] == axis]
        values = [point["value"] for point in chosen]
        for row, (name, key, _) in enumerate(_SHOWN):
            plot = grid[row][column]
            plot.plot(values, [point[key] for point in chosen], "C4o-", markersize=4)
            plot.set_xscale("log", base=2)
            plot.set_xticks(values, [str(value) for value in values])
            plot.minorticks_off()
            plot.grid(alpha=0.3)
            if column == 0:
                plot.set_ylabel(name.replace(" per ", "\nper "), fontsize=8)
            if row == len(_SHOWN) - 1:
                plot.set_xlabel(axis)
    for row, (_, key, _) in zip(grid, _SHOWN, strict=True):
        row[0].set_ylim(0, 1.1 * max(point[key] for point in points) or None)
    figure.savefig(path, dpi=110)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


if __name__ == "__main__":
    main()
