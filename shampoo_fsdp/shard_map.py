"""Which ranks hold which piece of each block of a parameter: pure geometry of its layout."""

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from shampoo_fsdp.blocks import BlockGrid, Rectangle, make_grid, view_dims
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.layout import UnsupportedPlacement, shard_rectangle, view_rectangle

__all__ = ["ParameterSpec", "ShardMap", "Site", "shape_of", "shard_maps", "volume"]


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


class ShardMap:
    """The grid of a parameter and who holds which piece of its blocks.

    Parameters of one shape and layout share one map, so that planning costs little more for a
    hundred layers than for one. Ranks are positions among the ascending ranks of the mesh.
    """

    grid: BlockGrid
    sites: list[Site]
    """By row-major index of the block in the grid."""
    shard_of: list[Rectangle]
    """For each rank its shard, in the parameter's view; it may be empty."""
    replica_of: list[int]
    """For each rank the number of its replica: ranks of one number hold the parameter once."""
    replicas: int

    def __init__(self, parameter: ParameterSpec, config: ShampooConfig) -> None:
        shape, mesh_shape, placements = (
            parameter.shape, parameter.mesh_shape, parameter.placements,
        )  # fmt: skip
        dims, _ = view_dims(shape, config)
        position = {rank: i for i, rank in enumerate(sorted(parameter.ranks))}
        replicated = [d for d, p in enumerate(placements) if isinstance(p, Replicate)]
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
        self._intervals = [sorted({r[d] for r in holders}) for d in range(len(dims))]
        borders = [sorted(set(itertools.chain(*pairs))) for pairs in self._intervals]
        self.grid = make_grid(shape, config, borders if config.block_alignment == "shard" else ())
        self.sites = [self._site(coordinate) for coordinate in self.grid.coordinates()]

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

    def _site(self, coordinate: tuple[int, ...]) -> Site:
        rectangle = self.grid.rectangle(coordinate)
        pieces = tuple(self._pieces(rectangle))
        held = {rank: volume(piece) for piece, ranks in pieces for rank in ranks}
        return Site(rectangle, self.grid.block_shape(coordinate), pieces, held)

    def _pieces(self, block: Rectangle) -> Iterator[tuple[Rectangle, tuple[int, ...]]]:
        overlapping = []
        for (start, stop), intervals in zip(block, self._intervals, strict=True):
            # Intervals of one dimension are disjoint and sorted.
            first = bisect.bisect_right(intervals, start, key=lambda interval: interval[1])
            last = bisect.bisect_left(intervals, stop, key=lambda interval: interval[0])
            overlapping.append(intervals[first:last])
        for shard in itertools.product(*overlapping):
            ranks = self._holders.get(shard)
            if ranks is not None:
                yield _intersection(block, shard), ranks


def shard_maps(parameters: Sequence[ParameterSpec], config: ShampooConfig) -> list[ShardMap]:
    """The map of each parameter.

    Raises:
        ValueError: names the parameter whose placement is not supported.
    """
    known: dict[tuple[object, ...], ShardMap] = {}
    maps = []
    for parameter in parameters:
        layout = (parameter.shape, parameter.ranks, parameter.mesh_shape, parameter.placements)
        if layout not in known:
            try:
                known[layout] = ShardMap(parameter, config)
            except UnsupportedPlacement as error:
                raise ValueError(
                    f"parameter '{parameter.name}' cannot be planned: {error}."
                ) from None
        maps.append(known[layout])
    return maps


def shape_of(rectangle: Rectangle) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in rectangle)


def volume(rectangle: Rectangle) -> int:
    return math.prod(shape_of(rectangle))


def _intersection(a: Rectangle, b: Rectangle) -> Rectangle:
    return tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
