"""What the two commands that plan say: for people in the terminal, on a page, or as JSON."""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from shampoo_fsdp.tools import page
from shampoo_fsdp.tools.dry_step import model_step
from shampoo_fsdp.tools.machine import Machine, add_rates, machine_of
from shampoo_fsdp.tools.plan_figures import QUANTITIES, JobPlan, fit_of
from shampoo_fsdp.tools.tables import Table, for_terminal, four_digits, print_json, without_numbers

__all__ = ["add_plan_options", "print_plan", "report_plan"]

_PHASES_SHOWN = 20


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add those of :func:`report_plan`."""
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("--json", action="store_true", default=False, help="figures as JSON")
    parser.add_argument("--html", default=None, metavar="FILE", help="a page with pictures, too")
    add_rates(parser)


def report_plan(job: JobPlan, options: dict[str, Any], sharing: int) -> None:
    """Print a plan, on a GPU with a step and what fits, and write its page.

    Args:
        options: those of :func:`add_plan_options`.
        sharing: GPUs of a data-parallel rank, see :meth:`Machine.training_step`.

    Raises:
        ValueError: a rate is not positive, or the page cannot be written.
    """
    machine = machine_of(options)
    plan = _with_step(job, machine, sharing)
    if options["html"]:
        others = {}
        for settings in _other_settings(job) if "step" in plan else ():
            name = ", ".join(f"{name} = {value}" for name, value in settings.items())
            other = JobPlan(
                name, job.models, dataclasses.replace(job.given, **settings), job.device
            )
            others[name] = _with_step(other, machine, sharing)
        _write_page(Path(options["html"]), job, plan, others)
    if options["json"]:
        print_json(plan)
    else:
        print_plan(plan, Console())


def _with_step(job: JobPlan, machine: Machine, sharing: int) -> dict[str, Any]:
    if job.device != "cuda":
        return job.figures
    step = model_step(job, machine, sharing)
    return job.figures | {"step": step, "fit": fit_of(job.figures, step)}


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Tables for people.

    Args:
        plan: see :attr:`shampoo_fsdp.tools.plan_figures.JobPlan.figures`; with a "step" on GPUs,
            see :func:`shampoo_fsdp.tools.dry_step.model_step`, and what fits, see
            :func:`shampoo_fsdp.tools.plan_figures.fit_of`.
    """
    console.print(f"[bold]{escape(plan['title'])}[/bold]", highlight=False)
    for part in _parts(plan):
        if isinstance(part, Table):
            console.print(for_terminal(part))
        else:
            console.print(escape(part), highlight=False)


def _parts(plan: Mapping[str, Any]) -> Iterator[str | Table]:
    share = plan["elements_preconditioned"] / max(plan["elements"], 1)
    repeated = ", and every other replica repeats the work"
    yield (
        f"{plan['ranks']:,} ranks on {plan['nodes']:,} nodes share the blocks"
        f"{repeated if plan['owner_scope'] == 'shard' else ''}. Shampoo preconditions "
        f"{plan['parameters_preconditioned']:,} of {plan['parameters']:,} parameters ({share:.1%} "
        f"of {plan['elements'] / 1e9:,.3g} billion elements); Adam updates the others."
    )
    if plan["chosen_by_device"]:
        yield f"It would choose {plan['chosen_by_device']}."
    if "fit" in plan:
        yield _what_fits(plan["fit"])
    yield _table_of_ranks(plan)
    yield _table_of_shapes(plan)
    yield _table_of_phases(plan)
    if len(stages := plan["stages"]) > 1:
        dearest = max(range(len(stages)), key=lambda k: stages[k]["gflop_per_step"])
        loads = [stage["gflop_per_step"] for stage in stages]
        yield (
            f"Of {len(stages)} pipeline stages the dearest is number {dearest}: "
            f"{four_digits(loads[dearest])} GFLOP per rank and step, "
            f"{loads[dearest] * len(loads) / (sum(loads) or 1.0):.3f} x the mean of all."
        )
    if left_out := plan["sides_without_factor"]:
        named = "; ".join(f"{s}: {', '.join(map(str, sides))}" for s, sides in left_out.items())
        yield (
            f"Sides without a factor, by the shape of the block ({named}); see the settings "
            "max_factor_ratio and large_dim."
        )
    sent, least = plan["gib_sent_by_all_ranks"], plan["least_gib_sent_by_all_ranks"]
    yield (
        f"All ranks send {four_digits(sent)} GiB per step, "
        f"{sent / least - 1.0 if least else 0.0:.1%} more than if every block were owned by a rank "
        f"that holds most of it ({four_digits(least)} GiB)."
    )
    yield f"Balance: {plan['worst_rank']['reason']}."
    if "step" in plan:
        yield from _parts_of_step(plan["step"], plan["settings"]["precondition_frequency"])


def _what_fits(fit: Mapping[str, float]) -> str:
    names = "parameters", "gradients", "state", "connections"
    kept = ", ".join(f"{name} {four_digits(fit[name])}" for name in names)
    fits = "It fits" if fit["left"] > fit["step"] else "It does not fit"
    left = (
        f"leaves {four_digits(fit['left'])} GiB to activations and, when these are free, to the "
        f"optimizer's step, which needs {four_digits(fit['step'])}"
    )
    if fit["left"] < 0.0:
        left = f"is {four_digits(-fit['left'])} GiB too much"
    return (
        f"{fits} into {four_digits(fit['gpu'])} GiB of a GPU: {kept} GiB, the first two in fp32. "
        f"That {left}."
    )


def _parts_of_step(step: Mapping[str, Any], frequency: int) -> Iterator[str | Table]:
    machine, training = Machine(**step["machine"]), step["training_ms"]
    parts = step["parts"] | {"waiting for the network": step["waited"], "optimizer": step["ms"]}
    shared = f", on {step['sharing']} GPUs" if step["sharing"] > 1 else ""
    tokens = f"{machine.tokens:,g} tokens per data-parallel rank{shared}"
    rows = [(part, f"{took:,.2f}") for part, took in parts.items()]
    rows.append((f"forward and backward: {tokens}", f"{training:,.1f}"))
    yield Table(f"A step of rank {step['rank']}, as modelled", ("", "ms"), rows)
    less = (step["ms"] - step["parts"].get("roots", 0.0) / 2) / training
    yield (
        f"The optimizer takes {step['share']:.2%} of the time of forward and backward; {less:.2%} "
        f"with precondition_frequency = {2 * frequency} (now {frequency}), {step['share'] / 2:.2%} "
        f"with twice the tokens. It launches {step['kernels']:,} kernels, for which the host takes "
        f"{1e-3 * machine.host_launch * step['kernels']:,.0f} ms."
    )
    yield f"Assumed (options of these names): {machine}."


def _table_of_ranks(plan: Mapping[str, Any]) -> Table:
    rows = [
        (QUANTITIES[name], *map(four_digits, spread.values()), f"{plan['imbalance'][name]:.3f}")
        for name, spread in plan["per_rank"].items()
    ]
    return Table("Per rank", ("", "min", "mean", "max", "max / mean"), rows)


def _table_of_shapes(plan: Mapping[str, Any]) -> Table:
    rows = []
    for shape, number in plan["blocks_by_shape"].items():
        every, refresh, state = plan["block_costs"][shape].values()
        numbers = map(four_digits, (every / 1e9, refresh / 1e9, state / 2**20))
        rows.append((shape, f"{number:,}", *numbers))
    heads = "shape", "number", "GFLOP every step", "GFLOP of a refresh", "MiB of state"
    return Table("Blocks", heads, rows)


def _table_of_phases(plan: Mapping[str, Any]) -> Table:
    phases = plan["phases"]
    ratios = [plan["imbalance"][f"gflop_in_phase_{i}"] for i in range(len(phases))]
    rows = []
    for i in sorted(range(len(phases)), key=lambda phase: -ratios[phase])[:_PHASES_SHOWN]:
        _, mean, most = map(four_digits, phases[i]["gflop"].values())
        rows.append((str(i), f"{phases[i]['blocks_refreshed']:,}", mean, most, f"{ratios[i]:.3f}"))
    title = f"Load per refresh phase, the least even of {len(phases)} first"
    return Table(
        title, ("phase", "blocks refreshed", "GFLOP, mean", "GFLOP, max", "max / mean"), rows
    )


def _other_settings(job: JobPlan) -> Iterator[dict[str, Any]]:
    """Of which the page says what they would change."""
    if job.config.communication_dtype != "bfloat16":
        yield {"communication_dtype": "bfloat16"}
    if job.config.memory != "low":
        yield {"memory": "low"}
    yield {"precondition_frequency": 2 * job.config.precondition_frequency}


def _write_page(
    path: Path, job: JobPlan, plan: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]
) -> None:
    drawn: list[str] = []
    if "step" in plan:
        all_of_them = {"this plan": plan, **others}
        fits = {name: dict(of["fit"]) for name, of in all_of_them.items()}
        gpu = plan["fit"]["gpu"]
        for fit in fits.values():
            del fit["gpu"], fit["left"]
        adamw = dict.fromkeys(("parameters", "gradients"), plan["fit"]["parameters"])
        fits["AdamW"] = adamw | {"state": plan["per_rank"]["adamw_state_gib"]["max"]}
        steps = {
            n: of["step"]["parts"] | {"waiting": of["step"]["waited"]}
            for n, of in all_of_them.items()
        }
        heads = (
            "settings",
            "step, ms",
            "of forward and backward",
            "state, GiB",
            "left, GiB",
            "sent, GiB",
        )
        rows = [
            (
                name,
                f"{of['step']['ms']:,.1f}",
                f"{of['step']['share']:.2%}",
                *(four_digits(of["fit"][kind]) for kind in ("state", "left")),
                four_digits(of["gib_sent_by_all_ranks"] / of["ranks"]),
            )
            for name, of in all_of_them.items()
        ]
        drawn = [
            "<h2>What fits into a GPU</h2>" + page.bars(fits, "GiB per rank", gpu),
            page.paragraph("The dashed line is the memory of the GPU."),
            "<h2>Where the time of a step goes</h2>" + page.bars(steps, "ms"),
            page.table(Table("What another setting would change", heads, rows)),
        ]
    owners = page.maps(_owners(job), "rank", "blocks along the columns", "along the rows")
    load = page.maps({"": job.loads()}, "load / mean", "rank", "refresh phase")
    pictures = [f"<h2>Who owns the blocks of a layer</h2>{owners}"] if owners else []
    pictures.append(f"<h2>Load of each rank in each refresh phase</h2>{load}")
    page.write_report(path, plan["title"], _parts(plan), [*drawn, *pictures])


def _owners(job: JobPlan) -> dict[str, list[list[float]]]:
    """For the first parameter of each kind the rank that owns each of its blocks; of experts those
    of the first."""
    found: dict[str, list[list[float]]] = {}
    kinds = set()
    for of in job.assignments:
        for spec, shard_map, first in zip(of.parameters, of.maps, of.first, strict=True):
            kind = without_numbers(spec.name)
            columns = shard_map.grid.tiles[-1]
            rows = shard_map.grid.tiles[-2] if len(shard_map.grid.tiles) > 1 else 1
            if kind in kinds or rows * columns == 1:
                continue
            kinds.add(kind)
            ranks = [float(of.ranks[owner]) for owner in of.owners[first : first + rows * columns]]
            found[spec.name] = [ranks[row * columns :][:columns] for row in range(rows)]
    return dict(list(found.items())[:8])
