"""All blocks of parameters that live on the same ranks, their owners, and what moves for them."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.grid import BlockGrid, Rectangle
from shampoo_fsdp.plan.owners import Costs, choose_owners
from shampoo_fsdp.plan.shards import (
    ParameterSpec,
    Placement,
    ShardMap,
    Site,
    shape_of,
    shard_maps,
    volume,
)

__all__ = ["Assignment"]

Slices = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class OwnedBlock:
    """A block that this rank preconditions."""

    index: int
    """Row-major position in the parameter's grid."""
    rectangle: Rectangle
    """Where it lies in the parameter's view."""
    shape: tuple[int, ...]
    """Its sizes, without batch dimensions."""
    phase: int
    """See :func:`refresh_phase`."""

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """With batch dimensions."""
        return shape_of(self.rectangle)


@dataclass(frozen=True, eq=False, slots=True)
class Transfer:
    """One piece of a block: where it lies in this rank's shard of a parameter, in a block that this
    rank owns, or in both (then it goes from this rank to itself)."""

    peer: int
    """Position of the other rank in the assignment's ranks."""
    in_shard: Slices = ()
    """In the view of the shard."""
    block: OwnedBlock | None = None
    in_block: Slices = ()
    """In the block, with its batch dimensions."""


@dataclass(frozen=True, eq=False)
class Part:
    """What concerns this rank of one parameter."""

    grid: BlockGrid
    shard_shape: tuple[int, ...]
    """Of this rank's shard, in the parameter's view."""
    row_width: int
    """See :class:`shampoo_fsdp.plan.shards.ShardMap`."""
    blocks: list[OwnedBlock] = field(default_factory=list)
    """The ones that it owns, in the order of the grid."""
    gather_out: list[Transfer] = field(default_factory=list)
    """Pieces of its shard that go to the owners of their blocks."""
    gather_in: list[Transfer] = field(default_factory=list)
    """Pieces of owned blocks, as they come from the ranks that hold them: all of each block."""
    scatter_out: list[Transfer] = field(default_factory=list)
    """Pieces of owned blocks, for all ranks that hold them."""
    scatter_in: list[Transfer] = field(default_factory=list)
    """Pieces of its shard, as they come from the owners: all of it."""


class Assignment:
    """Who owns which block; the same on every rank of the parameters.

    Blocks are numbered in the order of parameters and grids.
    """

    def __init__(
        self, parameters: Sequence[ParameterSpec], config: ShampooConfig, costs: Costs, rank: int
    ) -> None:
        """
        Args:
            parameters: they live on the same ranks; their meshes may differ.
            costs: of each shape of block.
            rank: with `owner_scope = "shard"`, one that the blocks are for.

        Raises:
            ValueError: names the parameter whose placement is not supported.
        """
        if config.owner_scope == "shard":
            parameters = _replica_of_rank(parameters, rank)
        self.parameters = parameters
        self.config = config
        self.costs = costs
        self.ranks = tuple(sorted(parameters[0].ranks))
        """The ranks that share the blocks, ascending."""
        self.maps: list[ShardMap] = shard_maps(parameters, config)
        """Of each parameter."""
        self.sites: list[Site] = []
        self.phases: list[int] = []
        """Of each block, as are the owners, positions among the ranks."""
        self.first: list[int] = []
        """Number of each parameter's first block."""
        frequency, together = config.precondition_frequency, config.refresh_schedule == "together"
        for parameter, shard_map in zip(parameters, self.maps, strict=True):
            self.first.append(len(self.sites))
            self.sites += shard_map.sites
            blocks = len(shard_map.grid)
            start = refresh_phase(parameter.name, 0, blocks, frequency)
            phases = [(start + index) % frequency for index in range(blocks)]
            self.phases += [0] * blocks if together else phases
        self.owners = choose_owners(self.sites, self.phases, self.ranks, config, costs)
        facts = repr((parameters, config, self.owners))
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        """Equal on two ranks if and only if they planned the same."""

    @property
    def travels(self) -> bool:
        """Whether any rank sends anything."""
        owned = zip(self.sites, self.owners, strict=True)
        return any(shard_map.replicas > 1 for shard_map in self.maps) or any(
            site.held.get(owner, 0) < volume(site.rectangle) for site, owner in owned
        )


def parts_of(assignment: Assignment, rank: int) -> list[Part]:
    """What the assignment means for one of its ranks, for each parameter."""
    me = bisect.bisect_left(assignment.ranks, rank)
    maps = zip(assignment.maps, assignment.first, strict=True)
    return [_part(assignment, shard_map, first, me) for shard_map, first in maps]


def _part(assignment: Assignment, shard_map: ShardMap, first: int, me: int) -> Part:
    part = Part(shard_map.grid, shape_of(shard_map.shard_of[me]), shard_map.row_width)
    owners = assignment.owners[first : first + len(shard_map.grid)]
    for index, owner in enumerate(owners):
        if owner == me:
            site, phase = shard_map.sites[index], assignment.phases[first + index]
            block = OwnedBlock(index, site.rectangle, site.shape, phase)
            part.blocks.append(block)
            _add_owned(part, block, site, shard_map, me)
    for index in shard_map.blocks_of_shard(me):
        if (owner := owners[index]) != me:
            pieces = shard_map.sites[index].pieces
            piece = next(piece for piece, holders in pieces if me in holders)
            transfer = Transfer(owner, _slices(piece, shard_map.shard_of[me]))
            if shard_map.replica_of[owner] == shard_map.replica_of[me]:
                part.gather_out.append(transfer)
            part.scatter_in.append(transfer)
    return part


def _add_owned(part: Part, block: OwnedBlock, site: Site, shard_map: ShardMap, me: int) -> None:
    for piece, holders in site.pieces:
        in_block = _slices(piece, site.rectangle)
        # Replicas hold the same gradient: the owner takes it from its own replica.
        source = holders[shard_map.replica_of[me]]
        for holder in holders:
            in_shard = _slices(piece, shard_map.shard_of[me]) if holder == me else ()
            transfer = Transfer(holder, in_shard, block, in_block)
            part.scatter_out.append(transfer)
            if holder == source:
                part.gather_in.append(transfer)
            if holder == me:
                part.gather_out.append(transfer)
                part.scatter_in.append(transfer)


def _slices(inner: Iterable[tuple[int, int]], outer: Rectangle) -> Slices:
    return tuple(slice(p[0] - q[0], p[1] - q[0]) for p, q in zip(inner, outer, strict=True))


def refresh_phase(name: str, index: int, blocks: int, frequency: int) -> int:
    """The phase of a block: its roots are refreshed when (step + phase) % period == 0,
    the period being `frequency` once `refresh_warmup_steps` are over.

    It follows from the block's identity alone, so that it is the same on every mesh and with any
    set of other parameters. Blocks of like parameters (those whose names differ in numbers only:
    layers.0.w, layers.1.w, ...) take consecutive phases, so that a period's steps share them
    evenly; different kinds of parameters start at different phases.

    Args:
        name: the parameter's full name.
        index: the block's row-major position in the parameter's grid.
        blocks: number of blocks in that grid.
        frequency: steps of a period.
    """
    kind = re.sub(r"\d+", "#", name)
    number = sum(map(int, re.findall(r"\d+", name)))
    return (zlib.crc32(kind.encode()) + number * blocks + index) % frequency


def _replica_of_rank(parameters: Sequence[ParameterSpec], rank: int) -> list[ParameterSpec]:
    """The parameters on the fewest ranks that include `rank` and hold each of them completely.

    The parameters must live on the same ranks; their meshes may differ.

    Raises:
        ValueError: names a parameter for which these ranks are no part of its mesh.
    """
    members, known = {rank}, set[int]()
    copies = [
        c
        for layout in {(p.ranks, p.mesh_shape, p.placements) for p in parameters}
        for c in _copies(*layout)
    ]
    while members != known:
        known = members
        members = members.union(*(copy for copy in copies if members & copy))
    layouts: dict[tuple[object, ...], dict[str, tuple[int, ...]]] = {}
    result = []
    for parameter in parameters:
        layout = parameter.ranks, parameter.mesh_shape
        if layout not in layouts:
            layouts[layout] = _narrowed(parameter, members)
        result.append(dataclasses.replace(parameter, **layouts[layout]))  # type: ignore[arg-type]
    return result


def _copies(
    ranks: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> list[set[int]]:
    """The sets of ranks that hold a parameter once."""
    copies: dict[tuple[int, ...], set[int]] = defaultdict(set)
    replicated = [placement is None for placement in placements]
    coordinates = itertools.product(*map(range, mesh_shape))
    for rank, coordinate in zip(ranks, coordinates, strict=True):
        copies[tuple(itertools.compress(coordinate, replicated))].add(rank)
    return list(copies.values())


def _narrowed(parameter: ParameterSpec, members: set[int]) -> dict[str, tuple[int, ...]]:
    """The ranks and the shape of the part of its mesh that these ranks are."""
    coordinates = itertools.product(*map(range, parameter.mesh_shape))
    kept = {r: c for r, c in zip(parameter.ranks, coordinates, strict=True) if r in members}
    mesh_shape = tuple(len(set(along)) for along in zip(*kept.values(), strict=True))
    if math.prod(mesh_shape) != len(kept):
        raise ValueError(
            f"owner_scope = 'shard' is impossible: ranks {sorted(members)}, which hold all once, "
            f"are no part of the mesh {parameter.mesh_shape} of '{parameter.name}'; set 'all'."
        )
    return {"ranks": tuple(kept), "mesh_shape": mesh_shape}
