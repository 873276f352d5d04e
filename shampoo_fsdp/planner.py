"""Who owns which block, and what moves where: a pure function of metadata.

Every rank computes the same plan from names, shapes, placements and settings, without a process
group and without tensors, so that any mesh can be planned on one machine. A rank keeps only the
part that concerns itself: the blocks it owns and the pieces it sends or receives.
"""

import bisect
import functools
import hashlib
import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from shampoo_fsdp.blocks import BlockGrid, Rectangle, make_grid, refresh_phase, view_dims
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.layout import UnsupportedPlacement, shard_rectangle, view_rectangle

__all__ = ["OwnedBlock", "ParameterSpec", "Plan", "Slices", "Transfer", "make_plan"]

# One n x n symmetric eigendecomposition with its inverse root takes as long as a matrix product
# of this many FLOPs times n^3 (fp32, LAPACK syevd against GEMM, n = 128 to 1024).
_ROOT_FLOPS = 50.0

# How far above the mean a rank's work may come for the sake of keeping a block where it lies.
_LOCALITY_SLACK = 0.03

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class ParameterSpec:
    """What the planner knows of a parameter.

    `ranks` are the global ranks of its mesh in row-major order, `placements` one per dimension of
    `mesh_shape`. A plain tensor has one rank, or is replicated on a mesh of one dimension.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class OwnedBlock:
    """A block that this rank preconditions."""

    parameter: int
    """Index of its parameter among those planned."""
    index: int
    """Row-major position in the parameter's grid."""
    rectangle: Rectangle
    """Where it lies in the parameter's view."""
    shape: tuple[int, ...]
    """Its sizes, without batch dimensions."""
    phase: int
    """Its roots are refreshed when (step + phase) % precondition_frequency == 0."""


@dataclass(frozen=True)
class Transfer:
    """One piece of a block: where it lies in a shard of this rank, in a block that it owns, or
    in both (then it does not travel)."""

    peer: int
    """Position of the other rank in the plan's ranks; this rank's own if nothing travels."""
    shape: tuple[int, ...]
    parameter: int = -1
    shard_slices: Slices = ()
    """In the view of this rank's shard of the parameter."""
    block: int = -1
    """Index into the plan's owned blocks."""
    block_slices: Slices = ()
    """In the block, with its batch dimensions."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """One rank's part of the plan, and the balance of the whole."""

    ranks: tuple[int, ...]
    """All ranks that share the blocks, ascending."""
    grids: tuple[BlockGrid, ...]
    shard_shapes: tuple[tuple[int, ...], ...]
    """For each parameter the shape of this rank's shard in the parameter's view."""
    blocks: tuple[OwnedBlock, ...]
    local: tuple[Transfer, ...]
    """Pieces of owned blocks that lie in this rank's own shards."""
    gather_out: tuple[Transfer, ...]
    """Pieces of this rank's shards that go to the owners of their blocks, by peer."""
    gather_in: tuple[Transfer, ...]
    """Pieces of owned blocks that come from other ranks, by peer."""
    scatter_out: tuple[Transfer, ...]
    """Pieces of owned blocks that other ranks hold, by peer."""
    scatter_in: tuple[Transfer, ...]
    """Pieces of this rank's shards that other ranks own, by peer."""
    load: tuple[float, ...]
    """For each rank FLOPs per step, with a share of 1 / frequency of its roots."""
    phase_load: tuple[tuple[float, ...], ...]
    """For each rank and phase the FLOPs of a step of that phase."""
    elements_sent: tuple[int, ...]
    """For each rank the numbers it sends per step, gradients and updates."""
    state_elements: tuple[int, ...]
    """For each rank the numbers it keeps as state of its blocks."""
    fingerprint: str
    """Equal on two ranks if and only if they planned the same."""


def make_plan(parameters: Sequence[ParameterSpec], config: ShampooConfig, rank: int) -> Plan:
    """Plan the blocks of parameters that live on the same ranks, as seen by one of them.

    Raises:
        ValueError: names the parameter whose placement is not supported.
    """
    ranks = tuple(sorted(parameters[0].ranks))
    maps = [_shard_map(p, config) for p in parameters]
    blocks = [
        (parameter, index)
        for parameter, shard_map in enumerate(maps)
        for index in range(len(shard_map.grid))
    ]
    owners = _Assignment(parameters, maps, blocks, ranks, config)
    owners.assign()
    return _plan_of_rank(parameters, maps, blocks, owners, ranks, rank, config)


class _ShardMap:
    """The grid of a parameter and who holds which piece of its blocks.

    Parameters of one shape and placement share one map, so that planning costs little more for a
    hundred layers than for one.
    """

    def __init__(self, parameter: ParameterSpec, config: ShampooConfig) -> None:
        shape, mesh_shape = parameter.shape, parameter.mesh_shape
        dims, _ = view_dims(shape, config.batched_3d)
        self.shard_of: dict[int, Rectangle] = {}
        self.replica_of: dict[int, tuple[int, ...]] = {}
        holders: dict[Rectangle, list[int]] = defaultdict(list)
        coordinates = itertools.product(*map(range, mesh_shape))
        for rank, coordinate in zip(parameter.ranks, coordinates, strict=True):
            shard = shard_rectangle(shape, mesh_shape, parameter.placements, coordinate)
            rectangle = view_rectangle(shard, shape, dims)
            self.shard_of[rank] = rectangle
            self.replica_of[rank] = tuple(
                c
                for c, p in zip(coordinate, parameter.placements, strict=True)
                if isinstance(p, Replicate)
            )
            if _volume(rectangle):
                holders[rectangle].append(rank)
        self.holders = {rectangle: tuple(held_by) for rectangle, held_by in holders.items()}
        self.intervals = [sorted({r[d] for r in self.holders}) for d in range(len(dims))]
        borders = [sorted(set(itertools.chain(*pairs))) for pairs in self.intervals]
        self.grid = make_grid(shape, config, borders if config.block_alignment == "shard" else ())
        self.rectangles = [self.grid.rectangle(c) for c in self.grid.coordinates()]
        self.shapes = [self.grid.block_shape(c) for c in self.grid.coordinates()]
        self.pieces = [list(self._pieces(rectangle)) for rectangle in self.rectangles]

    def _pieces(self, block: Rectangle) -> Iterator[tuple[Rectangle, tuple[int, ...]]]:
        """The parts of a block that lie in one shard each, with the ranks that hold the shard."""
        overlapping = []
        for (start, stop), intervals in zip(block, self.intervals, strict=True):
            # Intervals of one dimension are disjoint and sorted.
            first = bisect.bisect_right(intervals, start, key=lambda interval: interval[1])
            last = bisect.bisect_left(intervals, stop, key=lambda interval: interval[0])
            overlapping.append(intervals[first:last])
        for shard in itertools.product(*overlapping):
            ranks = self.holders.get(shard)
            if ranks is not None:
                yield _intersection(block, shard), ranks


def _shard_map(parameter: ParameterSpec, config: ShampooConfig) -> _ShardMap:
    try:
        return _cached_shard_map(
            parameter.shape, parameter.ranks, parameter.mesh_shape, parameter.placements,
            config.max_preconditioner_dim, config.block_alignment, config.batched_3d,
        )  # fmt: skip
    except UnsupportedPlacement as error:
        raise ValueError(f"parameter '{parameter.name}' cannot be planned: {error}.") from None


@functools.lru_cache(maxsize=512)
def _cached_shard_map(
    shape: tuple[int, ...],
    ranks: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    cap: int,
    alignment: str,
    batched_3d: bool,
) -> _ShardMap:
    geometry = ShampooConfig(
        max_preconditioner_dim=cap,
        block_alignment="shard" if alignment == "shard" else "logical",
        batched_3d=batched_3d,
    )
    return _ShardMap(ParameterSpec("", shape, ranks, mesh_shape, placements), geometry)


class _Assignment:
    """Chooses owners: longest processing time first, within each refresh phase, preferring the
    rank that already holds most of a block while its work stays near the mean."""

    def __init__(
        self,
        parameters: Sequence[ParameterSpec],
        maps: Sequence[_ShardMap],
        blocks: Sequence[tuple[int, int]],
        ranks: tuple[int, ...],
        config: ShampooConfig,
    ) -> None:
        self.parameters, self.maps, self.blocks, self.ranks = parameters, maps, blocks, ranks
        self.frequency = config.precondition_frequency
        self.together = config.refresh_schedule == "together"
        self.stay = config.block_alignment == "shard"
        self.owner: list[int] = [-1] * len(blocks)
        self.every_step = dict.fromkeys(ranks, 0.0)
        self.refresh: dict[int, dict[int, float]] = {rank: defaultdict(float) for rank in ranks}

    def phase(self, parameter: int, index: int) -> int:
        if self.together:
            return 0
        name, blocks = self.parameters[parameter].name, len(self.maps[parameter].grid)
        return refresh_phase(name, index, blocks, self.frequency)

    def assign(self) -> None:
        by_phase: dict[int, list[int]] = defaultdict(list)
        for number, (parameter, index) in enumerate(self.blocks):
            by_phase[self.phase(parameter, index)].append(number)
        costs = {
            number: _flops(self.maps[parameter].shapes[index])
            for number, (parameter, index) in enumerate(self.blocks)
        }
        mean_every = sum(cost[0] for cost in costs.values()) / len(self.ranks)
        for phase in sorted(by_phase):
            numbers = sorted(by_phase[phase], key=lambda n: (-sum(costs[n]), n))
            self._assign_phase(phase, numbers, costs, mean_every)

    def _assign_phase(
        self,
        phase: int,
        numbers: Sequence[int],
        costs: dict[int, tuple[float, float]],
        mean_every: float,
    ) -> None:
        mean_refresh = sum(costs[n][1] for n in numbers) / len(self.ranks)
        slack = _LOCALITY_SLACK * (mean_every + mean_refresh)
        heap = [(self.every_step[rank], rank) for rank in self.ranks]
        heapq.heapify(heap)
        for number in numbers:
            every, refresh = costs[number]
            while heap[0][0] != self._step_load(heap[0][1], phase):  # an entry out of date
                heapq.heapreplace(heap, (self._step_load(heap[0][1], phase), heap[0][1]))
            least, owner = heap[0]
            holder = min(
                self._best_holders(number), key=lambda rank: (self._step_load(rank, phase), rank)
            )
            fits = (
                self.every_step[holder] + every <= mean_every + slack
                and self.refresh[holder][phase] + refresh <= mean_refresh + slack
            )
            if self.stay or fits or self._step_load(holder, phase) <= least:
                owner = holder
            self.owner[number] = owner
            self.every_step[owner] += every
            self.refresh[owner][phase] += refresh

    def _step_load(self, rank: int, phase: int) -> float:
        return self.every_step[rank] + self.refresh[rank][phase]

    def _best_holders(self, number: int) -> list[int]:
        parameter, index = self.blocks[number]
        pieces = self.maps[parameter].pieces[index]
        largest = max(_volume(rectangle) for rectangle, _ in pieces)
        return [r for rectangle, held in pieces if _volume(rectangle) == largest for r in held]

    def load(self, rank: int) -> float:
        return self.every_step[rank] + sum(self.refresh[rank].values()) / self.frequency

    def phase_load(self, rank: int) -> tuple[float, ...]:
        return tuple(self._step_load(rank, phase) for phase in range(self.frequency))


def _plan_of_rank(
    parameters: Sequence[ParameterSpec],
    maps: Sequence[_ShardMap],
    blocks: Sequence[tuple[int, int]],
    owners: _Assignment,
    ranks: tuple[int, ...],
    rank: int,
    config: ShampooConfig,
) -> Plan:
    position = {r: i for i, r in enumerate(ranks)}
    owned: list[OwnedBlock] = []
    local: list[Transfer] = []
    gather_out: list[Transfer] = []
    gather_in: list[Transfer] = []
    scatter_out: list[Transfer] = []
    scatter_in: list[Transfer] = []
    sent, state = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
    for (parameter, index), owner in zip(blocks, owners.owner, strict=True):
        shard_map = maps[parameter]
        block = shard_map.rectangles[index]
        state[owner] += _state_elements(shard_map.shapes[index])
        if owner == rank:
            phase = owners.phase(parameter, index)
            owned.append(OwnedBlock(parameter, index, block, shard_map.shapes[index], phase))
        for piece, held_by in shard_map.pieces[index]:
            shape, numel = _shape(piece), _volume(piece)
            in_block = (len(owned) - 1, _slices(piece, block)) if owner == rank else (-1, ())
            in_shard: tuple[int, Slices] = (-1, ())
            if rank in held_by:
                in_shard = (parameter, _slices(piece, shard_map.shard_of[rank]))
            if owner in held_by:
                if owner == rank:
                    local.append(Transfer(position[rank], shape, *in_shard, *in_block))
            else:
                # Replicas hold the same gradient: the owner takes it from its own replica.
                replica = shard_map.replica_of[owner]
                source = next(r for r in held_by if shard_map.replica_of[r] == replica)
                sent[source] += numel
                if source == rank:
                    gather_out.append(Transfer(position[owner], shape, *in_shard))
                if owner == rank:
                    gather_in.append(Transfer(position[source], shape, -1, (), *in_block))
            for holder in held_by:
                if holder == owner:
                    continue
                sent[owner] += numel
                if owner == rank:
                    scatter_out.append(Transfer(position[holder], shape, -1, (), *in_block))
                if holder == rank:
                    scatter_in.append(Transfer(position[owner], shape, *in_shard))
    digest = hashlib.sha256(repr((parameters, config, owners.owner)).encode()).hexdigest()
    return Plan(
        ranks=ranks,
        grids=tuple(shard_map.grid for shard_map in maps),
        shard_shapes=tuple(_shape(shard_map.shard_of[rank]) for shard_map in maps),
        blocks=tuple(owned),
        local=tuple(local),
        gather_out=_by_peer(gather_out),
        gather_in=_by_peer(gather_in),
        scatter_out=_by_peer(scatter_out),
        scatter_in=_by_peer(scatter_in),
        load=tuple(owners.load(r) for r in ranks),
        phase_load=tuple(owners.phase_load(r) for r in ranks),
        elements_sent=tuple(sent[r] for r in ranks),
        state_elements=tuple(state[r] for r in ranks),
        fingerprint=digest,
    )


def _by_peer(transfers: list[Transfer]) -> tuple[Transfer, ...]:
    # The sort is stable: sender and receiver list the pieces of a pair in the same order.
    return tuple(sorted(transfers, key=lambda transfer: transfer.peer))


def _flops(shape: tuple[int, ...]) -> tuple[float, float]:
    """FLOPs of a block on every step (factors and preconditioning), and of its refresh."""
    return 4.0 * math.prod(shape) * sum(shape), _ROOT_FLOPS * sum(n**3 for n in shape)


def _state_elements(shape: tuple[int, ...]) -> int:
    """Momentum, graft statistics, factors and inverse roots."""
    return 2 * math.prod(shape) + 2 * sum(n * n for n in shape)


def _shape(rectangle: Rectangle) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in rectangle)


def _volume(rectangle: Rectangle) -> int:
    return math.prod(_shape(rectangle))


def _intersection(a: Rectangle, b: Rectangle) -> Rectangle:
    return tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))


def _slices(inner: Rectangle, outer: Rectangle) -> Slices:
    return tuple(slice(p[0] - q[0], p[1] - q[0]) for p, q in zip(inner, outer, strict=True))
