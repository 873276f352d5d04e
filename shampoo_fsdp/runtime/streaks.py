"""What has gone wrong many times in a row: who hears of it, and where weight decay stops."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from logging import getLogger

import torch
from torch import Tensor

from shampoo_fsdp.rules.grafting import LARGEST_GRADIENT
from shampoo_fsdp.rules.matrices import to_device
from shampoo_fsdp.runtime.parameters import Member
from shampoo_fsdp.runtime.ranks import RankSet
from shampoo_fsdp.runtime.team import Parameters, Team
from shampoo_fsdp.validation import name_some

__all__ = ["Streaks"]

_logger = getLogger(__name__)

_PERIOD = 10
_SAID_AT = (1000, 100, 10)

_BAD_GRADIENT = (
    "the gradient of {} has been unusable for {} steps in a row{}: entries that are not finite, "
    "or above 1e15. What they reach gets neither updates nor weight decay meanwhile. Look at the "
    "model and the data; with on_nonfinite = 'raise' such a step is an error."
)
_FAILED_ROOT = (
    "an inverse root or eigenbasis of {} has failed at {} refreshes in a row{}: the last good "
    "one stays in use. Look at its gradients, or try another 'root_method'."
)


class Streaks:
    """Reads what is counted on the device, without waiting for it.

    On every tenth step the ranks that parameters live on join their counts and let them set out for
    the host, which reads them ten steps later: all ranks know the same on the same step.
    """

    def __init__(self, parameters: Parameters) -> None:
        """All streaks begin here."""
        self._device = parameters.device
        for member in parameters.members:
            member.stalled = ()
        for bucket in parameters.buckets:
            for owned in bucket.stacks:
                owned.stack.skipped.streak.zero_()
                owned.stack.failed_roots.streak.zero_()
        self._sets = [_Living(ranks, parameters) for ranks in parameters.rank_sets]
        self._event = torch.cuda.Event() if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arriving: Tensor | None = None
        self._reached: dict[tuple[str, Member], int] = {}
        self._steps = 0

    def look(self) -> None:
        """Call it at the end of each step, on all ranks, while members have their gradients."""
        self._steps += 1
        if self._steps % _PERIOD or not self._sets:
            return
        if self._arriving is not None:
            if self._event is not None:
                self._event.synchronize()  # the host does not run ten steps ahead
            self._read(iter(self._arriving.tolist()))
        joined = torch.cat([living.counts() for living in self._sets])
        self._arriving = joined.to("cpu", non_blocking=True, copy=True)  # to pinned memory
        if self._event is not None:
            self._event.record()

    def _read(self, counts: Iterator[int]) -> None:
        for living in self._sets:
            for message in (_BAD_GRADIENT, _FAILED_ROOT):
                lengths = {
                    member: list(itertools.islice(counts, len(part.grid)))
                    for member, part in living.parts.items()
                }
                if message == _BAD_GRADIENT:
                    for member, own in lengths.items():
                        pieces = living.parts[member].scatter_in if max(own) >= _PERIOD else ()
                        member.stalled = [p.in_shard for p in pieces if own[p.index] >= _PERIOD]
                self._say(message, " in {} of {} blocks", lengths, living.ranks)
            lengths = {member: [_PERIOD * (next(counts) - 1)] for member in living.others}
            self._say(_BAD_GRADIENT, ", one in ten looked at", lengths, living.ranks)

    def _say(
        self, message: str, where: str, lengths: Mapping[Member, Sequence[int]], ranks: RankSet
    ) -> None:
        """Once at each of the lengths, one line for all parameters, on the first of the ranks."""
        news: dict[int, list[Member]] = defaultdict(list)
        for member, own in lengths.items():
            reached = next((length for length in _SAID_AT if max(own) >= length), 0)
            if reached > self._reached.get((message, member), 0) and ranks.position == 0:
                news[reached].append(member)
            self._reached[message, member] = reached
        for members in news.values():
            found = [length for member in members for length in lengths[member]]
            many = sum(length >= _PERIOD for length in found)
            names = name_some([member.name for member in members])
            _logger.warning(message.format(names, max(found), where.format(many, len(found))))


class _Living:
    """The parameters that live on the same ranks."""

    def __init__(self, ranks: RankSet, parameters: Parameters) -> None:
        self.ranks = ranks
        living = [m for m in parameters.members if set(m.spec.ranks) == set(ranks.ranks)]
        self.others = [member for member in living if not member.part]
        """That are not preconditioned; looked at on every tenth step alone."""
        # One at most.
        teams = [team for team in parameters.teams if not team.parts.keys().isdisjoint(living)]
        self.parts = {member: part for team in teams for member, part in team.parts.items()}
        self._stacks = [of.stack for team in teams for b in team.buckets for of in b.stacks]
        positions = [position for team in teams for position in _positions(team)]
        self._device = parameters.device
        self._positions = to_device(
            torch.tensor(positions, dtype=torch.int64, device="cpu"), self._device
        )
        self._looks = torch.zeros(len(self.others), dtype=torch.int32, device=self._device)

    def counts(self) -> Tensor:
        """Streaks of bad gradients and of failed roots of each block, and of each of the others in
        times that they were looked at: on any rank."""
        blocks = sum(len(part.grid) for part in self.parts.values())
        counts = torch.zeros(2, blocks, dtype=torch.int32, device=self._device)
        if self._stacks:
            skipped = torch.cat([stack.skipped.streak for stack in self._stacks])
            failed = torch.cat([stack.failed_roots.streak for stack in self._stacks])
            counts.index_copy_(1, self._positions, torch.stack([skipped, failed]))
        self._look_at_others()
        joined = torch.cat([counts.flatten(), self._looks])
        self.ranks.maximum(joined)
        return joined

    def _look_at_others(self) -> None:
        """Those without a gradient keep their streaks."""
        gradients = {
            k: member.gradient
            for k, member in enumerate(self.others)
            if member.gradient is not None and member.gradient.numel()
        }
        if gradients:
            largest = torch.stack(torch._foreach_norm(list(gradients.values()), math.inf))
            is_bad = (largest < LARGEST_GRADIENT).logical_not_()  # also NaN
            where = to_device(torch.tensor(list(gradients), device="cpu"), self._device)
            self._looks[where] = (self._looks[where] + 1) * is_bad


def _positions(team: Team) -> list[int]:
    """Where this rank's blocks stand among those of the team, in the order of their stacks."""
    sizes = [len(part.grid) for part in team.parts.values()]
    first = dict(zip(team.parts, itertools.accumulate(sizes, initial=0), strict=False))
    return [
        first[member] + block.index
        for bucket in team.buckets
        for owned in bucket.stacks
        for member, block in zip(owned.members, owned.blocks, strict=True)
    ]
