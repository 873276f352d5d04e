"""A plan as tables for people."""

from functools import partial

from rich.console import Console
from rich.table import Table

from shampoo_fsdp.rules.costs import BlockCosts
from shampoo_fsdp.tools.plan_figures import EVEN, PlanReport, max_over_mean, spread_of
from shampoo_fsdp.tools.tables import four_digits, number_columns, times, titled_table

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
    say = partial(console.print, highlight=False)
    share = report.elements_preconditioned / max(report.elements, 1)
    nodes = len({rank // report.settings.ranks_per_node for rank in report.ranks})
    repeated = ", and every other replica repeats the work"
    say(f"[bold]{report.title}[/bold]")
    say(
        f"{len(report.ranks):,} ranks on {nodes:,} nodes share the blocks"
        f"{repeated if report.settings.owner_scope == 'shard' else ''}. Shampoo preconditions "
        f"{report.parameters_preconditioned:,} of {report.parameters:,} parameters ({share:.1%} of "
        f"{report.elements / 1e9:,.3g} billion elements); Adam updates the others."
    )
    if report.chosen_by_device:
        say(f"It would choose {report.chosen_by_device}.")
    for table in (_table_of_ranks(report), _table_of_shapes(report), _table_of_phases(report)):
        say(table)
    if left_out := report.sides_without_factor():
        named = "; ".join(
            f"{times(shape)}: {', '.join(map(str, sides))}" for shape, sides in left_out.items()
        )
        say(
            f"Sides without a factor, by the shape of the block ({named}); see the settings "
            "max_factor_ratio and large_dim."
        )
    above = report.gib_sent / report.least_gib_sent - 1.0 if report.least_gib_sent else 0.0
    say(
        f"All ranks send {four_digits(report.gib_sent)} GiB per step, {above:.1%} more than if "
        "every block were owned by a rank that holds most of it "
        f"({four_digits(report.least_gib_sent)} GiB)."
    )
    color = "green" if report.worst[2] <= EVEN else "yellow"
    say(f"[{color}]Balance:[/{color}] {report.reason()}.")


def _table_of_ranks(report: PlanReport) -> Table:
    table = titled_table("Per rank", "", *number_columns("min", "mean", "max", "max / mean"))
    for name, values in report.per_rank.items():
        spread = map(four_digits, spread_of(values).values())
        table.add_row(_QUANTITIES[name], *spread, f"{max_over_mean(values):.3f}")
    return table


def _table_of_shapes(report: PlanReport) -> Table:
    heads = ("number", "GFLOP every step", "GFLOP of a refresh", "MiB of state")
    table, costs = (
        titled_table("Blocks", "shape", *number_columns(*heads)),
        BlockCosts(report.settings),
    )
    for shape, number in report.blocks_by_shape.items():
        every, refresh, state = costs[shape]
        numbers = map(four_digits, (every / 1e9, refresh / 1e9, state / 2**20))
        table.add_row(times(shape), f"{number:,}", *numbers)
    return table


def _table_of_phases(report: PlanReport) -> Table:
    ratios = [max_over_mean(loads) for loads in report.phases]
    order = list(range(len(ratios)))
    title = "Load per refresh phase"
    if len(order) > _PHASES_SHOWN:
        title += f", the {_PHASES_SHOWN} least even of {len(order)}"
        order.sort(key=lambda phase: -ratios[phase])
    heads = ("blocks refreshed", "GFLOP, mean", "GFLOP, max", "max / mean")
    table = titled_table(title, "phase", *number_columns(*heads))
    for phase in order[:_PHASES_SHOWN]:
        _, mean, most = map(four_digits, spread_of(report.phases[phase]).values())
        refreshed = f"{report.refreshed[phase]:,}"
        table.add_row(str(phase), refreshed, mean, most, f"{ratios[phase]:.3f}")
    return table
