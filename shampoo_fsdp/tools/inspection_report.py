"""What `python -m shampoo_fsdp inspect` shows: tables and JSON."""

import dataclasses
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table

from shampoo_fsdp.tools.inspection import Checkpoint, ParameterState
from shampoo_fsdp.tools.spectra import Factor
from shampoo_fsdp.tools.tables import by_size, number_columns, times, titled_table

__all__ = ["as_json", "by_dimension", "median", "print_report"]

_HEADS = (
    "shape", "step", "blocks", "condition number", "effective rank", "vanishing", "state",
)  # fmt: skip
_TABLE_WIDTH = 100
"""Columns of a terminal, below which a parameter has its figures under its name."""


def as_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers; what is no number is None. Without the spectra."""
    found = dataclasses.asdict(checkpoint, dict_factory=_without_spectrum)
    result: dict[str, Any] = json.loads(json.dumps(found), parse_constant=lambda name: None)
    return result


def _without_spectrum(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if name != "spectrum"}


def print_report(checkpoint: Checkpoint, console: Console) -> None:
    """Tables for people."""
    say = partial(console.print, highlight=False)
    parameters = checkpoint.parameters
    preconditioned = [p for p in parameters if p.max_preconditioner_dim is not None]
    say(
        f"[bold]{escape(checkpoint.folder)}[/bold]: step {_range([p.step for p in parameters])}"
        f", {checkpoint.files:,} files of {by_size(checkpoint.bytes_on_disk)}"
    )
    if preconditioned:
        rules = ", ".join(sorted({p.preconditioner for p in preconditioned}))
        caps = _range([p.max_preconditioner_dim or 0 for p in preconditioned])
        say(
            f"{len(preconditioned):,} of {len(parameters):,} parameters are preconditioned "
            f"({rules}), with max_preconditioner_dim = {caps}."
        )
    elif checkpoint.optimizer == "Shampoo":
        say("None of these parameters is preconditioned.")
    else:
        say("No parameter is preconditioned: AdamW (or another optimizer) has saved this.")
    if checkpoint.training:
        found = ", ".join(f"{name} = {value}" for name, value in checkpoint.training.items())
        say(f"The training's own count: {escape(found)}.")
    say(_settings_table(parameters))
    if console.width >= _TABLE_WIDTH:
        names = Column("parameter", no_wrap=True)
        table = titled_table("Parameters", names, *number_columns(*_HEADS))
        for p in parameters:
            table.add_row(escape(p.name), *_figures(p))
        say(table)
    else:
        for p in parameters:
            pairs = zip(_HEADS, _figures(p), strict=True)
            figures = ", ".join(f"{head} {figure}" for head, figure in pairs if figure)
            console.print(f"[bold]{escape(p.name)}[/bold]", Padding(figures, (0, 0, 0, 2)))
    bad = [(p.name, entry, n) for p in parameters for entry, n in p.nonfinite.items()]
    for name, entry, number in bad:
        console.print(f"[red]{escape(name)}: {number:,} NaN or infinite in {entry}[/red]")
    if not bad:
        say("[green]All numbers are finite.[/green]")
    if preconditioned:
        say(
            "[dim]Vanishing: eigenvalues below the floor of the roots, 2^-23 of the largest (1e-5 "
            "with kl_shampoo, 2^-12 for factors in bf16). Condition number: largest eigenvalue by "
            "smallest, which counts as at least the floor. Effective rank: exp of the entropy of "
            "the eigenvalues, by n. Medians over blocks, / between dimensions.[/dim]"
        )


def _settings_table(parameters: Sequence[ParameterState]) -> Table:
    groups = Counter(
        ", ".join(f"{name} = {value}" for name, value in sorted(p.settings.items()))
        for p in parameters
    )
    table = titled_table("Settings of parameter groups", *number_columns("parameters"), "settings")
    for settings, number in groups.items():
        table.add_row(f"{number:,}", escape(settings) or "(none are saved)")
    return table


def _figures(p: ParameterState) -> tuple[str, ...]:
    """The figures of a parameter, under `_HEADS`."""
    step = str(p.step)
    if p.factor_step not in (None, p.step):
        step += f" (factors {p.factor_step})"
    blocks = f"{p.number_of_blocks:,}" if p.number_of_blocks else "-"
    if len(p.blocks) < p.number_of_blocks:
        blocks = f"{len(p.blocks):,} of {blocks}"
    factors = by_dimension(p).values()
    return (
        times(p.shape),
        step,
        blocks,
        " / ".join(f"{median(f.condition_number for f in fs):.1e}" for fs in factors),
        " / ".join(f"{median(f.effective_rank / f.n for f in fs):.1%}" for fs in factors),
        " / ".join(f"{median(f.vanishing for f in fs):.0%}" for fs in factors),
        by_size(sum(p.bytes.values())),
    )


def by_dimension(parameter: ParameterState) -> dict[int, list[Factor]]:
    """The factors of all blocks, for each dimension that has some."""
    found: dict[int, list[Factor]] = defaultdict(list)
    for block in parameter.blocks:
        for factor in block.factors:
            found[factor.dimension].append(factor)
    return dict(found)


def median(values: Iterable[float]) -> float:
    """The median of those that are finite; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
