"""Chooses the owner of each block: even work first, then where most of the block lies already."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.shards import Site

__all__ = ["Costs", "choose_owners"]

Costs = Mapping[tuple[int, ...], tuple[float, float, int]]
"""For each shape of block FLOPs on every step, further FLOPs of a refresh, and bytes of state."""

# How far above the mean a rank's work may come for the sake of keeping a block where it lies. Where
# ranks divide a model's sizes, as powers of two do, even work and short ways agree, and little is
# paid; elsewhere (Llama 3 on 5, 7 or 12 ranks) 0.03 saves 2 to 4% of the traffic of 0.01.
_LOCALITY_SLACK = 0.03


def choose_owners(
    sites: Sequence[Site],
    site_of: Sequence[int],
    phase_of: Sequence[int],
    ranks: Sequence[int],
    config: ShampooConfig,
    costs: Costs,
) -> list[int]:
    """The owner of each block, a position among the ranks.

    The greedy rule "longest processing time first, to the rank with the least work", run within
    each refresh phase, says how even the work can be. It runs once more, and now gives a block to
    a rank that holds much of it as long as no rank comes above that, or above the mean by more
    than a small slack.

    Args:
        sites: where blocks lie.
        site_of, phase_of: for each block the index of its site, and its refresh phase.
        ranks: ascending; they tell the nodes.
    """
    kinds = [_kind(site, ranks, config, costs) for site in sites]
    phases: dict[int, list[int]] = defaultdict(list)
    for block, phase in enumerate(phase_of):
        phases[phase].append(block)
    # Costly blocks first. Of equal ones first those that lose most by going elsewhere; those
    # that many ranks hold a little of then level out the work.
    urgency = [(-kind.step, -kind.most, number) for number, kind in enumerate(kinds)]
    order = [sorted(phases[p], key=lambda block: urgency[site_of[block]]) for p in sorted(phases)]
    return _near(kinds, site_of, order, len(ranks), config.block_alignment == "shard")


@dataclass(frozen=True)
class _Kind:
    """What the choice needs to know of the blocks of one site."""

    every: float
    """FLOPs on every step."""
    step: float
    """FLOPs on a step that refreshes the block."""
    mean: float
    """FLOPs per step, on average over a period."""
    most: int
    """Elements of the largest piece."""
    near: tuple[tuple[int, ...], ...]
    """Ranks that hold the largest piece, the next one, ..., then those of the node that holds
    most of the block."""


def _kind(site: Site, ranks: Sequence[int], config: ShampooConfig, costs: Costs) -> _Kind:
    every, refresh, _ = costs[site.shape]
    by_size: dict[int, list[int]] = defaultdict(list)
    by_node: dict[int, int] = defaultdict(int)
    for rank, elements in site.held.items():
        by_size[elements].append(rank)
        by_node[ranks[rank] // config.ranks_per_node] += elements
    near = [tuple(sorted(by_size[elements])) for elements in sorted(by_size, reverse=True)]
    node = max(by_node, key=lambda node: (by_node[node], -node))
    near.append(tuple(r for r, rank in enumerate(ranks) if rank // config.ranks_per_node == node))
    return _Kind(
        every=every,
        step=every + refresh,
        mean=every + refresh / config.precondition_frequency,
        most=max(by_size),
        near=tuple(near[:1] if config.block_alignment == "shard" else near),
    )


def _least(
    kinds: Sequence[_Kind], site_of: Sequence[int], order: Sequence[Sequence[int]], ranks: int
) -> list[tuple[float, float]]:
    """With owners chosen for even work alone, for each phase: the largest FLOPs of a rank on its
    step, and the largest sum of a rank's mean FLOPs over this and earlier phases."""
    every, mean = [0.0] * ranks, [0.0] * ranks
    largest = []
    for blocks in order:
        heap = [(load, rank) for rank, load in enumerate(every)]
        heapq.heapify(heap)
        for block in blocks:
            kind = kinds[site_of[block]]
            load, rank = heap[0]
            heapq.heapreplace(heap, (load + kind.step, rank))
            every[rank] += kind.every
            mean[rank] += kind.mean
        largest.append((max(heap)[0], max(mean)))
    return largest


def _near(
    kinds: Sequence[_Kind],
    site_of: Sequence[int],
    order: Sequence[Sequence[int]],
    ranks: int,
    stay: bool,
) -> list[int]:
    """Owners near their blocks; with `stay` a block does not leave the ranks that hold it."""
    owners = [-1] * len(site_of)
    every, mean = [0.0] * ranks, [0.0] * ranks
    all_means = sum(kinds[site].mean for site in site_of) / ranks
    every_so_far = mean_so_far = 0.0
    for blocks, even in zip(order, _least(kinds, site_of, order, ranks), strict=True):
        here = [kinds[site_of[block]] for block in blocks]
        mean_step = every_so_far + sum(kind.step for kind in here) / ranks
        every_so_far += sum(kind.every for kind in here) / ranks
        mean_so_far += sum(kind.mean for kind in here) / ranks
        most_step = max(even[0], (1.0 + _LOCALITY_SLACK) * mean_step)
        most_mean = max(even[1], mean_so_far + _LOCALITY_SLACK * all_means)
        load = list(every)
        heap = [(flops, rank) for rank, flops in enumerate(load)]
        heapq.heapify(heap)
        for block, kind in zip(blocks, here, strict=True):
            nearest = (min(group, key=load.__getitem__) for group in kind.near)
            fitting = (
                rank
                for rank in nearest
                if stay
                or (load[rank] + kind.step <= most_step and mean[rank] + kind.mean <= most_mean)
            )
            if (owner := next(fitting, -1)) < 0:
                owner = _pop_least(heap, load)
            owners[block] = owner
            load[owner] += kind.step
            every[owner] += kind.every
            mean[owner] += kind.mean
            heapq.heappush(heap, (load[owner], owner))
    return owners


def _pop_least(heap: list[tuple[float, int]], load: Sequence[float]) -> int:
    """The rank with the least work."""
    while True:
        flops, rank = heapq.heappop(heap)
        if flops == load[rank]:  # else it is out of date, and there is a newer entry
            return rank
