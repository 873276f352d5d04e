"""The picture of a checkpoint's factors."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shampoo_fsdp.tools.inspection import Checkpoint, ParameterState
from shampoo_fsdp.tools.inspection_report import by_dimension, median
from shampoo_fsdp.tools.spectra import Factor

__all__ = ["plot"]

_LINES = ("-", "--", ":", "-.")


def plot(checkpoint: Checkpoint, file: Path) -> None:
    """Draw how the eigenvalues of the factors decay, and how their condition and rank change from
    layer to layer.

    Raises:
        ValueError: matplotlib is not installed, nothing is there to draw, or `file` has no ending
            that it knows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    kinds = _by_kind(checkpoint.parameters)
    if not kinds:
        raise ValueError("--plot has nothing to draw: none of the parameters has factors.")
    figure = Figure(figsize=(12.0, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    (rows, columns), (condition, rank) = figure.subplots(2, 2)
    dimensions = sorted({d for members in kinds.values() for p in members for d in by_dimension(p)})
    for axes, dimension in zip((rows, columns), dimensions, strict=False):
        _draw_decay(axes, kinds, dimension)
    if len(dimensions) < 2:
        columns.set_axis_off()
    _draw_layers(condition, kinds, "condition number", lambda f: f.condition_number)
    condition.set_yscale("log")
    _draw_layers(rank, kinds, "effective rank / n", lambda f: f.effective_rank / f.n)
    rank.set_ylim(bottom=0.0)
    handles, labels = rows.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False
    )
    steps = sorted({p.step for members in kinds.values() for p in members})
    figure.suptitle(f"Factors at step {steps[-1]}: {checkpoint.folder}", fontsize="medium")
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ValueError(f"the picture cannot be written to {file}: {error}") from None


def _by_kind(parameters: Sequence[ParameterState]) -> dict[str, list[ParameterState]]:
    """Parameters with factors, those of all layers together."""
    kinds: dict[str, list[ParameterState]] = defaultdict(list)
    for parameter in parameters:
        if any(f.spectrum for factors in by_dimension(parameter).values() for f in factors):
            kinds[parameter.kind].append(parameter)
    return dict(kinds)


def _draw_decay(axes: Any, kinds: dict[str, list[ParameterState]], dimension: int) -> None:
    """The median of the eigenvalues at each place, over all blocks of a kind, and half of them."""
    for number, (kind, members) in enumerate(kinds.items()):
        factors = [f for p in members for f in by_dimension(p).get(dimension, [])]
        spectra = [f.spectrum for f in factors if f.spectrum]
        if not spectra:
            continue
        ranked = torch.tensor(spectra, dtype=torch.float64).sort(dim=0).values
        low, middle, high = (ranked[int(q * (len(ranked) - 1))] for q in (0.25, 0.5, 0.75))
        places, color = torch.linspace(0.0, 1.0, len(middle)), f"C{number % 10}"
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(places, middle, color=color, label=kind.removesuffix(".weight"))
    axes.axhline(2.0**-23, color="0.6", linewidth=0.8, linestyle=":")
    axes.text(0.01, 2.0**-23, " resolution of fp32", color="0.4", fontsize="x-small", va="bottom")
    axes.set(yscale="log", xlim=(0.0, 1.0), ylim=(1e-8, 2.0))
    axes.set(xlabel="place among the eigenvalues / n", ylabel="eigenvalue / largest")
    axes.set_title(f"Eigenvalues of the factors of dimension {dimension}", fontsize="medium")


def _draw_layers(
    axes: Any,
    kinds: dict[str, list[ParameterState]],
    title: str,
    figure_of: Callable[[Factor], float],
) -> None:
    """A figure of each layer's factors, the median over its blocks."""
    styles: dict[int, str] = {}
    for number, members in enumerate(kinds.values()):
        lines: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for parameter in members:
            for dimension, factors in by_dimension(parameter).items():
                lines[dimension].append((parameter.layer or 0, median(map(figure_of, factors))))
        for dimension, points in lines.items():
            styles[dimension] = _LINES[dimension % len(_LINES)]
            layers, values = zip(*sorted(points), strict=True)
            color = f"C{number % 10}"
            axes.plot(layers, values, styles[dimension], color=color, marker=".", markersize=4)
    for dimension, style in sorted(styles.items()):
        axes.plot([], [], style, color="0.3", label=f"dimension {dimension}")
    axes.legend(fontsize="x-small")
    axes.set(xlabel="layer", ylabel=title)
    axes.set_title(f"{title.capitalize()} by layer", fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)
