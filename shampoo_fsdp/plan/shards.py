"""Which ranks hold which piece of each block of a parameter: pure geometry of its placements."""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.grid import BlockGrid, Rectangle, head_rows, make_grid, view_dims

__all__ = [
    "ParameterSpec",
    "Placement",
    "Sharded",
    "placement_of",
    "shape_of",
    "shard_rectangle",
    "volume",
]


@dataclass(frozen=True)
class Sharded:
    """The ranks of a mesh dimension share a dimension of the tensor."""

    dim: int
    split: int = 1
    """In how many pieces later mesh dimensions have cut it before: more than one where FSDP cuts
    what tensor parallelism has cut (the split_factor of DTensor's _StridedShard). Else mesh
    dimensions cut in their order."""


Placement = Sharded | str | None
"""What a mesh dimension does to a tensor; None: it replicates it. A text is the name of a placement
that cannot be planned."""


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


@dataclass(frozen=True, eq=False)
class Site:
    """What blocks at one position of parameters of one shape and layout have in common.

    Ranks are positions among the ascending ranks of the mesh here.
    """

    rectangle: Rectangle
    """In the parameter's view."""
    shape: tuple[int, ...]
    """Without batch dimensions."""
    pieces: tuple[tuple[Rectangle, tuple[int, ...]], ...]
    """The parts of the block that lie in one shard each, and the ranks that hold the shard: one
    of each replica, by number of the replica."""
    held: dict[int, int]
    """How many elements each rank holds."""


_Overlaps = list[tuple[tuple[int, int], tuple[int, int]]]
"""Intervals of shards along a dimension, and what of them lies in a tile."""


class ShardMap:
    """The grid of a parameter and who holds which piece of its blocks.

    Parameters of one shape, layout and size of heads share one map, so that planning costs little
    more for a hundred layers than for one. Ranks are positions among the ascending ranks of the
    mesh.
    """

    grid: BlockGrid
    sites: list[Site]
    """By row-major index of the block in the grid."""
    shard_of: list[Rectangle]
    """For each rank its shard, in the parameter's view; it may be empty."""
    replica_of: list[int]
    """For each rank the number of its replica: ranks of one number hold the parameter once."""
    replicas: int
    row_width: int
    """Divides the length, along the last dimension, of every part of a block that a shard holds:
    blocks and shards are rows of this many elements, the same on every rank."""

    def __init__(self, parameter: ParameterSpec, config: ShampooConfig, head: int | None) -> None:
        shape, mesh_shape, placements = parameter.shape, parameter.mesh_shape, parameter.placements
        dims, _ = view_dims(shape, config, head)
        position = {rank: i for i, rank in enumerate(sorted(parameter.ranks))}
        replicated = [d for d, p in enumerate(placements) if p is None]
        self.replicas = math.prod(mesh_shape[d] for d in replicated)
        self.shard_of = [()] * len(position)
        self.replica_of = [0] * len(position)
        holders: dict[Rectangle, list[int]] = defaultdict(list)
        coordinates = itertools.product(*map(range, mesh_shape))
        for rank, coordinate in zip(parameter.ranks, coordinates, strict=True):
            shard = shard_rectangle(shape, mesh_shape, placements, coordinate)
            rectangle = view_rectangle(shard, shape, dims)
            replica = 0
            for d in replicated:
                replica = replica * mesh_shape[d] + coordinate[d]
            self.shard_of[position[rank]] = rectangle
            self.replica_of[position[rank]] = replica
            if volume(rectangle):
                holders[rectangle].append(position[rank])  # in the order of the replicas
        self._holders = {rectangle: tuple(ranks) for rectangle, ranks in holders.items()}
        intervals = [sorted({r[d] for r in holders}) for d in range(len(dims))]
        borders = [sorted(set(itertools.chain(*pairs))) for pairs in intervals]
        of_shards = borders if config.block_alignment == "shard" else ()
        self.grid = make_grid(shape, config, of_shards, head)
        self.row_width = math.gcd(*self.grid.cuts[-1], *borders[-1])
        along = [
            [_overlaps(tile, of_dim) for tile in itertools.pairwise(cuts)]
            for cuts, of_dim in zip(self.grid.cuts, intervals, strict=True)
        ]
        overlaps = itertools.product(*along)
        self.sites = list(map(self._site, self.grid.coordinates(), overlaps))

    def blocks_of_shard(self, rank: int) -> list[int]:
        """Indices of the blocks that a rank's shard has a part of, ascending."""
        shard = self.shard_of[rank]
        if not volume(shard):
            return []
        indices = [0]
        for (start, stop), cuts in zip(shard, self.grid.cuts, strict=True):
            tiles = range(bisect.bisect_right(cuts, start) - 1, bisect.bisect_left(cuts, stop))
            indices = [index * (len(cuts) - 1) + tile for index in indices for tile in tiles]
        return indices

    def _site(self, coordinate: tuple[int, ...], along: tuple[_Overlaps, ...]) -> Site:
        pieces, held = [], dict[int, int]()
        for overlaps in itertools.product(*along):
            shard, piece = zip(*overlaps, strict=True)
            if ranks := self._holders.get(shard):
                pieces.append((piece, ranks))
                held |= dict.fromkeys(ranks, volume(piece))
        rectangle, shape = self.grid.rectangle(coordinate), self.grid.block_shape(coordinate)
        return Site(rectangle, shape, tuple(pieces), held)


def _overlaps(tile: tuple[int, int], intervals: Sequence[tuple[int, int]]) -> _Overlaps:
    """What a tile overlaps of disjoint, sorted intervals along a dimension."""
    start, stop = tile
    first = bisect.bisect_right(intervals, start, key=lambda interval: interval[1])
    last = bisect.bisect_left(intervals, stop, key=lambda interval: interval[0])
    return [((a, b), (max(start, a), min(stop, b))) for a, b in intervals[first:last]]


def shard_maps(parameters: Sequence[ParameterSpec], config: ShampooConfig) -> list[ShardMap]:
    """The map of each parameter.

    Raises:
        ValueError: names the parameter whose placement is not supported, or whose heads have other
            rows than the setting `head_dim` says.
    """
    known: dict[tuple[object, ...], ShardMap] = {}
    maps = []
    for parameter in parameters:
        head = head_rows(parameter.name, parameter.shape, config)
        where = (parameter.ranks, parameter.mesh_shape, parameter.placements)
        layout = (parameter.shape, head, *where)
        if layout not in known:
            try:
                known[layout] = ShardMap(parameter, config, head)
            except ValueError as error:
                raise ValueError(
                    f"parameter '{parameter.name}' cannot be planned: {error}."
                ) from None
        maps.append(known[layout])
    return maps


def placement_of(placement: Any) -> Placement:
    """What a placement of a DTensor is here; it is asked, as this room knows nothing of tensors."""
    if placement.is_replicate():
        return None
    if (dim := getattr(placement, "dim", None)) is None:
        return repr(placement)
    return Sharded(dim, int(getattr(placement, "split_factor", 1)))


def shard_rectangle(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
) -> Rectangle:
    """The rectangle of a tensor that the rank at a mesh coordinate holds; it may be empty.

    As `torch.chunk` does, each sharding cuts pieces of ceil(size / ranks), so that the last ranks
    may hold less or nothing.

    Raises:
        ValueError: for a placement that is a text, or a `split` that cannot be.
    """
    rectangle = [(0, size) for size in shape]
    for dim in range(len(shape)):
        for mesh_dim in _sharding_order(dim, mesh_shape, placements):
            start, stop = rectangle[dim]
            piece = -(-(stop - start) // mesh_shape[mesh_dim])
            first = min(start + coordinate[mesh_dim] * piece, stop)
            rectangle[dim] = (first, min(first + piece, stop))
    return tuple(rectangle)


def _sharding_order(
    dim: int, mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> list[int]:
    """The mesh dimensions that shard a tensor dimension, in the order in which they cut it."""
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if placement is None or (isinstance(placement, Sharded) and placement.dim != dim):
            continue
        position = None
        if isinstance(placement, Sharded):
            split, ends = placement.split, range(len(order) + 1)
            cut_before = (math.prod(mesh_shape[d] for d in order[:end]) for end in ends)
            position = next((end for end, pieces in enumerate(cut_before) if pieces == split), None)
        if position is None:
            raise ValueError(
                f"placement {placement}; supported: Replicate, Shard, and "
                "_StridedShard whose split_factor is the size of the mesh dimensions after it"
            )
        order.insert(position, mesh_dim)
    return order


def view_rectangle(
    rectangle: Rectangle, shape: Sequence[int], dims: Sequence[Sequence[int]]
) -> Rectangle:
    """A rectangle of a tensor seen through a view that merges neighbouring dimensions.

    Args:
        rectangle: intervals along the dimensions of the tensor.
        shape: the tensor's shape.
        dims: for each dimension of the view the tensor dimensions that it merges.

    Raises:
        ValueError: if the rectangle is not one in the view, because a dimension is
            sharded that follows another one in its group.
    """
    result = []
    for group in dims:
        inner = math.prod(shape[d] for d in group[1:])
        if any(rectangle[d] != (0, shape[d]) for d in group[1:]):
            raise ValueError(
                f"dimension {group[0]} of {tuple(shape)} is merged with those after it, one of "
                "which is sharded; shard the first dimension or exclude the parameter"
            )
        start, stop = rectangle[group[0]]
        result.append((start * inner, stop * inner))
    return tuple(result)


def shape_of(rectangle: Rectangle) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in rectangle)


def volume(rectangle: Rectangle) -> int:
    return math.prod(shape_of(rectangle))
