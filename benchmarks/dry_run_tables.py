"""A dry run as tables for people."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from shampoo_fsdp.tools.machine import Machine

__all__ = ["print_tables"]


def print_tables(figures: Mapping[str, Any], console: Console) -> None:
    """Print."""
    console.print(f"[bold]{figures['title']}, a step of rank {figures['rank']}[/bold]")
    console.print(
        f"{figures['blocks']:,} blocks in {figures['stacks']} stacks, which travel in "
        f"{figures['buckets']} buckets. {figures['chosen by device'].capitalize()}."
    )
    console.print(_table_of_parts(figures))
    console.print(_timeline(figures["timeline"]))
    muon, adamw = figures["Muon's share"], figures["AdamW's share"]
    machine = Machine(**figures["machine"])
    console.print(
        f"Of a training step of {figures['training step, ms']:,.0f} ms Shampoo takes "
        f"[bold]{figures['share']:.2%}[/bold], Muon {muon:.2%} without its "
        f"communication, AdamW {adamw:.2%}. {_mib(figures['bytes sent'])} MiB "
        f"are sent; for {figures['ms waited']:.2f} ms the GPU waits for them. Numbers of rows take "
        f"{_mib(figures['bytes of row numbers'])} MiB. Assumed: {machine}."
    )


def _table_of_parts(figures: Mapping[str, Any]) -> Table:
    table = Table("", title="What the GPU does", title_style="bold", title_justify="left")
    heads = ("kernels", "bf16, TFLOP", "TF32", "fp32", "memory moved, GB", "peak, MiB", "ms")
    for head in heads:
        table.add_column(head, justify="right")
    for part, counts in figures["parts"].items():
        peak, took = figures["peak bytes of parts"][part], figures["ms of parts"][part]
        table.add_row(part, *_cells(counts), _mib(peak), f"{took:.2f}")
    table.add_section()
    waited = f"{figures['ms']:.2f}"
    table.add_row("Shampoo", *_cells(figures["total"]), _mib(figures["peak bytes"]), waited)
    for name in ("AdamW", "Muon"):
        of = figures[name]
        table.add_row(name, *_cells(of), _mib(of["peak bytes"]), f"{of['ms']:.2f}")
    return table


def _cells(counts: Mapping[str, float]) -> list[str]:
    flops = [f"{counts.get(kind, 0) / 1e12:.3g}" for kind in ("bf16", "tf32", "fp32")]
    return [f"{counts.get('launches', 0):,.0f}", *flops, f"{counts.get('bytes', 0) / 1e9:.3g}"]


def _timeline(transfers: list[dict[str, Any]]) -> Table:
    table = Table("transfer", title="What is on its way", title_style="bold", title_justify="left")
    for head in ("MiB in the node", "MiB to others", "begins, ms", "ends, ms", "GPU waits, ms"):
        table.add_column(head, justify="right")
    for of in transfers:
        times = (f"{of[key]:.2f}" for key in ("begins", "ends", "waited"))
        table.add_row(of["name"], _mib(of["near"]), _mib(of["far"]), *times)
    return table


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"
