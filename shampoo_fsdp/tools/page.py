"""Reports as one HTML file each, which needs no network: light and dark, to print as well."""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLORS", "curves", "paragraph", "table", "write_page"]

COLORS = {"AdamW": "#1f77b4", "Muon": "#ff7f0e", "KL-Shampoo": "#9467bd"}
COLORS |= {"Shampoo": "#2ca02c", "SOAP": "#d62728", "SGD": "#8c564b"}
"""Of the optimizers, in all figures of the project."""

_INK = "#808080"  # readable on white and on black

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       background: light-dark(#fff, #16181d); color: light-dark(#222, #ddd); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right;
         border-bottom: 1px solid light-dark(#ddd, #383b44); }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
@media print { body { max-width: none; margin: 0; } h2, figure, table { break-inside: avoid; } }
"""


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page of parts, which the other functions make.

    Raises:
        ValueError: the file cannot be written.
    """
    head = f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    view = '<meta name="viewport" content="width=device-width">'
    page = f'<!doctype html><html lang="en"><meta charset="utf-8">{view}{head}'
    page += f"<h1>{html.escape(title)}</h1>" + "\n".join(parts) + "</html>\n"
    try:
        path.write_text(page)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be written: {error.strerror}") from None


def paragraph(text: str) -> str:
    """Make a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Make a table with a heading; the first column is text, the others are numbers."""
    first = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    written = f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{html.escape(title)}</h2><div class="wide">{written}</div>'


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, level: float
) -> str:
    """Draw lines by name, each of its x and y, and a level that they are compared with."""
    drawing, axis = figure(x, y)
    for name, (along, values) in lines.items():
        axis.plot(along, values, color=COLORS.get(name), lw=1.5, label=name)
    axis.axhline(level, color=_INK, lw=0.8, ls=":")
    # The first losses are those of no training, and would flatten the rest.
    everything = sorted(v for _, values in lines.values() for v in values)
    axis.set_ylim(everything[0] - 0.05, everything[int(0.9 * len(everything))] + 0.05)
    axis.legend(frameon=False, labelcolor=_INK)
    return as_svg(drawing)


def figure(x: str, y: str) -> tuple[Any, Any]:
    """A drawing and its axes, in ink that suits light and dark pages."""
    from matplotlib.figure import Figure  # here: it takes a second

    drawing = Figure(figsize=(6.5, 3.4), layout="tight")
    axis = drawing.add_subplot()
    axis.set_facecolor("none")
    axis.tick_params(colors=_INK)
    axis.spines[:].set_color(_INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(x, color=_INK)
    axis.set_ylabel(y, color=_INK)
    return drawing, axis


def as_svg(drawing: Any) -> str:
    """What is drawn, as a part of a page."""
    text = io.StringIO()
    drawing.savefig(text, format="svg", transparent=True)
    svg = re.sub("<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"
