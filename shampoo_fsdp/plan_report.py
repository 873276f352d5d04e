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
from rich.console import Console, Group
from rich.table import Table

from shampoo_fsdp.blocks import sides_without_factor
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.cost import block_flops
from shampoo_fsdp.layout import shard_rectangle
from shampoo_fsdp.parameters import is_preconditioned
from shampoo_fsdp.planner import ParameterSpec, Plan, make_plan
from shampoo_fsdp.shard_map import volume
from shampoo_fsdp.state_layout import state_bytes

__all__ = ["PlanReport", "plan_report"]

_GIB = 2**30
_PHASES_SHOWN = 20

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
        ratios = {name: _ratio(values) for name, values in self.per_rank.items()}
        phases = {f"gflop_in_phase_{p}": _ratio(loads) for p, loads in enumerate(self.phases)}
        return ratios | phases

    @property
    def worst(self) -> tuple[int, int | None, float]:
        """The rank with the most work, the phase if it is in one or None for the mean of all, and
        that work over the mean."""
        loads: list[tuple[int | None, Sequence[float]]] = [(None, self.per_rank["gflop_per_step"])]
        loads += enumerate(self.phases)
        phase, load = max(loads, key=lambda entry: _ratio(entry[1]))
        return self.ranks[load.index(max(load))], phase, _ratio(load)

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
        if self.settings.memory_cap is not None:
            worst += f". It has to keep to memory_cap = {self.settings.memory_cap} GiB"
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
            "blocks_by_shape": {_times(s): n for s, n in self.blocks_by_shape.items()},
            "sides_without_factor": {_times(s): n for s, n in self._without_factor().items()},
            "per_rank": {name: _spread(values) for name, values in self.per_rank.items()},
            "phases": [
                {"blocks_refreshed": n, "gflop": _spread(loads)}
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

    def print(self, console: Console) -> None:
        """Tables for people."""
        share = self.elements_preconditioned / max(self.elements, 1)
        nodes = len({rank // self.settings.ranks_per_node for rank in self.ranks})
        console.print(f"[bold]{self.title}[/bold]", highlight=False)
        console.print(
            f"{len(self.ranks):,} ranks on {nodes:,} nodes share the blocks"
            + (", and every other replica repeats the work" * (self.owner_scope == "shard"))
            + f". Shampoo preconditions {self.parameters_preconditioned:,} of "
            f"{self.parameters:,} parameters ({share:.1%} of {self.elements / 1e9:,.3g} billion "
            "elements); Adam updates the others.",
            highlight=False,
        )
        console.print(
            Group(self._table_of_ranks(), self._table_of_shapes(), self._table_of_phases())
        )
        if left_out := self._without_factor():
            named = "; ".join(f"{_times(s)}: {_listed(sides)}" for s, sides in left_out.items())
            console.print(
                f"Sides without a factor, by the shape of the block ({named}); see the settings "
                "max_factor_ratio and large_dim.",
                highlight=False,
            )
        sent, least = _number(self.gib_sent), _number(self.least_gib_sent)
        above = self.gib_sent / self.least_gib_sent - 1.0 if self.least_gib_sent else 0.0
        console.print(
            f"All ranks send {sent} GiB per step, {above:.1%} more than if every block were owned "
            f"by a rank that holds most of it ({least} GiB).",
            highlight=False,
        )
        color = "green" if self.worst[2] <= EVEN else "yellow"
        console.print(f"[{color}]Balance:[/{color}] {self.reason()}.", highlight=False)

    def _table_of_ranks(self) -> Table:
        table = _table("Per rank", ["", "min", "mean", "max", "max / mean"])
        for name, values in self.per_rank.items():
            spread = _spread(values)
            numbers = [_number(spread[key]) for key in ("min", "mean", "max")]
            table.add_row(_QUANTITIES[name], *numbers, f"{_ratio(values):.3f}")
        return table

    def _table_of_shapes(self) -> Table:
        heads = ["shape", "number", "GFLOP every step", "GFLOP of a refresh", "MiB of state"]
        table = _table("Blocks", heads)
        for shape, number in self.blocks_by_shape.items():
            mib = state_bytes(shape, self.settings) / 2**20
            numbers = [
                _number(n) for n in (*(f / 1e9 for f in block_flops(shape, self.settings)), mib)
            ]
            table.add_row(_times(shape), f"{number:,}", *numbers)
        return table

    def _without_factor(self) -> dict[tuple[int, ...], list[int]]:
        shapes = {s: sides_without_factor(s, self.settings) for s in self.blocks_by_shape}
        return {shape: sides for shape, sides in shapes.items() if sides}

    def _table_of_phases(self) -> Table:
        order = list(range(len(self.phases)))
        title = "Load per refresh phase"
        if len(order) > _PHASES_SHOWN:
            title += f", the {_PHASES_SHOWN} least even of {len(order)}"
            order.sort(key=lambda phase: -_ratio(self.phases[phase]))
        heads = ["phase", "blocks refreshed", "GFLOP, mean", "GFLOP, max", "max / mean"]
        table = _table(title, heads)
        for phase in order[:_PHASES_SHOWN]:
            spread = _spread(self.phases[phase])
            numbers = [_number(spread[key]) for key in ("mean", "max")]
            refreshed, ratio = f"{self.refreshed[phase]:,}", f"{_ratio(self.phases[phase]):.3f}"
            table.add_row(str(phase), refreshed, *numbers, ratio)
        return table


_QUANTITIES = {
    "gflop_per_step": "load, GFLOP per step",
    "blocks": "blocks",
    "state_gib": "state with Shampoo, GiB",
    "adamw_state_gib": "state with AdamW, GiB",
    "gib_sent_inside_node": "sent within node, GiB a step",
    "gib_sent_across_nodes": "sent to other nodes, GiB a step",
}


def plan_report(
    title: str, models: Sequence[Sequence[ParameterSpec]], config: ShampooConfig
) -> PlanReport:
    """Plan all parameters of a job, the excluded ones included.

    Args:
        title: what the job is, for the head of the report.
        models: the parameters of each optimizer of the job: one list, or one for each part of the
            model under pipeline parallelism.

    Raises:
        ValueError: as :func:`shampoo_fsdp.planner.make_plan`.
    """
    specs = list(itertools.chain.from_iterable(models))
    chosen = [spec for spec in specs if is_preconditioned(spec.name, spec.shape, config)]
    plans = [plan for members in models for plan in _plans(members, config)]
    ranks = tuple(sorted({rank for plan in plans for rank in plan.ranks}))
    ranks = ranks or tuple(sorted({rank for spec in specs for rank in spec.ranks}))

    names = {spec.name for spec in chosen}
    adam = _adam_bytes(specs, ranks)
    excluded = _adam_bytes([spec for spec in specs if spec.name not in names], ranks)
    width = getattr(torch, config.communication_dtype).itemsize
    inside: dict[int, float] = defaultdict(float)
    across: dict[int, float] = defaultdict(float)
    load: dict[int, float] = defaultdict(float)
    blocks: dict[int, int] = defaultdict(int)
    state: dict[int, float] = defaultdict(float, excluded)
    phases: list[dict[int, float]] = [
        defaultdict(float) for _ in range(config.precondition_frequency)
    ]
    for plan in plans:
        for i, rank in enumerate(plan.ranks):
            inside[rank] += (plan.elements_sent[i] - plan.elements_across[i]) * width
            across[rank] += plan.elements_across[i] * width
            load[rank] += plan.load[i]
            blocks[rank] += plan.owned[i]
            state[rank] += plan.state_bytes[i]
            for phase, flops in zip(phases, plan.phase_load[i], strict=True):
                phase[rank] += flops
    return PlanReport(
        title=title,
        ranks=ranks,
        owner_scope=", ".join(sorted({plan.owner_scope for plan in plans})) or "all",
        parameters=len(specs),
        parameters_preconditioned=len(chosen),
        elements=sum(math.prod(spec.shape) for spec in specs),
        elements_preconditioned=sum(math.prod(spec.shape) for spec in chosen),
        blocks_by_shape=_blocks_by_shape(plans),
        per_rank={
            "gflop_per_step": [load[rank] / 1e9 for rank in ranks],
            "blocks": [float(blocks[rank]) for rank in ranks],
            "state_gib": [state[rank] / _GIB for rank in ranks],
            "adamw_state_gib": [adam[rank] / _GIB for rank in ranks],
            "gib_sent_inside_node": [inside[rank] / _GIB for rank in ranks],
            "gib_sent_across_nodes": [across[rank] / _GIB for rank in ranks],
        },
        phases=[[phase[rank] / 1e9 for rank in ranks] for phase in phases],
        refreshed=[sum(p.refreshed[i] for p in plans) for i in range(len(phases))],
        gib_sent=sum(map(sum, (plan.elements_sent for plan in plans))) * width / _GIB,
        least_gib_sent=sum(plan.least_elements_sent for plan in plans) * width / _GIB,
        groups=len({plan.ranks for plan in plans}),
        load_over_mean_in_groups=max(
            (_ratio(x) for p in plans for x in (p.load, *zip(*p.phase_load, strict=True))),
            default=1.0,
        ),
        settings=config,
    )


def _plans(specs: Sequence[ParameterSpec], config: ShampooConfig) -> list[Plan]:
    sharing: dict[tuple[int, ...], list[ParameterSpec]] = defaultdict(list)
    for spec in specs:
        if is_preconditioned(spec.name, spec.shape, config):
            sharing[tuple(sorted(spec.ranks))].append(spec)
    return [make_plan(members, config, ranks[0]) for ranks, members in sharing.items()]


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


def _blocks_by_shape(plans: Sequence[Plan]) -> dict[tuple[int, ...], int]:
    shapes: Counter[tuple[int, ...]] = Counter()
    for grid, number in Counter(grid for plan in plans for grid in plan.grids).items():
        for shape, blocks in grid.block_shapes.items():
            shapes[shape] += number * blocks
    return dict(shapes.most_common())


def _ratio(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _number(value: float) -> str:
    """Four digits, and never an exponent where a person would not write one."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _listed(sides: Sequence[int]) -> str:
    return ", ".join(map(str, sides))


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    return table
