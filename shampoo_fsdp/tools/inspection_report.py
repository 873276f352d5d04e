"""What `python -m shampoo_fsdp inspect` shows: tables and JSON."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from shampoo_fsdp.tools.inspection import Checkpoint, Parameter
from shampoo_fsdp.tools.spectra import Factor

__all__ = ["as_json", "by_dimension", "median", "print_report"]

_HEADS = (
    "shape", "step", "blocks", "condition number", "effective rank", "vanishing", "state",
)  # fmt: skip
_TABLE_WIDTH = 100
"""Columns of a terminal, below which a parameter has its figures under its name."""


def as_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Plain dicts, lists, strings and numbers; what is no number is None. Without the spectra."""
    result: dict[str, Any] = _plain(dataclasses.asdict(checkpoint))
    for parameter in result["parameters"]:
        for block in parameter["blocks"]:
            for factor in block["factors"]:
                del factor["spectrum"]
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_report(checkpoint: Checkpoint, console: Console) -> None:
    """Tables for people."""
    parameters = checkpoint.parameters
    steps = sorted({p.step for p in parameters})
    preconditioned = [p for p in parameters if p.max_preconditioner_dim is not None]
    rules = ", ".join(sorted({p.preconditioner for p in preconditioned}))
    line = f"[bold]{escape(checkpoint.folder)}[/bold]: step {_range(steps)}"
    line += f", {checkpoint.files:,} files of {_size(checkpoint.bytes_on_disk)}"
    console.print(line, highlight=False)
    if not preconditioned:
        console.print(
            "No parameter is preconditioned: AdamW (or another optimizer) has saved this."
            if checkpoint.optimizer != "Shampoo"
            else "None of these parameters is preconditioned.",
            highlight=False,
        )
    else:
        caps = sorted({p.max_preconditioner_dim or 0 for p in preconditioned})
        console.print(
            f"{len(preconditioned):,} of {len(parameters):,} parameters are preconditioned "
            f"({rules}), with max_preconditioner_dim = {_range(caps)}.",
            highlight=False,
        )
    if checkpoint.training:
        found = ", ".join(f"{name} = {value}" for name, value in checkpoint.training.items())
        console.print(f"The training's own count: {escape(found)}.", highlight=False)
    console.print(_settings_table(parameters))
    if console.width >= _TABLE_WIDTH:
        console.print(_parameter_table(parameters))
    else:
        for p in parameters:
            pairs = zip(_HEADS, _figures(p), strict=True)
            figures = ", ".join(f"{head} {figure}" for head, figure in pairs if figure)
            console.print(f"[bold]{escape(p.name)}[/bold]", Padding(figures, (0, 0, 0, 2)))
    for parameter in parameters:
        for entry, count in parameter.nonfinite.items():
            console.print(
                f"[red]{escape(parameter.name)}: {count:,} NaN or infinite in {entry}[/red]"
            )
    if not any(parameter.nonfinite for parameter in parameters):
        console.print("[green]All numbers are finite.[/green]")
    if preconditioned:
        console.print(
            "[dim]Condition number: largest eigenvalue by smallest (at least 2^-23 of the largest)."
            " Effective rank: exp of the entropy of the eigenvalues, by n. Vanishing: eigenvalues "
            "below 2^-23 of the largest. Medians over blocks, / between dimensions.[/dim]",
            highlight=False,
        )


def _settings_table(parameters: Sequence[Parameter]) -> Table:
    table = Table(title="Settings of parameter groups", title_justify="left", title_style="bold")
    groups: dict[str, list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[", ".join(f"{k} = {v}" for k, v in sorted(parameter.settings.items()))].append(
            parameter
        )
    table.add_column("parameters", justify="right")
    table.add_column("settings")
    for settings, members in groups.items():
        table.add_row(f"{len(members):,}", escape(settings) or "(none are saved)")
    return table


def _parameter_table(parameters: Sequence[Parameter]) -> Table:
    table = Table(title="Parameters", title_justify="left", title_style="bold")
    table.add_column("parameter", no_wrap=True)
    for head in _HEADS:
        table.add_column(head, justify="right")
    for p in parameters:
        table.add_row(escape(p.name), *_figures(p))
    return table


def _figures(p: Parameter) -> tuple[str, ...]:
    """Of a parameter, under `_HEADS`."""
    factors = by_dimension(p)
    step = str(p.step)
    if p.factor_step not in (None, p.step):
        step += f" (factors {p.factor_step})"
    blocks = f"{p.number_of_blocks:,}" if p.number_of_blocks else "-"
    if len(p.blocks) < p.number_of_blocks:
        blocks = f"{len(p.blocks):,} of {blocks}"
    return (
        " x ".join(map(str, p.shape)),
        step,
        blocks,
        " / ".join(f"{median(f.condition_number for f in fs):.1e}" for fs in factors.values()),
        " / ".join(f"{median(f.effective_rank / f.n for f in fs):.1%}" for fs in factors.values()),
        " / ".join(f"{median(f.vanishing for f in fs):.0%}" for fs in factors.values()),
        _size(sum(p.bytes.values())),
    )


def by_dimension(parameter: Parameter) -> dict[int, list[Factor]]:
    """The factors of all blocks, for each dimension that has some."""
    found: dict[int, list[Factor]] = defaultdict(list)
    for block in parameter.blocks:
        for factor in block.factors:
            found[factor.dimension].append(factor)
    return dict(found)


def median(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"
