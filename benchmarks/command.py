"""What all commands of the benchmarks and studies share: their parser, and tables for people."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from shampoo_fsdp.tools.parser import Parser


def parser_of(module: str, text: str | None) -> Parser:
    """A parser for `python -m module`, whose help begins with this text."""
    return Parser(
        prog=f"python -m {module}", description=text, formatter_class=RawDescriptionHelpFormatter
    )


def need_02(what: str) -> None:
    """Ends the process if what it does trains models of TorchTitan 0.2."""
    from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

    if JOBS_ARE_FUNCTIONS:
        sys.exit(
            f"{what} trains models of TorchTitan 0.2, and a newer one is installed: "
            "`TITAN=0.2.2 ./run_tests.sh -h` makes an environment for it, ./.venv-0.2.2"
        )


def console() -> Console:
    """As wide as the terminal; in a file nothing is cut."""
    return Console(width=None if Console().is_terminal else 180)


def table(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, str]] | None = None,
) -> Table:
    """A line for each row.

    Args:
        columns: by heading which entry of a row, if it has it, and its format; without it one
            for each entry.
    """
    columns = columns or {key: (key, "") for key in rows[0]}
    result = Table(title=title, title_justify="left")
    for number, heading in enumerate(columns):
        result.add_column(heading, justify="right" if number else "left")
    for row in rows:
        result.add_row(*(_cell(row.get(key), form) for key, form in columns.values()))
    return result


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if form:
        return form.format(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The heads, a rule, and a line for each row."""
    first, *lines = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return "\n".join([first, "|" + "---|" * len(heads), *lines])
