"""How the reports write tables, numbers and shapes."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich import table
from rich.console import Console
from rich.markup import escape


class Table(NamedTuple):
    """A table of a report, for the terminal and for a page: a column of text, then numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


Part = str | Table
"""Of a report."""


def print_parts(parts: Iterable[Part], console: Console) -> None:
    for part in parts:
        if isinstance(part, Table):
            console.print(_for_terminal(part))
        else:
            console.print(escape(part), highlight=False)


def _for_terminal(given: Table) -> table.Table:
    shown = table.Table(title=given.title, title_justify="left", title_style="bold")
    short = all(len(row[0]) < 20 for row in given.rows)
    for k, head in enumerate(given.heads):
        whole = short and not k
        shown.add_column(head, justify="right" if k else "left", overflow="fold", no_wrap=whole)
    for row in given.rows:
        shown.add_row(*map(escape, row))
    return shown


def print_json(report: Any) -> None:
    print(json.dumps(report, indent=2), flush=True)


def four_digits(value: float) -> str:
    """Write a number, without an exponent where a person would not write one."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def by_size(count: float) -> str:
    """Write a number of bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


def without_numbers(name: str) -> str:
    """The name of a parameter, the same for each layer."""
    return re.sub(r"(^|\.)\d+\.", r"\1", name)


def times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
