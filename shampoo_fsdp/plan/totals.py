"""What each rank owns, computes and sends: for reports, which look at all ranks."""

from collections import Counter, defaultdict

from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ShardMap, Site, volume

__all__ = ["Totals"]


class Totals:
    """Sums over the blocks of each rank, and what it sends.

    All blocks of one site that one rank owns are counted together, and each site's pieces are
    visited once, whatever the number of layers.
    """

    def __init__(self, assignment: Assignment) -> None:
        config, costs = assignment.config, assignment.costs
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
        self.least_sent = 0
        """What all ranks together would send if each block were owned by a rank that holds most of
        it, whatever the work of that rank."""
        self._node = [rank // config.ranks_per_node for rank in assignment.ranks]
        in_phase = Counter(assignment.phase_of)
        self.refreshed = [in_phase[phase] for phase in range(frequency)]
        """For each phase the number of blocks, of all ranks, that are refreshed on its steps."""
        every = [0.0] * n
        refresh = [[0.0] * frequency for _ in range(n)]
        flops = [costs[site.shape] for site in assignment.sites]
        blocks = zip(assignment.site_of, assignment.phase_of, assignment.owners, strict=True)
        for number, phase, owner in blocks:
            every[owner] += flops[number][0]
            refresh[owner][phase] += flops[number][1]
        self.load = [e + sum(r) / frequency for e, r in zip(every, refresh, strict=True)]
        """For each rank FLOPs per step, with a share of 1 / frequency of its roots."""
        self.phase_load = [[e + r for r in row] for e, row in zip(every, refresh, strict=True)]
        """For each rank and phase the FLOPs of a step of that phase."""

        owners_of: dict[int, dict[int, int]] = defaultdict(dict)
        pairs = Counter(zip(assignment.site_of, assignment.owners, strict=True))
        for (number, owner), count in pairs.items():
            owners_of[number][owner] = count
        maps = assignment.maps_of_sites()
        for number, (site, shard_map) in enumerate(zip(assignment.sites, maps, strict=True)):
            self._add(site, shard_map, owners_of[number], costs[site.shape][2])

    def _add(self, site: Site, shard_map: ShardMap, owners: dict[int, int], state: int) -> None:
        """Add the blocks of one site, given how many each owner has, and the state of one."""
        node, held = self._node, site.held
        size = volume(site.rectangle)
        everywhere = shard_map.replicas * size
        held_in: dict[int, int] = defaultdict(int)
        for rank, elements in held.items():
            held_in[node[rank]] += elements
        wanted: dict[int, int] = defaultdict(int)  # by replica: blocks whose owner is there
        wanted_near: dict[tuple[int, int], int] = defaultdict(int)  # and by node of the owner
        for owner, count in owners.items():
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
            self.sent[rank] += elements * (total - owners.get(rank, 0))
            self.across[rank] += elements * (total - wanted_near.get((replica, node[rank]), 0))
        least = everywhere + size - 2 * max(held.values())
        self.least_sent += least * sum(owners.values())
