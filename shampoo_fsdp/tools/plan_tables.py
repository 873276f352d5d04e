"""A plan as tables for people."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table

from shampoo_fsdp.rules.costs import BlockCosts
from shampoo_fsdp.tools.plan_figures import EVEN, PlanReport, max_over_mean, spread_of, times

__all__ = ["print_plan"]

_PHASES_SHOWN = 20

_QUANTITIES = {
    "gflop_per_step": "load, GFLOP per step",
    "blocks": "blocks",
    "state_gib": "state with Shampoo, GiB",
    "adamw_state_gib": "state with AdamW, GiB",
    "gib_sent_inside_node": "sent within node, GiB a step",
    "gib_sent_across_nodes": "sent to other nodes, GiB a step",
}


def print_plan(report: PlanReport, console: Console) -> None:
    """Tables for people."""
    share = report.elements_preconditioned / max(report.elements, 1)
    nodes = len({rank // report.settings.ranks_per_node for rank in report.ranks})
    console.print(f"[bold]{report.title}[/bold]", highlight=False)
    console.print(
        f"{len(report.ranks):,} ranks on {nodes:,} nodes share the blocks"
        + (", and every other replica repeats the work" * (report.owner_scope == "shard"))
        + f". Shampoo preconditions {report.parameters_preconditioned:,} of "
        f"{report.parameters:,} parameters ({share:.1%} of {report.elements / 1e9:,.3g} billion "
        "elements); Adam updates the others.",
        highlight=False,
    )
    console.print(
        Group(_table_of_ranks(report), _table_of_shapes(report), _table_of_phases(report))
    )
    if left_out := report.sides_without_factor():
        named = "; ".join(f"{times(s)}: {_listed(sides)}" for s, sides in left_out.items())
        console.print(
            f"Sides without a factor, by the shape of the block ({named}); see the settings "
            "max_factor_ratio and large_dim.",
            highlight=False,
        )
    sent, least = _number(report.gib_sent), _number(report.least_gib_sent)
    above = report.gib_sent / report.least_gib_sent - 1.0 if report.least_gib_sent else 0.0
    console.print(
        f"All ranks send {sent} GiB per step, {above:.1%} more than if every block were owned "
        f"by a rank that holds most of it ({least} GiB).",
        highlight=False,
    )
    color = "green" if report.worst[2] <= EVEN else "yellow"
    console.print(f"[{color}]Balance:[/{color}] {report.reason()}.", highlight=False)


def _table_of_ranks(report: PlanReport) -> Table:
    table = _table("Per rank", ["", "min", "mean", "max", "max / mean"])
    for name, values in report.per_rank.items():
        spread = spread_of(values)
        numbers = [_number(spread[key]) for key in ("min", "mean", "max")]
        table.add_row(_QUANTITIES[name], *numbers, f"{max_over_mean(values):.3f}")
    return table


def _table_of_shapes(report: PlanReport) -> Table:
    heads = ["shape", "number", "GFLOP every step", "GFLOP of a refresh", "MiB of state"]
    table, costs = _table("Blocks", heads), BlockCosts(report.settings)
    for shape, number in report.blocks_by_shape.items():
        every, refresh, state = costs[shape]
        numbers = [_number(n) for n in (every / 1e9, refresh / 1e9, state / 2**20)]
        table.add_row(times(shape), f"{number:,}", *numbers)
    return table


def _table_of_phases(report: PlanReport) -> Table:
    order = list(range(len(report.phases)))
    title = "Load per refresh phase"
    if len(order) > _PHASES_SHOWN:
        title += f", the {_PHASES_SHOWN} least even of {len(order)}"
        order.sort(key=lambda phase: -max_over_mean(report.phases[phase]))
    heads = ["phase", "blocks refreshed", "GFLOP, mean", "GFLOP, max", "max / mean"]
    table = _table(title, heads)
    for phase in order[:_PHASES_SHOWN]:
        spread = spread_of(report.phases[phase])
        numbers = [_number(spread[key]) for key in ("mean", "max")]
        refreshed, ratio = (
            f"{report.refreshed[phase]:,}",
            f"{max_over_mean(report.phases[phase]):.3f}",
        )
        table.add_row(str(phase), refreshed, *numbers, ratio)
    return table


def _number(value: float) -> str:
    """Four digits, and never an exponent where a person would not write one."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _listed(sides: Sequence[int]) -> str:
    return ", ".join(map(str, sides))


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    return table
