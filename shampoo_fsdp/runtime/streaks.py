"""Gradients that are bad, and roots that fail, many times in a row: someone hears of it."""

from collections.abc import Sequence
from logging import getLogger

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import to_device
from shampoo_fsdp.runtime.team import Parameters, Team
from shampoo_fsdp.validation import name_some

__all__ = ["Streaks"]

_logger = getLogger(__name__)

_PERIOD = 10
_SAID_AT = (10, 100, 1000)

_BAD_GRADIENT = (
    "the gradient of {} has been unusable for {} steps in a row: entries that are not finite, or "
    "above 1e15. What they reach gets no updates meanwhile, and the parameter no weight decay. "
    "Look at the model and the data; with on_nonfinite = 'raise' such a step is an error."
)
_FAILED_ROOT = (
    "an inverse root or eigenbasis of {} has failed at {} refreshes in a row: the last good one "
    "stays in use. Look at its gradients, or try another 'root_method'."
)


class Streaks:
    """Reads what stacks count on the device, without waiting for it, and stops weight decay.

    On every tenth step the ranks that share blocks join their counts and let them set out for the
    host, which reads them ten steps later.
    """

    def __init__(self, parameters: Parameters) -> None:
        """All streaks begin here."""
        for member in parameters.members:
            member.stalled = False
        self._device = parameters.device
        self._teams = [(team, self._places(team)) for team in parameters.teams]
        for bucket in parameters.buckets:
            for owned in bucket.stacks:
                owned.stack.skipped.streak.zero_()
                owned.stack.failed_roots.streak.zero_()
        self._event = torch.cuda.Event() if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arriving: Tensor | None = None
        self._told = [0] * sum(2 * len(team.parts) for team, _ in self._teams)
        self._steps = 0

    def look(self) -> None:
        """Call it at the end of each step, on all ranks."""
        self._steps += 1
        if self._steps % _PERIOD or not self._teams:
            return
        if self._arriving is not None:
            if self._event is not None:
                self._event.synchronize()  # the host does not run ten steps ahead
            self._tell(self._arriving.tolist())
        joined = torch.cat([self._longest(team, places) for team, places in self._teams])
        self._arriving = joined.to("cpu", non_blocking=True, copy=True)  # to pinned memory
        if self._event is not None:
            self._event.record()

    def _places(self, team: Team) -> Tensor:
        """Of this rank's blocks the numbers of their parameters, in the order of the stacks."""
        number = {member: k for k, member in enumerate(team.parts)}
        places = [number[m] for b in team.buckets for owned in b.stacks for m in owned.members]
        return to_device(torch.tensor(places, dtype=torch.int64, device="cpu"), self._device)

    def _longest(self, team: Team, places: Tensor) -> Tensor:
        """The longest streaks of each parameter: of bad gradients, then of failed roots."""
        longest = torch.zeros(2, len(team.parts), dtype=torch.int32, device=self._device)
        if len(places):
            stacks = [owned.stack for bucket in team.buckets for owned in bucket.stacks]
            skipped = torch.cat([stack.skipped.streak for stack in stacks])
            failed = torch.cat([stack.failed_roots.streak for stack in stacks])
            streaks = torch.stack([skipped, failed])
            longest.scatter_reduce_(1, places.expand(2, -1), streaks, "amax")
        team.ranks.maximum(longest)
        return longest.flatten()

    def _tell(self, lengths: Sequence[int]) -> None:
        """One line for all parameters, on the first of the ranks."""
        pairs = zip(self._told, lengths, strict=True)
        for team, _ in self._teams:
            for message in (_BAD_GRADIENT, _FAILED_ROOT):
                news = {}
                for member in team.parts:
                    before, now = next(pairs)
                    if message == _BAD_GRADIENT:
                        member.stalled = now >= _PERIOD
                    if any(before < length <= now for length in _SAID_AT):
                        news[member.name] = now
                if news and team.is_first_replica and team.ranks.position == 0:
                    _logger.warning(message.format(name_some(list(news)), max(news.values())))
        self._told = list(lengths)
