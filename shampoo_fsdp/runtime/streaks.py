"""What has gone wrong many times in a row: who hears of it, and where weight decay stops."""

import functools
import itertools
from collections.abc import Sequence
from logging import getLogger

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import to_device
from shampoo_fsdp.runtime.parameters import Member
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
        device = parameters.device
        self._counts: list[_Blocks | _Entries] = [_Blocks(t, device) for t in parameters.teams]
        others = [m for m in parameters.members if not m.part and m.counts and m.shard().numel()]
        self._counts.append(_Entries(others, device))
        self._steps = 0

    def look(self) -> None:
        """Call it at the end of each step, on all ranks, while members have their gradients."""
        self._steps += 1
        if self._steps % _PERIOD == 0:
            for counts in self._counts:
                counts.read()
                counts.set_out()


class _Counts:
    """Counts on their way from the device to the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arriving: Tensor | None = None
        self._said: dict[tuple[str, str], int] = {}

    def send(self, counts: Tensor) -> None:
        self._arriving = counts.to("cpu", non_blocking=True, copy=True)  # to pinned memory
        if self._event is not None:
            self._event.record()

    def arrived(self) -> list[list[int]]:
        """What was sent ten steps ago; the host does not run that far ahead."""
        if self._arriving is None:
            return []
        if self._event is not None:
            self._event.synchronize()
        return self._arriving.tolist()

    def say(self, message: str, name: str, times: int, where: str = "") -> None:
        """Once at each of the lengths."""
        reached = next((length for length in _SAID_AT if times >= length), 0)
        if reached > self._said.get((message, name), 0):
            _logger.warning(message.format(name, times, where))
        self._said[message, name] = reached


class _Blocks(_Counts):
    """Of the blocks of a team."""

    def __init__(self, team: Team, device: torch.device) -> None:
        super().__init__(device)
        self._team = team
        sizes = [len(part.grid) for part in team.parts.values()]
        first = dict(zip(team.parts, itertools.accumulate(sizes, initial=0), strict=False))
        owned = [owned for bucket in team.buckets for owned in bucket.stacks]
        self._stacks = [of.stack for of in owned]
        positions = [
            first[member] + block.index
            for of in owned
            for member, block in zip(of.members, of.blocks, strict=True)
        ]
        self._positions = to_device(torch.tensor(positions, dtype=torch.int64), device)
        self._first = first
        self._blocks = sum(sizes)

    def set_out(self) -> None:
        counts = torch.zeros(2, self._blocks, dtype=torch.int32, device=self.device)
        if self._stacks:
            skipped = torch.cat([stack.skipped.streak for stack in self._stacks])
            failed = torch.cat([stack.failed_roots.streak for stack in self._stacks])
            counts.index_copy_(1, self._positions, torch.stack([skipped, failed]))
        self._team.ranks.maximum(counts)
        self.send(counts)

    def read(self) -> None:
        for message, lengths in zip((_BAD_GRADIENT, _FAILED_ROOT), self.arrived(), strict=False):
            for member, first in self._first.items():
                part = self._team.parts[member]
                own = lengths[first : first + len(part.grid)]
                if message == _BAD_GRADIENT:
                    pieces = part.scatter_in if max(own) >= _PERIOD else ()
                    member.stalled = [p.in_shard for p in pieces if own[p.index] >= _PERIOD]
                if member.counts and self._team.ranks.position == 0:
                    many = sum(length >= _PERIOD for length in own)
                    self.say(message, member.name, max(own), f" in {many} of {len(own)} blocks")


class _Entries(_Counts):
    """Of parameters that are not preconditioned: looked at on every tenth step alone."""

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        super().__init__(device)
        self._members = members
        self._streaks = torch.zeros(1, len(members), dtype=torch.int32, device=device)

    def set_out(self) -> None:
        gradients = [g for member in self._members if (g := member.gradient) is not None]
        if not gradients or len(gradients) < len(self._members):
            return
        # A sum of sizes is not finite where an entry is not; in 16 bits it might be without one.
        widest = functools.reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
        sizes = torch._foreach_norm(gradients, 1, dtype=widest)
        self._streaks.add_(1).mul_(torch.stack(sizes).isfinite().logical_not_())
        self.send(self._streaks)

    def read(self) -> None:
        for streaks in self.arrived():
            for member, looks in zip(self._members, streaks, strict=True):
                self.say(
                    _BAD_GRADIENT, member.name, _PERIOD * (looks - 1), ", one in ten looked at"
                )
