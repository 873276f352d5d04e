"""What each rank owns, computes and sends: for reports, which look at all ranks."""

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence

from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ShardMap, Site, volume

__all__ = ["Totals"]


class Totals:
    """Sums over the blocks of each rank, and what it sends.

    All blocks of one shape and phase, or of one site, that one rank owns are counted together, and
    each site's pieces are visited once, whatever the number of layers.
    """

    def __init__(self, assignment: Assignment) -> None:
        config, costs = assignment.config, functools.cache(assignment.costs)
        frequency, n = config.precondition_frequency, len(assignment.ranks)
        self.ranks = assignment.ranks
        self.owned = [0] * n
        """For each rank the number of its blocks."""
        self.state = [0] * n
        """For each rank the bytes that the state of its blocks takes."""
        self.sent = [0] * n
        """For each rank the numbers it sends per step, gradients and updates."""
        self.across = [0] * n
        """Of these the ones that go to another node."""
        self._peers = [0] * n  # a set of ranks is a number, with a bit for each
        self.least_sent = 0
        """What all ranks together would send if each block were owned by a rank that holds most of
        it, whatever the work of that rank."""
        self._node = [rank // config.ranks_per_node for rank in assignment.ranks]
        self.refreshed = [0] * frequency
        """For each phase the number of blocks, of all ranks, that are refreshed on its steps."""
        every = [0.0] * n
        refresh = [[0.0] * frequency for _ in range(n)]
        shapes = [site.shape for site in assignment.sites]
        alike = Counter(zip(shapes, assignment.phases, assignment.owners, strict=True))
        for (shape, phase, owner), count in alike.items():
            flops, flops_of_roots, state = costs(shape)
            every[owner] += count * flops
            refresh[owner][phase] += count * flops_of_roots
            self.state[owner] += count * state
            self.owned[owner] += count
            self.refreshed[phase] += count
        self.load = [e + sum(r) / frequency for e, r in zip(every, refresh, strict=True)]
        """For each rank FLOPs per step, with a share of 1 / frequency of its roots."""
        self.phase_load = [[e + r for r in row] for e, row in zip(every, refresh, strict=True)]
        """For each rank and phase the FLOPs of a step of that phase."""
        owners_of: dict[ShardMap, list[list[int]]] = defaultdict(list)
        for shard_map, first in zip(assignment.maps, assignment.first, strict=True):
            owners_of[shard_map].append(assignment.owners[first : first + len(shard_map.sites)])
        for shard_map, owners in owners_of.items():
            for site, of_site in zip(shard_map.sites, zip(*owners, strict=True), strict=True):
                self._add_sent(site, shard_map, Counter(of_site))
        on_node: Counter[int] = Counter()
        for rank, node in enumerate(self._node):
            on_node[node] += 1 << rank
        near = [on_node[node] & peers for node, peers in zip(self._node, self._peers, strict=True)]
        self.peers = [
            (inside.bit_count(), (peers - inside).bit_count())
            for inside, peers in zip(near, self._peers, strict=True)
        ]
        """For each rank the number of those that it exchanges something with, on its node and on
        others."""

    def _add_sent(self, site: Site, shard_map: ShardMap, owners: Counter[int]) -> None:
        """Add what the blocks of one site send, given how many each owner has."""
        node, held = self._node, site.held
        size = volume(site.rectangle)
        everywhere = shard_map.replicas * size
        held_in: Counter[int] = Counter()
        for rank, elements in held.items():
            held_in[node[rank]] += elements
        holders, owning = (sum(1 << rank for rank in ranks) for ranks in (held, owners))
        for rank in owners:
            self._peers[rank] |= holders & ~(1 << rank)
        for rank in held:
            self._peers[rank] |= owning & ~(1 << rank)
        wanted: Counter[int] = Counter()  # by replica: blocks whose owner is there
        wanted_near: Counter[tuple[int, int]] = Counter()  # and by node of the owner
        for owner, count in owners.items():
            # The update goes to all that hold a piece.
            self.sent[owner] += count * (everywhere - held.get(owner, 0))
            self.across[owner] += count * (everywhere - held_in[node[owner]])
            replica = shard_map.replica_of[owner]
            wanted[replica] += count
            wanted_near[replica, node[owner]] += count
        # The gradient comes from the owner's own replica.
        for rank, elements in held.items():
            replica = shard_map.replica_of[rank]
            self.sent[rank] += elements * (wanted[replica] - owners[rank])
            self.across[rank] += elements * (wanted[replica] - wanted_near[replica, node[rank]])
        least = everywhere + size - 2 * max(held.values())
        self.least_sent += least * owners.total()


def summed(plans: Sequence[Totals], name: str) -> list[float]:
    """What each rank of these plans has of a quantity in all of them; [0] if there are none."""
    of_ranks: Counter[int] = Counter()
    for plan in plans:
        of_ranks.update(dict(zip(plan.ranks, getattr(plan, name), strict=True)))
    return list(map(float, of_ranks.values())) or [0.0]
