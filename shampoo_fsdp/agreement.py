"""Comparing facts on all ranks, so that what differs is an error on each of them, never a hang."""

import itertools
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TypeVar

import torch.distributed as dist

__all__ = ["agree", "gather"]

_T = TypeVar("_T")


def agree(
    group: dist.ProcessGroup | None,
    ranks: Sequence[int],
    problem: str | None,
    facts: Mapping[str, Sequence[object]],
) -> None:
    """Raise the same on every rank if one of them has a problem or other facts.

    Args:
        group: of the ranks; None for one rank.
        ranks: global, in the order of the group.
        problem: what is wrong on this rank, if anything.
        facts: lists that must be equal; the key names them in the error.

    Raises:
        ValueError: says which rank has the problem, or which fact differs and how.
    """
    texts = {fact: [str(item) for item in items] for fact, items in facts.items()}
    mine = {fact: sha256(repr(items).encode()).hexdigest() for fact, items in texts.items()}
    everyone = gather(group, ranks, (problem, mine))
    for rank, (theirs, _) in zip(ranks, everyone, strict=True):
        if theirs is not None:
            raise ValueError(theirs if theirs == problem else f"on rank {rank}: {theirs}")
    for fact, items in texts.items():
        odd = next((i for i, (_, f) in enumerate(everyone) if f[fact] != everyone[0][1][fact]), 0)
        if odd:
            lists = gather(group, ranks, items)
            pairs = itertools.zip_longest(lists[0], lists[odd], fillvalue="nothing more")
            here, there = next(pair for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"ranks disagree about {fact}: rank {ranks[0]} has {here}, rank {ranks[odd]} has "
                f"{there}."
            )


def gather(group: dist.ProcessGroup | None, ranks: Sequence[int], mine: _T) -> list[_T]:
    """What each rank has, in the order of the ranks."""
    if group is None:
        return [mine]
    everyone = [mine] * len(ranks)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone
