"""What the two commands that plan say: for people in the terminal, on a page, or as JSON."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from shampoo_fsdp.tools import page
from shampoo_fsdp.tools.dry_step import model_step
from shampoo_fsdp.tools.machine import Machine, add_rates, machine_of
from shampoo_fsdp.tools.plan_figures import QUANTITIES, JobPlan, fit_of
from shampoo_fsdp.tools.tables import Part, Table, four_digits, print_json, print_parts

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
        pictures = list(_maps(job))
        if "step" in plan:
            others = {
                f"{name} = {value}": _with_step(job.with_setting(name, value), machine, sharing)
                for name, value in _other_settings(job)
            }
            pictures = [*_comparison({"this plan": plan, **others}), *pictures]
        page.write_report(Path(options["html"]), plan["title"], _parts(plan), pictures)
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
    print_parts([f"{plan['title']}:", *_parts(plan)], console)


def _parts(plan: Mapping[str, Any]) -> Iterator[Part]:
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
        yield _what_fits({name: four_digits(gib) for name, gib in plan["fit"].items()}, plan["fit"])
    yield _table_of_ranks(plan)
    yield _table_of_shapes(plan)
    yield _table_of_phases(plan)
    if len(stages := plan["stages"]) > 1:
        loads = [stage["gflop_per_step"] for stage in stages]
        yield (
            f"Of {len(stages)} pipeline stages the dearest is number {loads.index(max(loads))}: "
            f"{four_digits(max(loads))} GFLOP per rank and step, "
            f"{max(loads) * len(loads) / (sum(loads) or 1.0):.3f} x the mean of all."
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


def _what_fits(said: Mapping[str, str], fit: Mapping[str, float]) -> str:
    names = "parameters", "gradients", "state", "connections"
    return (
        f"It {'fits' if fit['left'] > fit['step'] else 'does not fit'} into {said['gpu']} GiB of a "
        f"GPU: {', '.join(f'{name} {said[name]}' for name in names)} GiB, the first two in fp32. "
        f"{said['left']} GiB are left for activations and, when these are free, for the "
        f"optimizer's step, which needs {said['step']}."
    )


def _parts_of_step(step: Mapping[str, Any], frequency: int) -> Iterator[Part]:
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
    rows = []
    for i, phase in enumerate(plan["phases"]):
        _, mean, most = map(four_digits, phase["gflop"].values())
        ratio = f"{plan['imbalance'][f'gflop_in_phase_{i}']:.3f}"
        rows.append((str(i), f"{phase['blocks_refreshed']:,}", mean, most, ratio))
    rows.sort(key=lambda row: -float(row[-1]))
    heads = "phase", "blocks refreshed", "GFLOP, mean", "GFLOP, max", "max / mean"
    title = f"Load per refresh phase, the least even of {len(rows)} first"
    return Table(title, heads, rows[:_PHASES_SHOWN])


def _other_settings(job: JobPlan) -> list[tuple[str, Any]]:
    """Of which the page says what they would change."""
    others = {"communication_dtype": "bfloat16", "memory": "low"}
    changed = [
        (name, value) for name, value in others.items() if getattr(job.config, name) != value
    ]
    return [*changed, ("precondition_frequency", 2 * job.config.precondition_frequency)]


def _comparison(plans: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Pictures of a plan, the first, beside what other settings make of it."""
    plan = next(iter(plans.values()))
    kept = ("parameters", "gradients", "state", "connections", "step")
    fits = {name: {kind: of["fit"][kind] for kind in kept} for name, of in plans.items()}
    adamw = dict.fromkeys(("parameters", "gradients"), plan["fit"]["parameters"])
    fits["AdamW"] = adamw | {"state": plan["per_rank"]["adamw_state_gib"]["max"]}
    yield "<h2>What fits into a GPU</h2>" + page.bars(fits, "GiB per rank", plan["fit"]["gpu"])
    yield page.paragraph("The dashed line is the memory of the GPU.")
    steps = {n: of["step"]["parts"] | {"waiting": of["step"]["waited"]} for n, of in plans.items()}
    yield "<h2>Where the time of a step goes</h2>" + page.bars(steps, "ms")
    heads = (
        "settings",
        "step, ms",
        "of forward and backward",
        "state, GiB",
        "left, GiB",
        "sent, GiB",
    )
    rows = []
    for name, of in plans.items():
        sent = of["gib_sent_by_all_ranks"] / of["ranks"]
        gib = map(four_digits, (of["fit"]["state"], of["fit"]["left"], sent))
        rows.append((name, f"{of['step']['ms']:,.1f}", f"{of['step']['share']:.2%}", *gib))
    yield page.table(Table("What another setting would change", heads, rows))


def _maps(job: JobPlan) -> Iterator[str]:
    if owners := job.owners():
        drawn = page.maps(owners, "rank", "blocks along the columns", "along the rows")
        yield f"<h2>Who owns the blocks of a layer</h2>{drawn}"
    load = page.maps({"": job.loads()}, "load / mean", "rank", "refresh phase")
    yield f"<h2>Load of each rank in each refresh phase</h2>{load}"
