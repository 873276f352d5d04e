"""What a plan means for each rank, as figures: before the job runs, on any machine.

A job has one plan for each set of parameters that share their ranks (the stages of a pipeline
have one each); a rank's figures are the sums over its plans.
"""

import dataclasses
import itertools
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ParameterSpec, shard_rectangle, volume
from shampoo_fsdp.plan.totals import Totals
from shampoo_fsdp.rules.costs import BlockCosts
from shampoo_fsdp.rules.device import on_device, reasons
from shampoo_fsdp.rules.factors import sides_without_factor
from shampoo_fsdp.rules.precision import torch_dtype
from shampoo_fsdp.runtime.choice import is_preconditioned
from shampoo_fsdp.tools.tables import times
from shampoo_fsdp.validation import refuse, unmatched

__all__ = ["EVEN", "PlanReport", "max_over_mean", "spread_of"]

_GIB = 2**30
# Rows below this cost over 1 byte per element.
_NARROW = 16
# Up to this ratio of the largest load to the mean the work counts as even.
EVEN = 1.05


class PlanReport:
    """Figures of all ranks of a job. GiB are 2^30 bytes, GFLOP 10^9 operations."""

    def __init__(
        self,
        title: str,
        models: Sequence[Sequence[ParameterSpec]],
        config: ShampooConfig,
        device: str = "cuda",
    ) -> None:
        """
        Args:
            title: what the job is, for the head of the report.
            models: the parameters of each optimizer of the job, the excluded ones included: one
                list, or one for each part of the model under pipeline parallelism.
            device: type of what it will run on, which decides about settings that are None.

        Raises:
            ValueError: as :func:`shampoo_fsdp.plan.transfers.make_plan`, or if an expression of
                `split_heads` or `exclude` matches nothing.
        """
        self.chosen_by_device = reasons(config, torch.device(device))
        config = on_device(config, torch.device(device))
        specs = list(itertools.chain.from_iterable(models))
        assignments = [of for members in models for of in _assignments(members, config)]
        names = [spec.name for of in assignments for spec in of.parameters]
        for pattern in unmatched(config.split_heads, names):
            refuse("split_heads", pattern, "what the name of a preconditioned parameter matches")
        for pattern in unmatched(config.excluded_names, [spec.name for spec in specs]):
            if pattern in config.exclude:
                refuse("exclude", pattern, "what the name of a parameter matches")
        plans = [Totals(assignment) for assignment in assignments]
        excluded = [spec for spec in specs if not is_preconditioned(spec.name, spec.shape, config)]
        numbers = _GIB / torch_dtype(config.communication_dtype).itemsize  # in a GiB that is sent
        self.title = title
        self.settings = config
        self.ranks = tuple(sorted({rank for part in plans or specs for rank in part.ranks}))
        """Ascending. Where replicas repeat the work, those of the first one: others are alike."""
        self.parameters = len(specs)
        self.parameters_preconditioned = self.parameters - len(excluded)
        self.elements = sum(math.prod(spec.shape) for spec in specs)
        left_out = sum(math.prod(spec.shape) for spec in excluded)
        self.elements_preconditioned = self.elements - left_out
        shapes = Counter(of.sites[site].shape for of in assignments for site in of.site_of)
        self.blocks_by_shape = dict(shapes.most_common())
        """Without batch dimensions, the most frequent first."""
        state = [*_adam_bytes(excluded), *((plan.ranks, plan.state) for plan in plans)]
        near = [(plan.ranks, map(operator.sub, plan.sent, plan.across)) for plan in plans]
        far = [(plan.ranks, plan.across) for plan in plans]
        self.per_rank: dict[str, list[float]] = {
            "gflop_per_step": self._sums([(plan.ranks, plan.load) for plan in plans], 1e9),
            "blocks": self._sums([(plan.ranks, plan.owned) for plan in plans], 1),
            "state_gib": self._sums(state, _GIB),
            "adamw_state_gib": self._sums(_adam_bytes(specs), _GIB),
            "gib_sent_inside_node": self._sums(near, numbers),
            "gib_sent_across_nodes": self._sums(far, numbers),
        }
        """For each quantity its value on each rank."""
        self.phases = [
            self._sums([(plan.ranks, [r[phase] for r in plan.phase_load]) for plan in plans], 1e9)
            for phase in range(config.precondition_frequency)
        ]
        """For each refresh phase and rank the GFLOP of a step."""
        self.refreshed = [sum(p.refreshed[i] for p in plans) for i in range(len(self.phases))]
        """For each phase the number of blocks that its steps refresh."""
        self.gib_sent = sum(sum(plan.sent) for plan in plans) / numbers
        """By all ranks together, per step."""
        self.least_gib_sent = sum(plan.least_sent for plan in plans) / numbers
        """The same if every block were owned by a rank that holds most of it."""
        self.groups = len({plan.ranks for plan in plans})
        """How many sets of ranks share blocks among themselves; as many as stages of a pipeline."""
        self.narrow_rows: dict[int, list[str]] = defaultdict(list)
        """Names of parameters whose rows are narrow, by their width (see
        :class:`shampoo_fsdp.plan.shards.ShardMap`): they cost 16 / width bytes per element."""
        for assignment in assignments:
            for spec, shard_map in zip(assignment.parameters, assignment.maps, strict=True):
                if (width := shard_map.row_width) < _NARROW:
                    self.narrow_rows[width].append(spec.name)
        loads = [x for plan in plans for x in (plan.load, *zip(*plan.phase_load, strict=True))]
        self.load_over_mean_in_groups = max(map(max_over_mean, loads), default=1.0)
        """The largest load of a rank over the mean of its own set, on average or in a phase."""

    def _sums(
        self, parts: Iterable[tuple[Sequence[int], Iterable[float]]], unit: float
    ) -> list[float]:
        """What each rank has of all parts, which are ranks and their values, in units."""
        sums = dict.fromkeys(self.ranks, 0.0)
        for ranks, values in parts:
            for rank, value in zip(ranks, values, strict=True):
                if rank in sums:
                    sums[rank] += value
        return [total / unit for total in sums.values()]

    @property
    def imbalance(self) -> dict[str, float]:
        """Every quantity's largest value on a rank over its mean; 1.0 is even."""
        phases = {f"gflop_in_phase_{p}": loads for p, loads in enumerate(self.phases)}
        return {name: max_over_mean(values) for name, values in (self.per_rank | phases).items()}

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
            "owner_scope": self.settings.owner_scope,
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
            "narrow_rows": {str(width): len(names) for width, names in self.narrow_rows.items()},
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


def _assignments(specs: Sequence[ParameterSpec], config: ShampooConfig) -> list[Assignment]:
    sharing: dict[tuple[int, ...], list[ParameterSpec]] = defaultdict(list)
    for spec in specs:
        if is_preconditioned(spec.name, spec.shape, config):
            sharing[tuple(sorted(spec.ranks))].append(spec)
    costs = BlockCosts(config)
    return [Assignment(members, config, costs, ranks[0]) for ranks, members in sharing.items()]


def _adam_bytes(specs: Sequence[ParameterSpec]) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Bytes of Adam's two moments, in fp32: ranks and what each has, layout after layout."""
    layouts = Counter((s.shape, s.ranks, s.mesh_shape, s.placements) for s in specs)
    for (shape, ranks, mesh_shape, placements), number in layouts.items():
        coordinates = itertools.product(*map(range, mesh_shape))
        shards = [shard_rectangle(shape, mesh_shape, placements, c) for c in coordinates]
        yield ranks, [2 * torch.float32.itemsize * number * volume(shard) for shard in shards]


def max_over_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def spread_of(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
