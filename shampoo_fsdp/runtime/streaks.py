"""What has gone wrong many times in a row: who hears of it, and where weight decay stops."""

import functools
import itertools
from collections.abc import Iterator
from logging import getLogger

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import to_device
from shampoo_fsdp.runtime.team import Parameters, Team

__all__ = ["Streaks"]

_logger = getLogger(__name__)

_PERIOD = 10
_SAID_AT = (1000, 100, 10)

_BAD_GRADIENT = (
    "the gradient of '{}' has been unusable for {} steps in a row{}: entries that are not finite, "
    "or above 1e15. What they reach gets neither updates nor weight decay meanwhile. Look at the "
    "model and the data; with on_nonfinite = 'raise' such a step is an error."
)
_FAILED_ROOT = (
    "an inverse root or eigenbasis of '{}' has failed at {} refreshes in a row{}: the last good "
    "one stays in use. Look at its gradients, or try another 'root_method'."
)


class Streaks:
    """Reads what is counted on the device, without waiting for it.

    On every tenth step the ranks of a team join their counts and let them set out for the host,
    which reads them ten steps later: all ranks know the same on the same step.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._device = device = parameters.device
        self._teams = [
            (team, to_device(torch.tensor(_positions(team), dtype=torch.int64), device))
            for team in parameters.teams
        ]
        self._others = [
            m for m in parameters.members if not m.part and m.counts and m.shard().numel()
        ]
        self._streaks = torch.zeros(len(self._others), dtype=torch.int32, device=device)
        """Of the others, in times that they were looked at."""
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arriving: Tensor | None = None
        self._said: dict[tuple[str, str], int] = {}
        self._steps = 0

    def look(self) -> None:
        """Call it at the end of each step, on all ranks, while members have their gradients."""
        self._steps += 1
        if self._steps % _PERIOD:
            return
        if self._arriving is not None:
            if self._event is not None:
                self._event.synchronize()  # the host does not run ten steps ahead
            self._read(iter(self._arriving.tolist()))
        self._look_at_others()
        counts = [self._of_blocks(*team).flatten() for team in self._teams]
        joined = torch.cat([*counts, self._streaks])
        self._arriving = joined.to("cpu", non_blocking=True, copy=True)  # to pinned memory
        if self._event is not None:
            self._event.record()

    def _of_blocks(self, team: Team, positions: Tensor) -> Tensor:
        """Streaks of bad gradients and failed roots, [2, blocks of the team]."""
        blocks = sum(len(part.grid) for part in team.parts.values())
        counts = torch.zeros(2, blocks, dtype=torch.int32, device=self._device)
        if stacks := [owned.stack for bucket in team.buckets for owned in bucket.stacks]:
            skipped = torch.cat([stack.skipped.streak for stack in stacks])
            failed = torch.cat([stack.failed_roots.streak for stack in stacks])
            counts.index_copy_(1, positions, torch.stack([skipped, failed]))
        team.ranks.maximum(counts)
        return counts

    def _look_at_others(self) -> None:
        gradients = [g for member in self._others if (g := member.gradient) is not None]
        if not gradients or len(gradients) < len(self._others):
            return
        # A sum of sizes is not finite where an entry is not; in 16 bits it might be without one.
        widest = functools.reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
        sizes = torch._foreach_norm(gradients, 1, dtype=widest)
        self._streaks.add_(1).mul_(torch.stack(sizes).isfinite().logical_not_())

    def _read(self, counts: Iterator[int]) -> None:
        for team, _ in self._teams:
            for message in (_BAD_GRADIENT, _FAILED_ROOT):
                for member, part in team.parts.items():
                    own = list(itertools.islice(counts, len(part.grid)))
                    if message == _BAD_GRADIENT:
                        pieces = part.scatter_in if max(own) >= _PERIOD else ()
                        member.stalled = [p.in_shard for p in pieces if own[p.index] >= _PERIOD]
                    if member.counts and team.ranks.position == 0:
                        many = sum(length >= _PERIOD for length in own)
                        where = f" in {many} of {len(own)} blocks"
                        self._say(message, member.name, max(own), where)
        for member, looks in zip(self._others, counts, strict=True):
            times = _PERIOD * (looks - 1)
            self._say(_BAD_GRADIENT, member.name, times, ", one in ten looked at")

    def _say(self, message: str, name: str, times: int, where: str) -> None:
        """Once at each of the lengths."""
        reached = next((length for length in _SAID_AT if times >= length), 0)
        if reached > self._said.get((message, name), 0):
            _logger.warning(message.format(name, times, where))
        self._said[message, name] = reached


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
