"""What `python -m shampoo_fsdp inspect` shows of a checkpoint."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from shampoo_fsdp.tools.tables import by_size, number_columns, times, titled_table

_HEADS = (
    "shape", "step", "blocks", "condition number", "effective rank", "vanishing", "state",
)  # fmt: skip


def print_report(checkpoint: Mapping[str, Any], console: Console) -> None:
    """Tables for people.

    Args:
        checkpoint: see :func:`shampoo_fsdp.tools.inspection.inspect_checkpoint`.
    """
    say = partial(console.print, highlight=False)
    parameters = checkpoint["parameters"]
    preconditioned = [p for p in parameters if p["max_preconditioner_dim"] is not None]
    say(
        f"[bold]{escape(checkpoint['folder'])}[/bold]: step {_range(parameters, 'step')}"
        f", {checkpoint['files']:,} files of {by_size(checkpoint['bytes_on_disk'])}"
    )
    if preconditioned:
        rules = ", ".join(sorted({p["preconditioner"] for p in preconditioned}))
        say(
            f"{len(preconditioned):,} of {len(parameters):,} parameters are preconditioned "
            f"({rules}), with max_preconditioner_dim = "
            f"{_range(preconditioned, 'max_preconditioner_dim')}."
        )
    elif checkpoint["optimizer"] == "Shampoo":
        say("None of these parameters is preconditioned.")
    else:
        say("No parameter is preconditioned: AdamW (or another optimizer) has saved this.")
    if checkpoint["training"]:
        found = ", ".join(f"{name} = {value}" for name, value in checkpoint["training"].items())
        say(f"The training's own count: {escape(found)}.")
    say(_settings_table(parameters))
    names = Column("parameter", overflow="fold")
    table = titled_table("Parameters", names, *number_columns(*_HEADS))
    for p in parameters:
        table.add_row(escape(p["name"]), *_figures(p))
    say(table)
    bad = [(p["name"], entry, n) for p in parameters for entry, n in p["nonfinite"].items()]
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


def _settings_table(parameters: Sequence[Mapping[str, Any]]) -> Table:
    groups = Counter(
        ", ".join(f"{name} = {value}" for name, value in sorted(p["settings"].items()))
        for p in parameters
    )
    table = titled_table("Settings of parameter groups", *number_columns("parameters"), "settings")
    for settings, number in groups.items():
        table.add_row(f"{number:,}", escape(settings) or "(none are saved)")
    return table


def _figures(p: Mapping[str, Any]) -> tuple[str, ...]:
    """The figures of a parameter, under `_HEADS`."""
    step, blocks = str(p["step"]), f"{p['number_of_blocks']:,}" if p["number_of_blocks"] else "-"
    if p["factor_step"] not in (None, p["step"]):
        step += f" (factors {p['factor_step']})"
    if len(p["blocks"]) < p["number_of_blocks"]:
        blocks = f"{len(p['blocks']):,} of {blocks}"
    by_dimension: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for block in p["blocks"]:
        for factor in block["factors"]:
            by_dimension[factor["dimension"]].append(factor)
    return (
        times(p["shape"]),
        step,
        blocks,
        _medians(by_dimension, "condition_number", "{:.1e}"),
        _medians(by_dimension, "effective_rank", "{:.1%}", by_rows=True),
        _medians(by_dimension, "vanishing", "{:.0%}"),
        by_size(sum(p["bytes"].values())),
    )


def _medians(
    by_dimension: Mapping[int, Sequence[Mapping[str, Any]]],
    name: str,
    form: str,
    by_rows: bool = False,
) -> str:
    """The median of a figure for each dimension, of the factors that have it."""
    shown = []
    for factors in by_dimension.values():
        known = [f[name] / (f["n"] if by_rows else 1) for f in factors if f[name] is not None]
        shown.append(form.format(statistics.median(known)) if known else "nan")
    return " / ".join(shown)


def _range(parameters: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [p[name] for p in parameters]
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
