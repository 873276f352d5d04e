"""Chooses the owner of each block: even work first, then where most of the block lies already."""

import functools
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.shards import Site

Costs = Callable[[tuple[int, ...]], tuple[float, float, int]]
"""For a shape of block FLOPs on every step, further FLOPs of a refresh, and bytes of state."""

# How far above the mean a rank's work may come for the sake of keeping a block where it lies. Where
# ranks divide a model's sizes, as powers of two do, even work and short ways agree, and little is
# paid; elsewhere (Llama 3 on 5, 7 or 12 ranks) 0.03 saves 2 to 4% of the traffic of 0.01.
_LOCALITY_SLACK = 0.03


def choose_owners(
    sites: Sequence[Site],
    phases: Sequence[int],
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
        sites, phases: of each block, where it lies and when its roots are refreshed.
        ranks: ascending; they tell the nodes.
    """
    costs = functools.cache(costs)
    on_node: dict[int, list[int]] = defaultdict(list)
    for position, rank in enumerate(ranks):
        on_node[rank // config.ranks_per_node].append(position)
    nodes = {node: tuple(positions) for node, positions in on_node.items()}
    groups = {positions: positions for positions in nodes.values()}  # which kinds share

    def kind_of(number: int, site: Site) -> _Kind:
        every, refresh, _ = costs(site.shape)
        by_size: dict[int, list[int]] = defaultdict(list)
        by_node: dict[int, int] = defaultdict(int)
        for rank, elements in site.held.items():
            by_size[elements].append(rank)
            by_node[ranks[rank] // config.ranks_per_node] += elements
        near = [tuple(sorted(by_size[elements])) for elements in sorted(by_size, reverse=True)]
        near.append(nodes[max(by_node, key=lambda node: (by_node[node], -node))])
        near = [groups.setdefault(group, group) for group in near]
        return _Kind(
            every=every,
            step=every + refresh,
            mean=every + refresh / config.precondition_frequency,
            near=tuple(near[:1] if config.block_alignment == "shard" else near),
            urgency=(-(every + refresh), -max(by_size), number),
        )

    of_site = {site: kind_of(number, site) for number, site in enumerate(dict.fromkeys(sites))}
    in_phase: dict[int, dict[_Kind, list[int]]] = defaultdict(lambda: defaultdict(list))
    for block, (site, phase) in enumerate(zip(sites, phases, strict=True)):
        in_phase[phase][of_site[site]].append(block)
    order = [
        sorted(in_phase[phase].items(), key=lambda alike: alike[0].urgency)
        for phase in sorted(in_phase)
    ]
    if config.owner_scope == "near":
        return _deal_near(sites, order, ranks, config)
    limits: list[tuple[float, float]] = [(math.inf, math.inf)] * len(order)
    if config.block_alignment != "shard":
        limits = _limits(order, len(ranks))
    return _deal(order, len(sites), len(ranks), limits)


@dataclass(frozen=True, eq=False)
class _Kind:
    """What the choice needs to know of the blocks of one site."""

    every: float
    """FLOPs on every step."""
    step: float
    """FLOPs on a step that refreshes the block."""
    mean: float
    """FLOPs per step, on average over a period."""
    near: tuple[tuple[int, ...], ...]
    """Ranks that hold the largest piece, the next one, ..., then those of the node that holds
    most of the block. With shards' borders as blocks' borders those of the first alone."""
    urgency: tuple[float, int, int]
    """Costly blocks first. Of equal ones first those that lose most by going elsewhere; those
    that many ranks hold a little of then level out the work."""


_Order = Sequence[Sequence[tuple[_Kind, Sequence[int]]]]
"""For each phase the blocks of each kind, the most urgent kind first."""


def _limits(order: _Order, ranks: int) -> list[tuple[float, float]]:
    """For each phase the most FLOPs of a rank on its step, and the most mean FLOPs over this and
    earlier phases."""
    every = mean = 0.0
    all_means = sum(kind.mean * len(blocks) for of in order for kind, blocks in of) / ranks
    limits = []
    for of_phase, (even_step, even_mean) in zip(order, _evenly(order, ranks), strict=True):
        step = every + sum(kind.step * len(blocks) for kind, blocks in of_phase) / ranks
        every += sum(kind.every * len(blocks) for kind, blocks in of_phase) / ranks
        mean += sum(kind.mean * len(blocks) for kind, blocks in of_phase) / ranks
        limits.append(
            (
                max(even_step, (1.0 + _LOCALITY_SLACK) * step),
                max(even_mean, mean + _LOCALITY_SLACK * all_means),
            )
        )
    return limits


def _evenly(order: _Order, ranks: int) -> Iterator[tuple[float, float]]:
    """For each phase the largest FLOPs and mean FLOPs that a rank comes to, if each block goes to
    the rank with the least work."""
    every, mean = [0.0] * ranks, [0.0] * ranks
    for of_phase in order:
        heap = [(load, rank) for rank, load in enumerate(every)]
        heapq.heapify(heap)
        for kind, blocks in of_phase:
            for _ in blocks:
                load, rank = heap[0]
                heapq.heapreplace(heap, (load + kind.step, rank))
                every[rank] += kind.every
                mean[rank] += kind.mean
        yield max(heap)[0], max(mean)


def _deal(
    order: _Order, blocks: int, ranks: int, limits: Sequence[tuple[float, float]]
) -> list[int]:
    """The owners of the blocks, each near its block within the limits, else for even work."""
    owners, everybody = [-1] * blocks, tuple(range(ranks))
    every, mean = [0.0] * ranks, [0.0] * ranks
    for of_phase, (most_step, most_mean) in zip(order, limits, strict=True):
        load = list(every)
        heaps: _Heaps = {}
        for kind, block in _each(of_phase):
            for group in kind.near:
                owner = _least_busy(group, load, heaps)
                if load[owner] + kind.step <= most_step and mean[owner] + kind.mean <= most_mean:
                    break
            else:
                owner = _least_busy(everybody, load, heaps)
            owners[block] = owner
            load[owner] += kind.step
            every[owner] += kind.every
            mean[owner] += kind.mean
    return owners


def _deal_near(
    sites: Sequence[Site], order: _Order, ranks: Sequence[int], config: ShampooConfig
) -> list[int]:
    """The owners of the blocks, each a rank that holds a part of it, with few ranks to send to.

    Of the holders whose work stays within the limits the one owns a block for which it has to know
    the fewest ranks of other nodes that it does not know yet; if there is none, the one with the
    least work. Blocks that many ranks hold come first: few ranks own them all.
    """
    nodes = [rank // config.ranks_per_node for rank in ranks]
    # A set of ranks is a number, with a bit for each.
    known = [sum(1 << r for r, other in enumerate(nodes) if other == node) for node in nodes]
    holders = {site: sum(1 << r for r in site.held) for site in set(sites)}
    scattered = [r * 0x9E3779B1 % 2**32 for r in range(len(ranks))]  # of alike ranks, far ones
    owners, every, mean = [-1] * len(sites), [0.0] * len(ranks), [0.0] * len(ranks)
    for of_phase, limits in zip(order, _limits(order, len(ranks)), strict=True):
        load = list(every)
        pairs = sorted(_each(of_phase), key=lambda pair: -len(sites[pair[1]].held))  # stable
        for kind, block in pairs:
            held, all_holders = sites[block].held, holders[sites[block]]
            choices = [
                ((all_holders & ~known[r]).bit_count(), load[r], scattered[r], r)
                for r in held
                if load[r] + kind.step <= limits[0] and mean[r] + kind.mean <= limits[1]
            ]
            owner = min(choices or [(0, load[r], scattered[r], r) for r in held])[-1]
            if all_holders & ~known[owner]:
                known[owner] |= all_holders
                for r in held:
                    known[r] |= 1 << owner
            owners[block] = owner
            load[owner] += kind.step
            every[owner] += kind.every
            mean[owner] += kind.mean
    return owners


def _each(of_phase: Sequence[tuple[_Kind, Sequence[int]]]) -> Iterator[tuple[_Kind, int]]:
    return ((kind, block) for kind, blocks in of_phase for block in blocks)


_Heaps = dict[int, list[tuple[float, int]]]
"""Load and rank of those of a group, by its id; loads may be older and smaller than now."""


def _least_busy(group: tuple[int, ...], load: Sequence[float], heaps: _Heaps) -> int:
    """The rank of a group that has the least load, the first of several."""
    heap = heaps.get(id(group))
    if heap is None:
        heap = heaps[id(group)] = [(load[rank], rank) for rank in group]
        heapq.heapify(heap)
    while heap[0][0] != load[heap[0][1]]:
        rank = heap[0][1]
        heapq.heapreplace(heap, (load[rank], rank))
    return heap[0][1]
