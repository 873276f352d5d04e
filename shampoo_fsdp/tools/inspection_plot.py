"""The picture of a checkpoint's factors."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shampoo_fsdp.tools.inspection import Checkpoint, Parameter
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


def _by_kind(parameters: Sequence[Parameter]) -> dict[str, list[Parameter]]:
    """Parameters with factors, those of all layers together."""
    kinds: dict[str, list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        if any(f.spectrum for factors in by_dimension(parameter).values() for f in factors):
            kinds[parameter.kind].append(parameter)
    return dict(kinds)


def _draw_decay(axes: Any, kinds: dict[str, list[Parameter]], dimension: int) -> None:
    """The median of the eigenvalues at each place, over all blocks of a kind, and half of them."""
    for number, (kind, members) in enumerate(kinds.items()):
        factors = [f for p in members for f in by_dimension(p).get(dimension, [])]
        spectra = [f.spectrum for f in factors if f.spectrum]
        if not spectra:
            continue
        places = [i / (len(spectra[0]) - 1) for i in range(len(spectra[0]))]
        columns = [sorted(values) for values in zip(*spectra, strict=True)]
        quartiles = [[v[int(q * (len(v) - 1))] for v in columns] for q in (0.25, 0.5, 0.75)]
        color = f"C{number % 10}"
        axes.fill_between(places, quartiles[0], quartiles[2], color=color, alpha=0.15, linewidth=0)
        axes.plot(places, quartiles[1], color=color, label=kind.removesuffix(".weight"))
    axes.axhline(2.0**-23, color="0.6", linewidth=0.8, linestyle=":")
    axes.text(0.01, 2.0**-23, " resolution of fp32", color="0.4", fontsize="x-small", va="bottom")
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 2.0)
    axes.set_xlim(0.0, 1.0)
    axes.set_title(f"Eigenvalues of the factors of dimension {dimension}", fontsize="medium")
    axes.set_xlabel("place among the eigenvalues / n")
    axes.set_ylabel("eigenvalue / largest")


def _draw_layers(
    axes: Any, kinds: dict[str, list[Parameter]], title: str, figure_of: Callable[[Factor], float]
) -> None:
    """A figure of each layer's factors, the median over its blocks."""
    dimensions: set[int] = set()
    for number, members in enumerate(kinds.values()):
        lines: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for parameter in members:
            for dimension, factors in by_dimension(parameter).items():
                lines[dimension].append((parameter.layer or 0, median(map(figure_of, factors))))
        dimensions |= set(lines)
        for dimension, points in lines.items():
            layers, values = zip(*sorted(points), strict=True)
            style = _LINES[dimension % len(_LINES)]
            axes.plot(layers, values, style, color=f"C{number % 10}", marker=".", markersize=4)
    for dimension in sorted(dimensions):
        axes.plot(
            [], [], _LINES[dimension % len(_LINES)], color="0.3", label=f"dimension {dimension}"
        )
    axes.legend(fontsize="x-small")
    axes.set_title(f"{title.capitalize()} by layer", fontsize="medium")
    axes.set_xlabel("layer")
    axes.set_ylabel(title)
    axes.xaxis.get_major_locator().set_params(integer=True)
