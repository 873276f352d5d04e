"""How the figures of the studies look: every optimizer has one colour, in all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

__all__ = ["band", "color_of", "finish", "panels", "reference", "save"]

_COLORS = {
    "AdamW": "C0",
    "Muon": "C1",
    "Shampoo": "C2",
    "SOAP": "C3",
    "KL-Shampoo": "C4",
    "SGD": "C5",
    # Variants that are shown beside these.
    "KL-Shampoo, fp32": "C6",
    "KL-Shampoo, base_width 64": "C6",
    "Shampoo, SGD's size": "C8",
}


def color_of(name: str) -> str:
    """Of an optimizer, or of one with settings of its own after a comma."""
    return _COLORS.get(name) or _COLORS[name.split(",")[0]]


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
    """A figure and its panels, [rows, columns], each of this size in inches."""
    shape = (size[0] * columns, size[1] * rows)
    return plt.subplots(rows, columns, figsize=shape, squeeze=False, **shared)


def band(
    axis: Any, x: Any, seeds: Sequence[Sequence[float]], label: str, color: Any = None
) -> None:
    """The mean of the seeds, and their range."""
    values = np.array(seeds, dtype=float)
    (line,) = axis.plot(x, values.mean(0), color=color, label=label, lw=1.2)
    axis.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, lw=0)


def reference(axis: Any, value: float, label: str | None = None) -> None:
    """A level that the curves are compared with."""
    axis.axhline(value, color="0.4", lw=0.8, ls=":", label=label)


def finish(axis: Any, title: str) -> None:
    """Title and legend."""
    axis.set_title(title, size=10)
    axis.legend(fontsize=8)


def save(figure: Any, path: Path) -> None:
    """Write the figure."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
