"""A plan as tables for people."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from shampoo_fsdp.rules.costs import BlockCosts
from shampoo_fsdp.tools.plan_figures import EVEN, PlanReport, max_over_mean, spread_of
from shampoo_fsdp.tools.plan_step import ModelledStep
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


def print_plan(report: PlanReport, step: ModelledStep | None, console: Console) -> None:
    """Tables for people.

    Args:
        step: on GPUs.
    """
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
    for width, names in sorted(report.narrow_rows.items()):
        say(
            f"{names[0]}{f' and {len(names) - 1:,} others' if len(names) > 1 else ''} travel in "
            f"rows of {width} elements, since blocks and shards have no longer one in common: the "
            f"numbers of the rows add {16 / width:.3g} bytes per element, in memory and to be read "
            "on each step."
        )
    above = report.gib_sent / report.least_gib_sent - 1.0 if report.least_gib_sent else 0.0
    say(
        f"All ranks send {four_digits(report.gib_sent)} GiB per step, {above:.1%} more than if "
        "every block were owned by a rank that holds most of it "
        f"({four_digits(report.least_gib_sent)} GiB)."
    )
    color = "green" if report.worst[2] <= EVEN else "yellow"
    say(f"[{color}]Balance:[/{color}] {report.reason()}.")
    if step is not None:
        _print_step(step, report, say)


def _print_step(step: ModelledStep, report: PlanReport, say: Callable[[Any], None]) -> None:
    table = titled_table(f"A step of rank {step.rank}, as modelled", "", *number_columns("ms"))
    for part, took in (step.parts | {"waiting for the network": step.waited}).items():
        table.add_row(part, f"{took:,.2f}")
    table.add_section()
    table.add_row("optimizer", f"{step.total:,.2f}")
    shared = f", on {step.sharing} GPUs" if step.sharing > 1 else ""
    tokens = f"{step.machine.tokens:,g} tokens per data-parallel rank{shared}"
    table.add_row(f"forward and backward: {tokens}", f"{step.training:,.1f}")
    say(table)
    frequency = report.settings.precondition_frequency
    say(
        f"The optimizer takes [bold]{step.share:.2%}[/bold] of the time of forward and backward; "
        f"{step.share_with(period=2.0):.2%} with precondition_frequency = {2 * frequency} (now "
        f"{frequency}), {step.share_with(tokens=2.0):.2%} with twice the tokens. It launches "
        f"{step.kernels:,} kernels, for which the host takes "
        f"{1e-3 * step.machine.host_launch * step.kernels:,.0f} ms, and needs "
        f"{four_digits(step.peak_bytes / 2**30)} GiB at its peak beside parameters, gradients "
        "and state."
    )
    if step.decompositions:
        say(f"[yellow]Not in these times:[/yellow] {step.decompositions:,} decompositions.")
    say(f"Assumed (options of these names): {step.machine}.")


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
