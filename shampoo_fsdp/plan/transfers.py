"""One rank's part of a plan: the blocks it owns, and the pieces it sends or receives."""

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.grid import BlockGrid, Rectangle
from shampoo_fsdp.plan.shards import ShardMap, Site, shape_of, volume

__all__ = ["OwnedBlock", "Part", "Plan", "Slices", "make_plan"]

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
    """See :func:`shampoo_fsdp.plan.assignment.refresh_phase`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """With batch dimensions."""
        return shape_of(self.rectangle)


@dataclass(frozen=True, eq=False, slots=True)
class Transfer:
    """One piece of a block: where it lies in this rank's shard of a parameter, in a block that this
    rank owns, or in both (then it goes from this rank to itself)."""

    peer: int
    """Position of the other rank in the plan's ranks."""
    index: int
    """Row-major position of the block in the parameter's grid."""
    shape: tuple[int, ...]
    in_shard: Slices = ()
    """In the view of the shard."""
    block: OwnedBlock | None = None
    in_block: Slices = ()
    """In the block, with its batch dimensions."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


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


@dataclass(frozen=True)
class Plan:
    """What one rank needs to know."""

    ranks: tuple[int, ...]
    """The ranks that share the blocks, ascending."""
    parts: tuple[Part, ...]
    """Of each parameter."""
    travels: bool
    """Whether any rank sends anything."""
    fingerprint: str
    """Equal on two ranks if and only if they planned the same."""


def make_plan(assignment: Assignment, rank: int) -> Plan:
    """What the assignment of blocks means for one of their ranks."""
    me = bisect.bisect_left(assignment.ranks, rank)
    maps = assignment.maps
    owned = zip(assignment.sites, assignment.owners, strict=True)
    return Plan(
        ranks=assignment.ranks,
        parts=tuple(_part(assignment, *of, me) for of in zip(maps, assignment.first, strict=True)),
        travels=any(shard_map.replicas > 1 for shard_map in maps)
        or any(site.held.get(owner, 0) < volume(site.rectangle) for site, owner in owned),
        fingerprint=assignment.fingerprint,
    )


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
        if owners[index] != me:
            _add_held(part, index, shard_map, owners[index], me)
    return part


def _add_owned(part: Part, block: OwnedBlock, site: Site, shard_map: ShardMap, me: int) -> None:
    for piece, holders in site.pieces:
        shape, in_block = shape_of(piece), _slices(piece, site.rectangle)
        # Replicas hold the same gradient: the owner takes it from its own replica.
        source = holders[shard_map.replica_of[me]]
        for holder in holders:
            in_shard = _slices(piece, shard_map.shard_of[me]) if holder == me else ()
            transfer = Transfer(holder, block.index, shape, in_shard, block, in_block)
            part.scatter_out.append(transfer)
            if holder == source:
                part.gather_in.append(transfer)
            if holder == me:
                part.gather_out.append(transfer)
                part.scatter_in.append(transfer)


def _add_held(part: Part, index: int, shard_map: ShardMap, owner: int, me: int) -> None:
    piece = next(piece for piece, holders in shard_map.sites[index].pieces if me in holders)
    transfer = Transfer(owner, index, shape_of(piece), _slices(piece, shard_map.shard_of[me]))
    if shard_map.replica_of[owner] == shard_map.replica_of[me]:
        part.gather_out.append(transfer)
    part.scatter_in.append(transfer)


def _slices(inner: Iterable[tuple[int, int]], outer: Rectangle) -> Slices:
    return tuple(slice(p[0] - q[0], p[1] - q[0]) for p, q in zip(inner, outer, strict=True))
