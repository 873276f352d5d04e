"""What a plan means for each rank, as figures and as tables: before the job runs, on any machine.

A job has one plan for each set of parameters that share their ranks (the stages of a pipeline
have one each); a rank's figures are the sums over its plans.
"""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ParameterSpec, shard_rectangle, volume
from shampoo_fsdp.plan.totals import Totals
from shampoo_fsdp.rules.costs import BlockCosts
from shampoo_fsdp.rules.factors import sides_without_factor
from shampoo_fsdp.rules.precision import torch_dtype
from shampoo_fsdp.runtime.parameters import is_preconditioned

__all__ = ["EVEN", "PlanReport", "max_over_mean", "plan_report", "spread_of", "times"]

_GIB = 2**30
# Up to this ratio of the largest load to the mean the work counts as even.
EVEN = 1.05


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Figures of all ranks of a job. GiB are 2^30 bytes, GFLOP 10^9 operations."""

    title: str
    ranks: tuple[int, ...]
    """Ascending. Where replicas repeat the work, the ranks of the first one: others are alike."""
    owner_scope: str
    parameters: int
    parameters_preconditioned: int
    elements: int
    elements_preconditioned: int
    blocks_by_shape: Mapping[tuple[int, ...], int]
    per_rank: Mapping[str, Sequence[float]]
    """For each quantity its value on each rank."""
    phases: Sequence[Sequence[float]]
    """For each refresh phase and rank the GFLOP of a step."""
    refreshed: Sequence[int]
    """For each phase the number of blocks that its steps refresh."""
    gib_sent: float
    """By all ranks together, per step."""
    least_gib_sent: float
    """The same if every block were owned by a rank that holds most of it."""
    groups: int
    """How many sets of ranks share blocks among themselves; as many as stages of a pipeline."""
    load_over_mean_in_groups: float
    """The largest load of a rank over the mean of its own set, on average or in a phase."""
    settings: ShampooConfig

    @property
    def imbalance(self) -> dict[str, float]:
        """Every quantity's largest value on a rank over its mean; 1.0 is even."""
        ratios = {name: max_over_mean(values) for name, values in self.per_rank.items()}
        phases = {
            f"gflop_in_phase_{p}": max_over_mean(loads) for p, loads in enumerate(self.phases)
        }
        return ratios | phases

    @property
    def worst(self) -> tuple[int, int | None, float]:
        """The rank with the most work, the phase if it is in one or None for the mean of all, and
        that work over the mean."""
        loads: list[tuple[int | None, Sequence[float]]] = [(None, self.per_rank["gflop_per_step"])]
        loads += enumerate(self.phases)
        phase, load = max(loads, key=lambda entry: max_over_mean(entry[1]))
        return self.ranks[load.index(max(load))], phase, max_over_mean(load)

    def reason(self) -> str:
        """Why the rank with the most work has that much, and what can be done about it."""
        rank, phase, ratio = self.worst
        blocks, ranks = sum(self.blocks_by_shape.values()), len(self.ranks)
        if not blocks:
            return "nothing is preconditioned"
        owned = int(self.per_rank["blocks"][self.ranks.index(rank)])
        when = "on average" if phase is None else f"in refresh phase {phase}"
        worst = (
            f"rank {rank} has {ratio:.3f} x the mean load {when}; it owns {owned:,} of "
            f"{blocks:,} blocks, {blocks / ranks:,.2f} per rank"
        )
        more = (
            "a smaller max_preconditioner_dim "
            f"(now {self.settings.max_preconditioner_dim}) makes more and smaller blocks"
        )
        if blocks < ranks:
            return (
                f"{worst}. There are fewer blocks than ranks, so that {ranks - blocks:,} ranks or "
                f"more own none; {more}"
            )
        if ratio <= EVEN:
            return f"{worst}. That is even: within {EVEN}"
        if self.groups > 1 and self.load_over_mean_in_groups <= EVEN:
            return (
                f"{worst}. Blocks cannot move between the {self.groups} sets of ranks that hold "
                "different parameters, such as pipeline stages; within each set the work is even "
                f"({self.load_over_mean_in_groups:.3f})"
            )
        if self.settings.block_alignment == "shard":
            return f"{worst}. With block_alignment = 'shard' blocks stay where they lie"
        if phase is None:
            return f"{worst}. Blocks are whole; {more}"
        share = self.refreshed[phase] / ranks
        return (
            f"{worst}. A step of this phase refreshes {self.refreshed[phase]:,} blocks, "
            f"{share:,.2f} per rank, and blocks are whole: some ranks refresh "
            f"{math.ceil(share):,} or more; {more}, or a smaller precondition_frequency "
            f"(now {self.settings.precondition_frequency}) more refreshes per step"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        rank, phase, ratio = self.worst
        return {
            "title": self.title,
            "ranks": len(self.ranks),
            "owner_scope": self.owner_scope,
            "parameters": self.parameters,
            "parameters_preconditioned": self.parameters_preconditioned,
            "elements": self.elements,
            "elements_preconditioned": self.elements_preconditioned,
            "blocks": sum(self.blocks_by_shape.values()),
            "blocks_by_shape": {times(s): n for s, n in self.blocks_by_shape.items()},
            "sides_without_factor": {times(s): n for s, n in self.sides_without_factor().items()},
            "per_rank": {name: spread_of(values) for name, values in self.per_rank.items()},
            "phases": [
                {"blocks_refreshed": n, "gflop": spread_of(loads)}
                for n, loads in zip(self.refreshed, self.phases, strict=True)
            ],
            "gib_sent_by_all_ranks": self.gib_sent,
            "least_gib_sent_by_all_ranks": self.least_gib_sent,
            "imbalance": self.imbalance,
            "even": ratio <= EVEN,
            "worst_rank": {
                "rank": rank,
                "phase": phase,
                "load_over_mean": ratio,
                "reason": self.reason(),
            },
            "settings": dataclasses.asdict(self.settings),
        }

    def sides_without_factor(self) -> dict[tuple[int, ...], list[int]]:
        """For each shape of block the sides that have no factor, if there are some."""
        shapes = {s: sides_without_factor(s, self.settings) for s in self.blocks_by_shape}
        return {shape: sides for shape, sides in shapes.items() if sides}


def plan_report(
    title: str, models: Sequence[Sequence[ParameterSpec]], config: ShampooConfig
) -> PlanReport:
    """Plan all parameters of a job, the excluded ones included.

    Args:
        title: what the job is, for the head of the report.
        models: the parameters of each optimizer of the job: one list, or one for each part of the
            model under pipeline parallelism.

    Raises:
        ValueError: as :func:`shampoo_fsdp.plan.transfers.make_plan`.
    """
    specs = list(itertools.chain.from_iterable(models))
    chosen = [spec for spec in specs if is_preconditioned(spec.name, spec.shape, config)]
    assignments = [of for members in models for of in _assignments(members, config)]
    totals = [Totals(assignment) for assignment in assignments]
    ranks = tuple(sorted({rank for of in totals for rank in of.ranks}))
    ranks = ranks or tuple(sorted({rank for spec in specs for rank in spec.ranks}))

    names = {spec.name for spec in chosen}
    adam = _adam_bytes(specs, ranks)
    excluded = _adam_bytes([spec for spec in specs if spec.name not in names], ranks)
    width = torch_dtype(config.communication_dtype).itemsize
    inside: dict[int, float] = defaultdict(float)
    across: dict[int, float] = defaultdict(float)
    load: dict[int, float] = defaultdict(float)
    blocks: dict[int, int] = defaultdict(int)
    state: dict[int, float] = defaultdict(float, excluded)
    phases: list[dict[int, float]] = [
        defaultdict(float) for _ in range(config.precondition_frequency)
    ]
    for of in totals:
        for i, rank in enumerate(of.ranks):
            inside[rank] += (of.sent[i] - of.across[i]) * width
            across[rank] += of.across[i] * width
            load[rank] += of.load[i]
            blocks[rank] += of.owned[i]
            state[rank] += of.state[i]
            for phase, flops in zip(phases, of.phase_load[i], strict=True):
                phase[rank] += flops
    return PlanReport(
        title=title,
        ranks=ranks,
        owner_scope=config.owner_scope,
        parameters=len(specs),
        parameters_preconditioned=len(chosen),
        elements=sum(math.prod(spec.shape) for spec in specs),
        elements_preconditioned=sum(math.prod(spec.shape) for spec in chosen),
        blocks_by_shape=_blocks_by_shape(assignments),
        per_rank={
            "gflop_per_step": [load[rank] / 1e9 for rank in ranks],
            "blocks": [float(blocks[rank]) for rank in ranks],
            "state_gib": [state[rank] / _GIB for rank in ranks],
            "adamw_state_gib": [adam[rank] / _GIB for rank in ranks],
            "gib_sent_inside_node": [inside[rank] / _GIB for rank in ranks],
            "gib_sent_across_nodes": [across[rank] / _GIB for rank in ranks],
        },
        phases=[[phase[rank] / 1e9 for rank in ranks] for phase in phases],
        refreshed=[sum(of.refreshed[i] for of in totals) for i in range(len(phases))],
        gib_sent=sum(sum(of.sent) for of in totals) * width / _GIB,
        least_gib_sent=sum(of.least_sent for of in totals) * width / _GIB,
        groups=len({of.ranks for of in totals}),
        load_over_mean_in_groups=max(
            (
                max_over_mean(x)
                for of in totals
                for x in (of.load, *zip(*of.phase_load, strict=True))
            ),
            default=1.0,
        ),
        settings=config,
    )


def _assignments(specs: Sequence[ParameterSpec], config: ShampooConfig) -> list[Assignment]:
    sharing: dict[tuple[int, ...], list[ParameterSpec]] = defaultdict(list)
    for spec in specs:
        if is_preconditioned(spec.name, spec.shape, config):
            sharing[tuple(sorted(spec.ranks))].append(spec)
    costs = BlockCosts(config)
    return [Assignment(members, config, costs, ranks[0]) for ranks, members in sharing.items()]


def _adam_bytes(specs: Sequence[ParameterSpec], ranks: Sequence[int]) -> dict[int, float]:
    """Bytes of Adam's two moments, in fp32, on each rank."""
    layouts = Counter((s.shape, s.ranks, s.mesh_shape, s.placements) for s in specs)
    result = dict.fromkeys(ranks, 0.0)
    for (shape, members, mesh_shape, placements), number in layouts.items():
        coordinates = itertools.product(*map(range, mesh_shape))
        for rank, coordinate in zip(members, coordinates, strict=True):
            if rank in result:
                shard = shard_rectangle(shape, mesh_shape, placements, coordinate)
                result[rank] += 2 * torch.float32.itemsize * number * volume(shard)
    return result


def _blocks_by_shape(assignments: Sequence[Assignment]) -> dict[tuple[int, ...], int]:
    shapes: Counter[tuple[int, ...]] = Counter()
    grids = Counter(shard_map.grid for of in assignments for shard_map in of.maps)
    for grid, number in grids.items():
        for shape, blocks in grid.block_shapes.items():
            shapes[shape] += number * blocks
    return dict(shapes.most_common())


def max_over_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def spread_of(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
