"""Sets of ranks: their process groups, and what they tell each other, so that what differs is an
error on each of them, never a hang."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor, Replicate

from shampoo_fsdp.runtime.stalls import told_if_long

__all__ = ["RankSet"]

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
    stall_warning_seconds: float = field(default=math.inf, kw_only=True)
    """The setting."""

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

    def connect(
        self, device: torch.device, received: Sequence[int] = (), sent: Sequence[int] = ()
    ) -> None:
        """Open the connections that steps use, and no others.

        NCCL opens each on its first use, for which both ranks wait. On a first step that would be
        beside the collectives of other groups, which may be waiting the other way round.

        Args:
            received, sent: how much comes from each rank and goes to it.
        """
        if self.group is None:
            return
        numbers = [min(number, 1) for number in received], [min(number, 1) for number in sent]
        arriving, leaving = (torch.zeros(sum(of), 1, device=device) for of in numbers)
        if received:
            self.all_to_all(arriving, leaving, *numbers, "connections", "of a new optimizer")()
        maximum = torch.zeros(1, device=device)
        self.maximum(maximum)
        maximum.tolist()  # the host waits, also for what set out before

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
        where: str = "",
    ) -> Callable[[], object]:
        """Let rows set out for other ranks; returns the function that waits for those of others.

        If it waits long a warning says so; on CUDA the current stream waits, not the host.

        Args:
            arriving: is filled with rows, in the order of the ranks that they come from.
            leaving: the rows, in the order of the ranks that they go to.
            received, sent: how many, of each rank.
            what: "gradients", "updates" or "connections".
            where: of which step and bucket, for the warning.
        """
        work = dist.all_to_all_single(
            arriving, leaving, received, sent, group=self.group, async_op=True
        )

        def message(seconds: float) -> str:
            rows = map(max, received, sent)
            peers = [rank for rank, number in zip(self.ranks, rows, strict=True) if number]
            return (
                f"{what} {where}: the exchange with ranks {in_runs(peers)} (of "
                f"{in_runs(self.ranks)}, which share blocks) has taken {seconds:.0f} s so far. "
                "This rank goes on waiting. One that does not say this is late, or waits elsewhere."
            )

        def wait() -> None:
            with told_if_long(arriving.device, partial(self._patience, arriving.device), message):
                work.wait()

        return wait

    def _patience(self, device: torch.device) -> float:
        """Before the group itself gives up; its timeout may change while a job runs."""
        try:
            limit = self.group._get_backend(device).options._timeout.total_seconds()  # type: ignore[union-attr]
        except (AttributeError, RuntimeError):  # a backend without
            limit = math.inf
        return min(self.stall_warning_seconds, limit / 2)

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


def in_runs(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0-7, 12."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{of[0]}-{of[-1]}" if len(of) > 1 else f"{of[0]}" for of in ends)


def find_groups(
    wanted: Mapping[tuple[int, ...], Iterable[Tensor]], replicas: dist.ProcessGroup | None
) -> dict[tuple[int, ...], dist.ProcessGroup | None]:
    """The process group of each of these sets of ranks, an existing one where there is one; None
    for one rank.

    A default group that is bound to a device makes others by splitting itself, for which it needs
    all ranks: these make all that any of them wants, in one order. Elsewhere members make theirs
    alone, as there may be ranks without such an optimizer.

    Args:
        wanted: with parameters, whose meshes have groups.
        replicas: another one.

    Raises:
        ValueError: a group has no backend for the device of the parameters.
    """
    found = {ranks: _existing_group(ranks, on, replicas) for ranks, on in wanted.items()}
    missing = sorted(ranks for ranks, group in found.items() if group is None and len(ranks) > 1)
    together = dist.is_initialized() and splits_groups()
    if together:
        everyone = [missing] * dist.get_world_size()
        dist.all_gather_object(everyone, missing)
        missing = sorted(set(itertools.chain.from_iterable(everyone)))
    for ranks in missing:
        group = dist.new_group(list(ranks), use_local_synchronization=not together)
        if dist.get_rank() in ranks:
            found[ranks] = group
    for ranks, on in wanted.items():
        device = next(iter(on)).device.type
        if (group := found[ranks]) and f"{device}:" not in (has := dist.get_backend_config(group)):
            raise ValueError(
                f"parameters are on '{device}', for which the group of ranks {in_runs(ranks)} has "
                f"no backend ('{has}'): give init_process_group both, as in 'cpu:gloo,cuda:nccl'."
            )
    return found


def splits_groups() -> bool:
    """Whether PyTorch makes groups out of that of all ranks."""
    return dist.group.WORLD is not None and dist.group.WORLD.bound_device_id is not None


def _existing_group(
    ranks: tuple[int, ...], parameters: Iterable[Tensor], replicas: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    # Not a set: every rank must find the same one first.
    meshes = dict.fromkeys(p.device_mesh for p in parameters if isinstance(p, DTensor))
    groups = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
    groups += [] if replicas is None else [replicas]
    found = (g for g in groups if tuple(dist.get_process_group_ranks(g)) == ranks)
    return next(found, None)


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
