"""Who owns which block, and what moves where: a pure function of metadata.

Every rank computes the same plan from names, shapes, placements and settings, without a process
group and without tensors, so that any mesh can be planned on one machine. A rank keeps only the
part that concerns itself: the blocks it owns and the pieces it sends or receives.
"""

import bisect
import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from shampoo_fsdp.assignment import choose_owners
from shampoo_fsdp.blocks import BlockGrid, Rectangle, refresh_phase
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.cost import block_flops, modelled_seconds
from shampoo_fsdp.owner_scope import first_replica, replica_of_rank
from shampoo_fsdp.shard_map import ParameterSpec, ShardMap, Site, shape_of, shard_maps, volume
from shampoo_fsdp.state_layout import state_bytes

__all__ = ["OwnedBlock", "ParameterSpec", "Plan", "Slices", "Transfer", "make_plan"]

Slices = tuple[slice, ...]


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
    """See :func:`shampoo_fsdp.blocks.refresh_phase`."""


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

    owner_scope: str
    """'all' if the blocks are spread over all ranks, 'shard' if over those of one replica."""
    ranks: tuple[int, ...]
    """The ranks that share the blocks, ascending."""
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
    owned: tuple[int, ...]
    """For each rank the number of its blocks."""
    refreshed: tuple[int, ...]
    """For each phase the number of blocks, of all ranks, that are refreshed on its steps."""
    load: tuple[float, ...]
    """For each rank FLOPs per step, with a share of 1 / frequency of its roots."""
    phase_load: tuple[tuple[float, ...], ...]
    """For each rank and phase the FLOPs of a step of that phase."""
    elements_sent: tuple[int, ...]
    """For each rank the numbers it sends per step, gradients and updates."""
    elements_across: tuple[int, ...]
    """Of these the ones that go to another node."""
    least_elements_sent: int
    """What all ranks together would send if each block were owned by a rank that holds most of
    it, whatever the work of that rank."""
    state_bytes: tuple[int, ...]
    """For each rank what the state of its blocks takes."""
    fingerprint: str
    """Equal on two ranks if and only if they planned the same."""


def make_plan(parameters: Sequence[ParameterSpec], config: ShampooConfig, rank: int) -> Plan:
    """Plan the blocks of parameters that live on the same ranks, as seen by one of them.

    Raises:
        ValueError: names the parameter whose placement is not supported, or says what
            memory_cap would fit.
    """
    scope = _scope(parameters, config)
    if scope == "shard":
        parameters = replica_of_rank(parameters, rank)
    ranks = tuple(sorted(parameters[0].ranks))
    blocks, owners = _assign(parameters, config)
    totals = _Totals(blocks, owners, ranks, config)
    me = bisect.bisect_left(ranks, rank)
    mine = _part_of_rank(blocks, owners, me)
    digest = hashlib.sha256(repr((parameters, config, owners)).encode()).hexdigest()
    return Plan(
        owner_scope=scope,
        ranks=ranks,
        grids=tuple(shard_map.grid for shard_map in blocks.maps),
        shard_shapes=tuple(shape_of(shard_map.shard_of[me]) for shard_map in blocks.maps),
        blocks=tuple(mine.blocks),
        local=tuple(mine.local),
        gather_out=_by_peer(mine.gather_out),
        gather_in=_by_peer(mine.gather_in),
        scatter_out=_by_peer(mine.scatter_out),
        scatter_in=_by_peer(mine.scatter_in),
        owned=tuple(totals.owned),
        refreshed=tuple(totals.refreshed),
        load=tuple(totals.load),
        phase_load=tuple(map(tuple, totals.phase_load)),
        elements_sent=tuple(totals.sent),
        elements_across=tuple(totals.across),
        least_elements_sent=totals.least_sent,
        state_bytes=tuple(totals.state),
        fingerprint=digest,
    )


def _scope(parameters: Sequence[ParameterSpec], config: ShampooConfig) -> str:
    if config.owner_scope != "auto":
        return config.owner_scope
    seconds = {}
    # Every rank looks at the same replica, so that all choose alike.
    for scope, specs in (("all", parameters), ("shard", first_replica(parameters))):
        try:
            blocks, owners = _assign(specs, config)
        except ValueError:  # more memory than memory_cap
            seconds[scope] = math.inf
            continue
        totals = _Totals(blocks, owners, sorted(specs[0].ranks), config)
        seconds[scope] = modelled_seconds(totals.phase_load, totals.sent, totals.across, config)
    return min(seconds, key=seconds.__getitem__)


def _assign(
    parameters: Sequence[ParameterSpec], config: ShampooConfig
) -> tuple["_Blocks", list[int]]:
    blocks, ranks = _Blocks(parameters, config), sorted(parameters[0].ranks)
    owners = choose_owners(blocks.sites, blocks.site_of, blocks.phase_of, ranks, config)
    return blocks, owners


class _Blocks:
    """All blocks of the parameters, numbered in the order of parameters and grids."""

    def __init__(self, parameters: Sequence[ParameterSpec], config: ShampooConfig) -> None:
        self.maps: list[ShardMap] = shard_maps(parameters, config)
        self.sites: list[Site] = []
        self.first: list[int] = []
        """Number of each parameter's first block."""
        self.site_of: list[int] = []
        self.phase_of: list[int] = []
        frequency = config.precondition_frequency
        first_site: dict[int, int] = {}
        for parameter, shard_map in zip(parameters, self.maps, strict=True):
            if id(shard_map) not in first_site:
                first_site[id(shard_map)] = len(self.sites)
                self.sites += shard_map.sites
            blocks = len(shard_map.grid)
            start = first_site[id(shard_map)]
            self.first.append(len(self.site_of))
            self.site_of += range(start, start + blocks)
            if config.refresh_schedule == "together":
                self.phase_of += itertools.repeat(0, blocks)
            else:
                phase = refresh_phase(parameter.name, 0, blocks, frequency)
                self.phase_of += [(phase + index) % frequency for index in range(blocks)]

    def maps_of_sites(self) -> list[ShardMap]:
        maps = {id(shard_map): shard_map for shard_map in self.maps}
        return [shard_map for shard_map in maps.values() for _ in shard_map.sites]


class _Totals:
    """Sums over the blocks of each rank, and what it sends.

    All blocks of one site that one rank owns are counted together, and each site's pieces are
    visited once, whatever the number of layers.
    """

    def __init__(
        self, blocks: _Blocks, owners: Sequence[int], ranks: Sequence[int], config: ShampooConfig
    ) -> None:
        frequency = config.precondition_frequency
        n = len(ranks)
        self.owned = [0] * n
        self.state = [0] * n
        self.sent = [0] * n
        self.across = [0] * n
        self.least_sent = 0
        self._node = [rank // config.ranks_per_node for rank in ranks]
        in_phase = Counter(blocks.phase_of)
        self.refreshed = [in_phase[phase] for phase in range(frequency)]
        every = [0.0] * n
        refresh = [[0.0] * frequency for _ in ranks]
        flops = [block_flops(site.shape, config) for site in blocks.sites]
        for number, phase, owner in zip(blocks.site_of, blocks.phase_of, owners, strict=True):
            every[owner] += flops[number][0]
            refresh[owner][phase] += flops[number][1]
        self.load = [e + sum(r) / frequency for e, r in zip(every, refresh, strict=True)]
        self.phase_load = [[e + r for r in row] for e, row in zip(every, refresh, strict=True)]

        owners_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for (number, owner), count in Counter(zip(blocks.site_of, owners, strict=True)).items():
            owners_of[number].append((owner, count))
        for number, (site, shard_map) in enumerate(
            zip(blocks.sites, blocks.maps_of_sites(), strict=True)
        ):
            self._add(site, shard_map, owners_of[number], state_bytes(site.shape, config))

    def _add(
        self, site: Site, shard_map: ShardMap, owners: list[tuple[int, int]], state: int
    ) -> None:
        """Add the blocks of one site, given how many each owner has, and the state of one."""
        node, held = self._node, site.held
        size = volume(site.rectangle)
        everywhere = shard_map.replicas * size
        held_in: dict[int, int] = defaultdict(int)
        for rank, elements in held.items():
            held_in[node[rank]] += elements
        wanted: dict[int, int] = defaultdict(int)  # by replica: blocks whose owner is there
        wanted_near: dict[tuple[int, int], int] = defaultdict(int)  # and by node of the owner
        count_of = dict(owners)
        for owner, count in owners:
            self.owned[owner] += count
            self.state[owner] += count * state
            # The update goes to all that hold a piece.
            self.sent[owner] += count * (everywhere - held.get(owner, 0))
            self.across[owner] += count * (everywhere - held_in.get(node[owner], 0))
            replica = shard_map.replica_of[owner]
            wanted[replica] += count
            wanted_near[replica, node[owner]] += count
        # The gradient comes from the owner's own replica.
        for rank, elements in held.items():
            replica = shard_map.replica_of[rank]
            total = wanted[replica]
            self.sent[rank] += elements * (total - count_of.get(rank, 0))
            self.across[rank] += elements * (total - wanted_near.get((replica, node[rank]), 0))
        least = everywhere + size - 2 * max(held.values())
        self.least_sent += least * sum(count_of.values())


class _Part:
    """What concerns one rank: its blocks and the pieces it sends or receives."""

    def __init__(self) -> None:
        self.blocks: list[OwnedBlock] = []
        self.local: list[Transfer] = []
        self.gather_out: list[Transfer] = []
        self.gather_in: list[Transfer] = []
        self.scatter_out: list[Transfer] = []
        self.scatter_in: list[Transfer] = []


def _part_of_rank(blocks: _Blocks, owners: Sequence[int], me: int) -> _Part:
    part = _Part()
    for parameter, (first, shard_map) in enumerate(zip(blocks.first, blocks.maps, strict=True)):
        for index, owner in enumerate(owners[first : first + len(shard_map.grid)]):
            if owner == me:
                phase = blocks.phase_of[first + index]
                _add_owned(part, parameter, index, phase, shard_map, me)
        for index in shard_map.blocks_of_shard(me):
            _add_held(part, parameter, shard_map.sites[index], shard_map, owners[first + index], me)
    return part


def _add_owned(
    part: _Part, parameter: int, index: int, phase: int, shard_map: ShardMap, me: int
) -> None:
    site, number = shard_map.sites[index], len(part.blocks)
    part.blocks.append(OwnedBlock(parameter, index, site.rectangle, site.shape, phase))
    for piece, holders in site.pieces:
        shape, in_block = shape_of(piece), _slices(piece, site.rectangle)
        if me in holders:
            in_shard = _slices(piece, shard_map.shard_of[me])
            part.local.append(Transfer(me, shape, parameter, in_shard, number, in_block))
        else:
            # Replicas hold the same gradient: the owner takes it from its own replica.
            source = holders[shard_map.replica_of[me]]
            part.gather_in.append(Transfer(source, shape, block=number, block_slices=in_block))
        part.scatter_out += [
            Transfer(holder, shape, block=number, block_slices=in_block)
            for holder in holders
            if holder != me
        ]


def _add_held(
    part: _Part, parameter: int, site: Site, shard_map: ShardMap, owner: int, me: int
) -> None:
    if owner == me:
        return
    piece, holders = next((piece, holders) for piece, holders in site.pieces if me in holders)
    shape, in_shard = shape_of(piece), _slices(piece, shard_map.shard_of[me])
    transfer = Transfer(owner, shape, parameter, in_shard)
    if owner not in holders and shard_map.replica_of[owner] == shard_map.replica_of[me]:
        part.gather_out.append(transfer)
    part.scatter_in.append(transfer)


def _by_peer(transfers: list[Transfer]) -> tuple[Transfer, ...]:
    # The sort is stable: sender and receiver list the pieces of a pair, of which there is one for
    # each block, in the same order.
    return tuple(sorted(transfers, key=lambda transfer: transfer.peer))


def _slices(inner: Rectangle, outer: Rectangle) -> Slices:
    return tuple(slice(p[0] - q[0], p[1] - q[0]) for p, q in zip(inner, outer, strict=True))
