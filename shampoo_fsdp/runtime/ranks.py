"""Sets of ranks: their process groups, and what they tell each other, so that what differs is an
error on each of them, never a hang."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor, Replicate

__all__ = ["RankSet", "Replicas", "group_of", "tell_all"]

Replicas = DeviceMesh | dist.ProcessGroup | None
"""Where plain tensors are replicated."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class RankSet:
    """Ranks that hold the same parameters, and all ways in which they exchange something."""

    ranks: tuple[int, ...]
    """Global, ascending."""
    group: dist.ProcessGroup | None
    """None for one rank."""

    @property
    def position(self) -> int:
        """Of this rank."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, mine: _T) -> list[_T]:
        """What each rank has, in the order of the ranks."""
        if self.group is None:
            return [mine]
        everyone = [mine] * len(self.ranks)
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def maximum(self, values: Tensor) -> None:
        """Replace each value by the largest one of any rank, in place."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)

    def all_to_all(
        self,
        arriving: Tensor,
        leaving: Tensor,
        received: Sequence[int],
        sent: Sequence[int],
        what: str,
    ) -> Callable[[], object]:
        """Let rows set out for other ranks; returns the function that waits for those of others.

        Args:
            arriving: is filled with rows, in the order of the ranks that they come from.
            leaving: the rows, in the order of the ranks that they go to.
            received, sent: how many, of each rank.
            what: "gradients" or "updates".
        """
        work = dist.all_to_all_single(
            arriving, leaving, received, sent, group=self.group, async_op=True
        )
        wait: Callable[[], object] = work.wait
        return wait

    def agree(self, problem: str | None, facts: Mapping[str, Sequence[object]]) -> None:
        """Raise the same on every rank if one of them has a problem or other facts.

        Args:
            problem: what is wrong on this rank, if anything.
            facts: lists that must be equal; the key names them in the error.

        Raises:
            ValueError: says which rank has the problem, or which fact differs and how.
        """
        texts = {fact: [str(item) for item in items] for fact, items in facts.items()}
        mine = {fact: sha256(repr(items).encode()).hexdigest() for fact, items in texts.items()}
        everyone = self.gather((problem, mine))
        for rank, (theirs, _) in zip(self.ranks, everyone, strict=True):
            if theirs is not None:
                raise ValueError(theirs if theirs == problem else f"on rank {rank}: {theirs}")
        hashes = [theirs for _, theirs in everyone]
        for fact, items in texts.items():
            odd = next((i for i, of in enumerate(hashes) if of[fact] != hashes[0][fact]), 0)
            if odd:
                lists = self.gather(items)
                pairs = itertools.zip_longest(lists[0], lists[odd], fillvalue="nothing more")
                here, there = next(pair for pair in pairs if pair[0] != pair[1])
                raise ValueError(
                    f"ranks disagree about {fact}: rank {self.ranks[0]} has {here}, rank "
                    f"{self.ranks[odd]} has {there}."
                )

    def make_count(self) -> Callable[[int], bool]:
        """A function that adds to a number that these ranks have in common, and says whether it is
        that of the ranks; none waits for another one. All ranks must call this in the same order.
        """
        key = f"shampoo_fsdp/{self.ranks}/{_counts[self.ranks]}"
        _counts[self.ranks] += 1
        return lambda change: _get_default_store().add(key, change) == len(self.ranks)


_counts: Counter[tuple[int, ...]] = Counter()
"""How many of them each set of ranks has."""


def tell_all(rank_sets: Sequence[RankSet], mine: _T | None) -> _T | None:
    """What the first rank has that has anything, of these sets and sets that are linked by them."""
    # Twice, since a set may hear of the trouble in another one through a third.
    for ranks in (*rank_sets, *rank_sets):
        everyone = ranks.gather(mine)
        mine = mine or next(filter(None, everyone), None)
    return mine


def find_group(
    ranks: tuple[int, ...], parameters: Iterable[Tensor], replicas: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The process group of these ranks, an existing one where there is one; None for one rank.

    Args:
        parameters: their meshes have groups.
        replicas: another one.
    """
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    # Not a set: every rank must find the same one first.
    meshes = dict.fromkeys(p.device_mesh for p in parameters if isinstance(p, DTensor))
    groups = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    groups += [] if replicas is None else [replicas]
    found = (g for g in groups if tuple(dist.get_process_group_ranks(g)) == ranks)
    return next(found, None) or dist.new_group(list(ranks), use_local_synchronization=True)


def group_of(replicas: Any) -> dist.ProcessGroup | None:
    """The process group of these replicas; a TypeError if they are neither a group nor a mesh."""
    if isinstance(replicas, DeviceMesh):
        replicas = replicas.get_group()  # which is an error for several dimensions
    if not isinstance(replicas, dist.ProcessGroup | None):
        raise TypeError(f"replicas is {replicas!r}; allowed: a process group, a DeviceMesh, None.")
    return replicas


def is_first_replica(parameter: Tensor, replicas: dist.ProcessGroup | None) -> bool:
    """Whether this rank's shard is the first of those that are alike on its mesh."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        placed = zip(mesh.get_coordinate() or (), parameter.placements, strict=False)
        return all(at == 0 for at, placement in placed if isinstance(placement, Replicate))
    return replicas is None or dist.get_rank(replicas) == 0
