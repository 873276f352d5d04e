"""A plan as tables for people."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.plan_figures import QUANTITIES
from shampoo_fsdp.tools.tables import four_digits, number_columns, titled_table

__all__ = ["print_plan"]

_PHASES_SHOWN = 20


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Tables for people.

    Args:
        plan: see :func:`shampoo_fsdp.tools.plan_figures.plan_figures`; with a "step" on GPUs, see
            :func:`shampoo_fsdp.tools.dry_step.model_step`.
    """
    say = partial(console.print, highlight=False)
    share = plan["elements_preconditioned"] / max(plan["elements"], 1)
    repeated = ", and every other replica repeats the work"
    say(f"[bold]{plan['title']}[/bold]")
    say(
        f"{plan['ranks']:,} ranks on {plan['nodes']:,} nodes share the blocks"
        f"{repeated if plan['owner_scope'] == 'shard' else ''}. Shampoo preconditions "
        f"{plan['parameters_preconditioned']:,} of {plan['parameters']:,} parameters ({share:.1%} "
        f"of {plan['elements'] / 1e9:,.3g} billion elements); Adam updates the others."
    )
    if plan["chosen_by_device"]:
        say(f"It would choose {plan['chosen_by_device']}.")
    for table in (_table_of_ranks(plan), _table_of_shapes(plan), _table_of_phases(plan)):
        say(table)
    if left_out := plan["sides_without_factor"]:
        named = "; ".join(f"{s}: {', '.join(map(str, sides))}" for s, sides in left_out.items())
        say(
            f"Sides without a factor, by the shape of the block ({named}); see the settings "
            "max_factor_ratio and large_dim."
        )
    sent, least = plan["gib_sent_by_all_ranks"], plan["least_gib_sent_by_all_ranks"]
    say(
        f"All ranks send {four_digits(sent)} GiB per step, "
        f"{sent / least - 1.0 if least else 0.0:.1%} more than if every block were owned by a rank "
        f"that holds most of it ({four_digits(least)} GiB)."
    )
    color = "green" if plan["even"] else "yellow"
    say(f"[{color}]Balance:[/{color}] {plan['worst_rank']['reason']}.")
    if "step" in plan:
        _print_step(plan["step"], plan["settings"]["precondition_frequency"], say)


def _print_step(step: dict[str, Any], frequency: int, say: Callable[[Any], None]) -> None:
    machine, training = Machine(**step["machine"]), step["training_ms"]
    table = titled_table(f"A step of rank {step['rank']}, as modelled", "", *number_columns("ms"))
    for part, took in (step["parts"] | {"waiting for the network": step["waited"]}).items():
        table.add_row(part, f"{took:,.2f}")
    table.add_section()
    table.add_row("optimizer", f"{step['ms']:,.2f}")
    shared = f", on {step['sharing']} GPUs" if step["sharing"] > 1 else ""
    tokens = f"{machine.tokens:,g} tokens per data-parallel rank{shared}"
    table.add_row(f"forward and backward: {tokens}", f"{training:,.1f}")
    say(table)
    less = (step["ms"] - step["parts"].get("roots", 0.0) / 2) / training
    say(
        f"The optimizer takes [bold]{step['share']:.2%}[/bold] of the time of forward and "
        f"backward; {less:.2%} with precondition_frequency = {2 * frequency} (now {frequency}), "
        f"{step['share'] / 2:.2%} with twice the tokens. It launches {step['kernels']:,} kernels, "
        f"for which the host takes {1e-3 * machine.host_launch * step['kernels']:,.0f} ms, and "
        f"needs {four_digits(step['peak_bytes'] / 2**30)} GiB at its peak beside parameters, "
        "gradients and state."
    )
    say(f"Assumed (options of these names): {machine}.")


def _table_of_ranks(plan: dict[str, Any]) -> Table:
    table = titled_table("Per rank", "", *number_columns("min", "mean", "max", "max / mean"))
    for name, spread in plan["per_rank"].items():
        figures = map(four_digits, spread.values())
        table.add_row(QUANTITIES[name], *figures, f"{plan['imbalance'][name]:.3f}")
    return table


def _table_of_shapes(plan: dict[str, Any]) -> Table:
    heads = ("number", "GFLOP every step", "GFLOP of a refresh", "MiB of state")
    table = titled_table("Blocks", "shape", *number_columns(*heads))
    for shape, number in plan["blocks_by_shape"].items():
        every, refresh, state = plan["block_costs"][shape].values()
        numbers = map(four_digits, (every / 1e9, refresh / 1e9, state / 2**20))
        table.add_row(shape, f"{number:,}", *numbers)
    return table


def _table_of_phases(plan: dict[str, Any]) -> Table:
    phases = plan["phases"]
    ratios = [plan["imbalance"][f"gflop_in_phase_{i}"] for i in range(len(phases))]
    order = sorted(range(len(phases)), key=lambda phase: -ratios[phase])[:_PHASES_SHOWN]
    title = f"Load per refresh phase, the least even of {len(phases)} first"
    heads = ("blocks refreshed", "GFLOP, mean", "GFLOP, max", "max / mean")
    table = titled_table(title, "phase", *number_columns(*heads))
    for i in order:
        _, mean, most = map(four_digits, phases[i]["gflop"].values())
        refreshed = f"{phases[i]['blocks_refreshed']:,}"
        table.add_row(str(i), refreshed, mean, most, f"{ratios[i]:.3f}")
    return table
