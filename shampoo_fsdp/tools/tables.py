"""How the reports write tables, numbers and shapes."""

from collections.abc import Sequence

from rich.table import Column, Table


def titled_table(title: str, *columns: Column | str) -> Table:
    return Table(*columns, title=title, title_justify="left", title_style="bold")


def number_columns(*heads: str) -> list[Column]:
    return [Column(head, justify="right") for head in heads]


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


def times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
