"""How the figures of the studies look: one color for each optimizer, all as wide as a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from shampoo_fsdp.tools.page import COLORS

plt.rcParams |= {
    **{"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 9, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False},
}

_WIDTH = 8.0  # inches, 960 pixels: at 700 letters are 11 high
# Shown beside the one of the same color.
_DASHED = ("KL-Shampoo, fp32", "KL-Shampoo, base_width 64", "Shampoo, SGD's size")


def style_of(name: str) -> dict[str, Any]:
    """Color and line of an optimizer, or of one with settings of its own after a comma; peers' are
    grey."""
    return {"color": COLORS.get(name.split(",")[0], "0.5"), "ls": "--" if name in _DASHED else "-"}


def shade(number: int, of: int) -> Any:
    """The color of one of several in an order, which are no optimizers."""
    return plt.get_cmap("viridis")(0.9 * number / max(1, of - 1))


def panels(count: int, columns: int, height: float = 2.8, **shared: Any) -> tuple[Any, list[Any]]:
    """A figure as wide as a page, and its panels, so many in a row, of this height in inches."""
    rows = -(-count // columns)
    size = (_WIDTH, height * rows + 0.4)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **shared
    )
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def band(axis: Any, x: Any, seeds: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The mean of the seeds, and their range."""
    values = np.array(seeds, dtype=float)
    axis.plot(x, values.mean(0), label=label, lw=1.5, **style)
    axis.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)


def reference(axis: Any, value: float, label: str | None = None) -> None:
    """A level that the curves are compared with."""
    axis.axhline(value, color="0.4", lw=0.8, ls=":", label=label)


def finish(axis: Any, title: str, **labels: Any) -> None:
    """Title and labels."""
    axis.set(**labels)
    axis.set_title(title)


def save(figure: Any, path: Path) -> None:
    """Write the figure, with one legend for all panels below them."""
    pairs = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes]
    found = {label: handle for handles in pairs for handle, label in handles}
    if found:
        columns = 3 if sum(map(len, found)) > 75 else len(found)
        figure.legend(found.values(), found, loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=120)
    plt.close(figure)
