"""Reports as one HTML file each, which needs no network: light and dark, to print as well."""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shampoo_fsdp.tools.tables import Part, Table

__all__ = ["COLORS", "bars", "curves", "maps", "paragraph", "table", "write_report"]

COLORS = {"AdamW": "#1f77b4", "Muon": "#ff7f0e", "KL-Shampoo": "#9467bd"}
COLORS |= {"Shampoo": "#2ca02c", "SOAP": "#d62728", "SGD": "#8c564b"}
"""Of the optimizers, in all figures of the project."""

_INK = "#808080"  # of drawings; the page puts its own in the place of it

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       background: light-dark(#fff, #16181d); color: light-dark(#222, #ddd); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right;
         border-bottom: 1px solid light-dark(#ddd, #383b44); }
th:first-child, td:first-child, .text { text-align: left; }
td:not(.text, :first-child) { white-space: nowrap; }
svg { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
.several { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
@media print { body { max-width: none; margin: 0; } h2, figure, table { break-inside: avoid; } }
"""


def write_report(path: Path, title: str, said: Iterable[Part], pictures: Iterable[str]) -> None:
    """Write a page of what a command says, its pictures after the first paragraphs; these are what
    the other functions make.

    Raises:
        ValueError: the file cannot be written.
    """
    parts = list(said)
    first = next((k for k, part in enumerate(parts) if isinstance(part, Table)), len(parts))
    shown = [table(part) if isinstance(part, Table) else paragraph(part) for part in parts]
    body = "\n".join([*shown[:first], *pictures, *shown[first:]])
    name = html.escape(title)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{_STYLE}</style><h1>{name}</h1>{body}</html>\n"
    )
    try:
        path.write_text(page)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be written: {error.strerror}") from None


def paragraph(text: str) -> str:
    """Make a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def table(given: Table) -> str:
    """Make a table with a heading."""
    rows = [given.heads, *given.rows]
    is_text = [all(cell[:1].isalpha() for cell in column) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row in rows:
        kind = "td" if lines else "th"
        cells = (
            f"<{kind}{' class=text' * text}>{html.escape(cell)}</{kind}>"
            for cell, text in zip(row, is_text, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    written = f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"
    return f'<h2>{html.escape(given.title)}</h2><div class="wide">{written}</div>'


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x: str,
    y: str,
    level: float | None = None,
) -> str:
    """Draw lines by name, each of its x and y: losses, and a level that they are compared with; or,
    without a level, what spans decades."""
    drawing, axis = figure(x, y, 3.2 + 0.1 * len(lines))
    for name, (along, values) in lines.items():
        axis.plot(along, values, color=COLORS.get(name), lw=1.5, label=name)
    if level is None:
        axis.set_yscale("log")
        axis.set_ylim(1e-8, 2.0)
    else:
        axis.axhline(level, color=_INK, lw=0.8, ls=":")
        # The first losses are those of no training, and would flatten the rest.
        everything = sorted(v for _, values in lines.values() for v in values)
        axis.set_ylim(everything[0] - 0.05, everything[int(0.9 * len(everything))] + 0.05)
    return _as_svg(drawing, legend=True)


def bars(rows: Mapping[str, Mapping[str, float]], x: str, level: float | None = None) -> str:
    """Draw for each row its parts one after the other, and a level that the rows must not pass."""
    drawing, axis = figure(x, "", 1.3 + 0.34 * len(rows))
    starts = dict.fromkeys(rows, 0.0)
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    for part, color in zip(parts, _PARTS * len(parts), strict=False):
        widths = [row.get(part, 0.0) for row in rows.values()]
        axis.barh(list(rows), widths, left=list(starts.values()), color=color, label=part)
        starts = {name: starts[name] + row.get(part, 0.0) for name, row in rows.items()}
    if level is not None:
        axis.axvline(level, color=_INK, lw=1.5, ls="--")
    axis.invert_yaxis()
    return _as_svg(drawing, legend=True)


def maps(
    pictures: Mapping[str, Sequence[Sequence[float]]], label: str, x: str = "", y: str = ""
) -> str:
    """Draw matrices as colours of one scale, each with its name; several stand side by side."""
    values = [value for rows in pictures.values() for row in rows for value in row]
    result = ""
    for name, rows in pictures.items():
        drawing, axis = figure(x, y, 2.4)
        shown = axis.imshow(
            rows, vmin=min(values), vmax=max(values), aspect="auto", interpolation="nearest"
        )
        for along in (axis.xaxis, axis.yaxis):
            along.get_major_locator().set_params(integer=True)
        bar = drawing.colorbar(shown)
        bar.ax.tick_params(colors=_INK)
        bar.set_label(label, color=_INK)
        axis.set_title(name, color=_INK, fontsize=10)
        result += _as_svg(drawing)
    return f'<div class="several">{result}</div>' if len(pictures) > 1 else result


_PARTS = ("#8c96a3", "#5b8fd6", "#9467bd", "#e0982f", "#3aa68c", "#c9577a", "#a8a03c", "#6c6c6c")


def figure(x: str, y: str, height: float = 3.4) -> tuple[Any, Any]:
    """A drawing and its axes."""
    from matplotlib.figure import Figure  # here: it takes a second

    drawing = Figure(figsize=(7.0, height), layout="constrained")
    axis = drawing.add_subplot()
    axis.set_facecolor("none")
    axis.tick_params(colors=_INK)
    axis.spines[:].set_color(_INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(x, color=_INK)
    axis.set_ylabel(y, color=_INK)
    return drawing, axis


def _as_svg(drawing: Any, *, legend: bool = False) -> str:
    """What is drawn, as a part of a page; the legend is above it and covers nothing."""
    if legend:
        _, labels = drawing.axes[0].get_legend_handles_labels()
        columns = 3 if max(map(len, labels)) < 25 else 2
        drawing.legend(
            frameon=False, labelcolor=_INK, loc="outside upper left", ncols=columns, fontsize=9
        )
    text = io.StringIO()
    drawing.savefig(text, format="svg", transparent=True)
    svg = re.sub("<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return f"<figure>{svg[svg.index('<svg') :].replace(_INK, 'currentColor')}</figure>"
