"""What a plan means for each rank, as figures: before the job runs, on any machine.

A job has one plan for each set of parameters that share their ranks (the stages of a pipeline
have one each); a rank's figures are the sums over its plans.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import sub
from typing import Any

import torch

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ParameterSpec, shard_rectangle, volume
from shampoo_fsdp.plan.totals import Totals
from shampoo_fsdp.rules.device import on_device, reasons
from shampoo_fsdp.rules.layout import block_costs
from shampoo_fsdp.rules.matrices import sides_without_factor, torch_dtype
from shampoo_fsdp.runtime.choice import excluded_names, is_preconditioned
from shampoo_fsdp.tools.tables import times, without_numbers
from shampoo_fsdp.validation import refuse, unmatched

__all__ = ["JobPlan", "fit_of"]

QUANTITIES = {
    "gflop_per_step": "load, GFLOP per step",
    "blocks": "blocks",
    "state_gib": "state with Shampoo, GiB",
    "adamw_state_gib": "state with AdamW, GiB",
    "gib_sent_inside_node": "sent within node, GiB a step",
    "gib_sent_across_nodes": "sent to other nodes, GiB a step",
    "peers": "ranks it exchanges with",
    "connections_mib": "their connections (NCCL), MiB",
}
"""What each rank has, in words."""

_GIB = 2**30
_PHASE = "gflop_in_phase_"
_COSTS = ("flop", "refresh_flop", "state_bytes")
# Up to this ratio of the largest load to the mean the work counts as even.
_EVEN = 1.05


class JobPlan:
    """Who owns what in a job, on all ranks."""

    def __init__(
        self,
        title: str,
        models: Sequence[Sequence[ParameterSpec]],
        config: ShampooConfig,
        device: str = "cuda",
        known: Sequence[Assignment] = (),
    ) -> None:
        """
        Args:
            title: what the job is, for the head of the report.
            models: the parameters of each optimizer of the job, the excluded ones included: one
                list, or one for each part of the model under pipeline parallelism.
            device: type of what it will run on, which decides about settings that are None.
            known: the assignments, of settings that make no other ones.

        Raises:
            ValueError: as :class:`shampoo_fsdp.plan.assignment.Assignment`, or if an expression of
                `split_heads` or `exclude` matches nothing.
        """
        self.title, self.models, self.given, self.device = title, models, config, device
        self.chosen_by_device = reasons(config, torch.device(device))
        self.config = config = on_device(config, torch.device(device))
        self.assignments = [_with_config(of, config) for of in known]
        if not known:
            self.assignments = [of for members in models for of in _assignments(members, config)]
        self.specs = list(itertools.chain.from_iterable(models))
        names = [spec.name for of in self.assignments for spec in of.parameters]
        for pattern in unmatched(config.split_heads, names):
            refuse("split_heads", pattern, "what the name of a preconditioned parameter matches")
        for pattern in unmatched(excluded_names(config), [spec.name for spec in self.specs]):
            if pattern in config.exclude:
                refuse("exclude", pattern, "what the name of a parameter matches")
        self.excluded = [s for s in self.specs if not is_preconditioned(s.name, s.shape, config)]
        self.totals = [Totals(assignment) for assignment in self.assignments]
        self.ranks = sorted({rank for of in self.totals or self.specs for rank in of.ranks})
        """Those that share blocks; where replicas repeat the work those of the first one, as others
        are alike."""
        self.values = _values_of(self)
        """What each rank has of each quantity, the work in each refresh phase included."""

    @functools.cached_property
    def figures(self) -> dict[str, Any]:
        """For people and programs: plain dicts, lists, strings and numbers.

        GiB are 2^30 bytes, GFLOP 10^9 operations. "least_gib_sent_by_all_ranks" is what would be
        sent if every block were owned by a rank that holds most of it.
        """
        return _figures_of(self)

    def with_setting(self, name: str, value: Any) -> "JobPlan":
        """The same job with another value of a setting."""
        given = dataclasses.replace(self.given, **{name: value})
        known = self.assignments if name in ("communication_dtype", "memory") else ()
        return JobPlan(self.title, self.models, given, self.device, known)

    def loads(self) -> list[list[float]]:
        """For each refresh phase each rank's work on its steps by the mean."""
        phases = [self.values[f"{_PHASE}{i}"] for i in range(self.config.precondition_frequency)]
        means = [sum(of_ranks) / len(of_ranks) or 1.0 for of_ranks in phases]
        return [[load / mean for load in of] for of, mean in zip(phases, means, strict=True)]

    def owners(self) -> dict[str, list[list[float]]]:
        """For the first parameter of each kind the rank that owns each of its blocks; of experts
        those of the first, and of eight kinds."""
        found: dict[str, tuple[str, list[list[float]]]] = {}
        for of in self.assignments:
            for spec, shard_map, first in zip(of.parameters, of.maps, of.first, strict=True):
                *_, rows, columns = 1, *shard_map.grid.tiles
                blocks = of.owners[first : first + rows * columns]
                owners = [float(of.ranks[owner]) for owner in blocks]
                if len(blocks) > 1:
                    lines = [owners[row * columns :][:columns] for row in range(rows)]
                    found.setdefault(without_numbers(spec.name), (spec.name, lines))
        return dict(list(found.values())[:8])


def fit_of(figures: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, float]:
    """GiB of the rank that has most of each: "parameters" and "gradients", in fp32, "state" and
    "connections"; what a "step" needs beside them at its peak; those of the "gpu"; and what is
    "left" of it when no step is taken, for activations.

    Args:
        figures: those of :attr:`JobPlan.figures`.
        step: of :func:`shampoo_fsdp.tools.dry_step.model_step`.
    """
    # Adam's moments are as large as a parameter and its gradient.
    whole = figures["per_rank"]["adamw_state_gib"]["max"]
    state, gpu = figures["per_rank"]["state_gib"]["max"], step["machine"]["gpu_memory"]
    connections = figures["per_rank"]["connections_mib"]["max"] / 1024
    return {
        "parameters": whole / 2,
        "gradients": whole / 2,
        "state": state,
        "connections": connections,
        "step": step["peak_bytes"] / _GIB,
        "gpu": gpu,
        "left": gpu - whole - state - connections,
    }


def _figures_of(job: JobPlan) -> dict[str, Any]:
    config, specs, excluded, values = job.config, job.specs, job.excluded, job.values
    plans, ranks = job.totals, job.ranks
    elements = sum(math.prod(spec.shape) for spec in specs)
    spreads = {name: _spread_of(of_ranks) for name, of_ranks in values.items()}
    ratios = {name: _max_over_mean(of_ranks) for name, of_ranks in values.items()}
    worst = max((name for name in values if name.startswith("gflop")), key=lambda n: ratios[n])
    phases = [f"{_PHASE}{i}" for i in range(config.precondition_frequency)]
    shapes = Counter(site.shape for of in job.assignments for site in of.sites)
    costs, sides = block_costs(config), {s: sides_without_factor(s, config) for s in shapes}
    place = values[worst].index(spreads[worst]["max"])
    numbers = _GIB / torch_dtype(config.communication_dtype).itemsize  # of those that travel
    figures: dict[str, Any] = {
        "title": job.title,
        "chosen_by_device": job.chosen_by_device,
        "ranks": len(ranks),
        "nodes": len({rank // config.ranks_per_node for rank in ranks}),
        "owner_scope": config.owner_scope,
        "parameters": len(specs),
        "parameters_preconditioned": len(specs) - len(excluded),
        "elements": elements,
        "elements_preconditioned": elements - sum(math.prod(spec.shape) for spec in excluded),
        "blocks": sum(shapes.values()),
        "blocks_by_shape": {times(shape): number for shape, number in shapes.most_common()},
        "block_costs": {times(s): dict(zip(_COSTS, costs(s), strict=True)) for s in shapes},
        "sides_without_factor": {times(shape): found for shape, found in sides.items() if found},
        "per_rank": {name: spread for name, spread in spreads.items() if name not in phases},
        "phases": [
            {"blocks_refreshed": sum(plan.refreshed[i] for plan in plans), "gflop": spreads[name]}
            for i, name in enumerate(phases)
        ],
        "gib_sent_by_all_ranks": sum(sum(plan.sent) for plan in plans) / numbers,
        "least_gib_sent_by_all_ranks": sum(plan.least_sent for plan in plans) / numbers,
        "imbalance": ratios,
        "even": ratios[worst] <= _EVEN,
        "worst_rank": {
            "rank": ranks[place],
            "blocks": int(values["blocks"][place]),
            "phase": phases.index(worst) if worst in phases else None,
            "load_over_mean": ratios[worst],
        },
        "stages": _stages(job),
        "settings": dataclasses.asdict(config),
    }
    figures["worst_rank"]["reason"] = _reason(figures, plans)
    return figures


def _stages(job: JobPlan) -> list[dict[str, float]]:
    """Of the parts of a pipeline, by the ranks that share them, the elements and the mean load."""
    elements: Counter[tuple[int, ...]] = Counter()
    for spec in job.specs:
        elements[tuple(sorted(spec.ranks))] += math.prod(spec.shape)
    load = dict(zip(job.ranks, job.values["gflop_per_step"], strict=True))
    result = []
    for ranks, number in elements.items():
        loads = [load[rank] for rank in ranks if rank in load]
        mean = sum(loads) / max(len(loads), 1)
        result.append({"elements": number, "gflop_per_step": mean})
    return result


def _assignments(specs: Sequence[ParameterSpec], config: ShampooConfig) -> list[Assignment]:
    sharing: dict[tuple[int, ...], list[ParameterSpec]] = defaultdict(list)
    for spec in specs:
        if is_preconditioned(spec.name, spec.shape, config):
            sharing[tuple(sorted(spec.ranks))].append(spec)
    costs = block_costs(config)
    return [Assignment(members, config, costs, ranks[0]) for ranks, members in sharing.items()]


def _with_config(assignment: Assignment, config: ShampooConfig) -> Assignment:
    """The same owners, of blocks with other costs."""
    result = copy.copy(assignment)
    result.config, result.costs = config, block_costs(config)
    return result


def _values_of(job: JobPlan) -> dict[str, list[float]]:
    config = job.config
    numbers = _GIB / torch_dtype(config.communication_dtype).itemsize
    parts: list[tuple[str, float, Sequence[int], Iterable[float]]] = []
    for plan in job.totals:
        parts += [
            ("gflop_per_step", 1e9, plan.ranks, plan.load),
            ("blocks", 1, plan.ranks, plan.owned),
            ("state_gib", _GIB, plan.ranks, plan.state),
            ("gib_sent_inside_node", numbers, plan.ranks, map(sub, plan.sent, plan.across)),
            ("gib_sent_across_nodes", numbers, plan.ranks, plan.across),
            ("peers", 1, plan.ranks, map(sum, plan.peers)),
            ("connections_mib", 1, plan.ranks, map(_connections_mib, plan.peers, repeat(plan))),
        ]
        loads = zip(*plan.phase_load, strict=True)
        parts += [(f"{_PHASE}{i}", 1e9, plan.ranks, load) for i, load in enumerate(loads)]
    parts += [("state_gib", _GIB, *moments) for moments in _adam_bytes(job.excluded)]
    parts += [("adamw_state_gib", _GIB, *moments) for moments in _adam_bytes(job.specs)]
    names = (*QUANTITIES, *(f"{_PHASE}{i}" for i in range(config.precondition_frequency)))
    sums = {name: dict.fromkeys(job.ranks, 0.0) for name in names}
    for name, unit, having, values in parts:
        for rank, value in zip(having, values, strict=True):
            if rank in sums[name]:
                sums[name][rank] += value / unit
    return {name: list(of_ranks.values()) for name, of_ranks in sums.items()}


def _connections_mib(peers: tuple[int, int], plan: Totals) -> float:
    """Memory that NCCL 2.30 takes on a GPU for what a rank exchanges with others, by its sources.

    For each channel to a rank on its node it is 12 MiB (transport/p2p.cc), for ranks on others two
    buffers of 64 MiB (transport/net.cc), however many there are. Assumed are 32 channels, of which
    a pair of ranks has all in a single node, and across nodes 4, or fewer so that those to all
    ranks are no more than 32 * 8 (graph/paths.cc).

    Args:
        peers: on its node and on others.
    """
    inside, across = peers
    channels = 32
    if across:
        channels = 4
        while channels > 1 and channels * math.ceil(len(plan.ranks) / 8) > 32:
            channels //= 2
    return 12.0 * channels * inside + (128.0 if across else 0.0)


def _adam_bytes(specs: Sequence[ParameterSpec]) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Bytes of Adam's two moments, in fp32: ranks and what each has, layout after layout."""
    layouts = Counter((s.shape, s.ranks, s.mesh_shape, s.placements) for s in specs)
    for (shape, ranks, mesh_shape, placements), number in layouts.items():
        coordinates = itertools.product(*map(range, mesh_shape))
        shards = [shard_rectangle(shape, mesh_shape, placements, c) for c in coordinates]
        yield ranks, [2 * torch.float32.itemsize * number * volume(shard) for shard in shards]


def _reason(figures: dict[str, Any], plans: Sequence[Totals]) -> str:
    """Why the rank with the most work has that much, and what can be done about it."""
    worst, settings = figures["worst_rank"], figures["settings"]
    blocks, ranks, phase = figures["blocks"], figures["ranks"], worst["phase"]
    if not blocks:
        return "nothing is preconditioned"
    when = "on average" if phase is None else f"in refresh phase {phase}"
    said = (
        f"rank {worst['rank']} has {worst['load_over_mean']:.3f} x the mean load {when}; it owns "
        f"{worst['blocks']:,} of {blocks:,} blocks, {blocks / ranks:,.2f} per rank"
    )
    groups = len({plan.ranks for plan in plans})  # as many as stages of a pipeline
    loads = [load for plan in plans for load in (plan.load, *zip(*plan.phase_load, strict=True))]
    inside = max(map(_max_over_mean, loads))
    if figures["even"]:
        return f"{said}. That is even: within {_EVEN}"
    if settings["block_alignment"] == "shard" and blocks >= ranks:
        return f"{said}. With block_alignment = 'shard' blocks stay where they lie"
    if groups > 1 and inside <= _EVEN and blocks >= ranks:
        return (
            f"{said}. Blocks cannot move between the {groups} sets of ranks that hold different "
            f"parameters, such as pipeline stages; within each set the work is even ({inside:.3f})"
        )
    idle = f" At least {ranks - blocks:,} ranks own none." if blocks < ranks else ""
    return (
        f"{said}.{idle} Blocks are whole: a smaller max_preconditioner_dim (now "
        f"{settings['max_preconditioner_dim']}) makes more and smaller ones, a smaller "
        f"precondition_frequency (now {settings['precondition_frequency']}) more refreshes per step"
    )


def _max_over_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def _spread_of(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
