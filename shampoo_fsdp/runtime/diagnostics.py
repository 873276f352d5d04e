"""What a person watches during a run: figures of this rank's blocks and last step; gradients that
are bad, and roots that fail, many times in a row, of which someone hears."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger

import torch
from torch import Tensor

from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.rules.matrices import to_device
from shampoo_fsdp.runtime.bucket import Bucket
from shampoo_fsdp.runtime.team import Parameters, Team
from shampoo_fsdp.validation import name_some

__all__ = ["Streaks", "merged"]

_logger = getLogger(__name__)

_PERIOD = 10
_SAID_AT = (10, 100, 1000)

_BAD_GRADIENT = (
    "the gradient of {} has been unusable for {} steps in a row: entries that are not finite, or "
    "above 1e15. It gets no weight decay meanwhile, and what they reach no updates. "
    "(on_nonfinite = 'raise' stops there.)"
)
_FAILED_ROOT = (
    "an inverse root or eigenbasis of {} has failed at {} refreshes in a row: the last good one "
    "stays in use. Look at its gradients, or try another 'root_method'."
)

_RATIO = "direction_over_graft"


@dataclass
class Diagnostics:
    """What one rank knows; :func:`merged` puts the ranks' together."""

    largest: dict[str, float] = field(default_factory=dict)
    """The largest of any rank counts: milliseconds of the parts of the step ("ms/roots"), the
    worst residual of the roots in use ("root_residual"), the worst condition number of a factor
    ("condition_number"), both as a rule's `health` says, and memory ("state_mib")."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sum and number of what has a mean: squares of the updates before lr, by kind of parameter
    ("update_rms/KIND"), and over grafted blocks log(norm of the direction / of the grafted step)
    ("direction_over_graft")."""

    def add_largest(self, name: str, value: float) -> None:
        self.largest[name] = max(value, self.largest.get(name, value))

    def add_sum(self, name: str, total: float, number: float) -> None:
        before = self.sums.get(name, [0.0, 0.0])
        self.sums[name] = [before[0] + total, before[1] + number]


def merged(ranks: Iterable[Diagnostics]) -> dict[str, float]:
    """The figures of all ranks together, by name."""
    everything = Diagnostics()
    for rank in ranks:
        for name, value in rank.largest.items():
            everything.add_largest(name, value)
        for name, (total, number) in rank.sums.items():
            everything.add_sum(name, total, number)
    figures = dict(sorted(everything.largest.items()))
    for name, (total, number) in sorted(everything.sums.items()):
        root = math.exp if name == _RATIO else math.sqrt
        figures[name] = root(total / number)
    return figures


def counters(parameters: Parameters) -> Tensor:
    """See :meth:`shampoo_fsdp.Shampoo.counters`."""
    counts = torch.zeros(4, dtype=torch.int64, device=parameters.device)
    for team in parameters.teams:
        for stack in team.stacks if team.is_first_replica else ():
            counts[0] += stack.refreshes
            counts[1] += stack.failed_roots[0].sum()
            counts[2] += stack.skipped[0].sum()
    counts[3] += parameters.excluded.skipped_entries
    return counts


def diagnose(
    buckets: Sequence[Bucket], milliseconds: Mapping[str, float], groups: Sequence[GroupSettings]
) -> Diagnostics:
    """Read the figures back; the host waits for the device.

    Args:
        buckets: of this rank.
        milliseconds: of the last step's parts.
        groups: of the optimizer.
    """
    result = Diagnostics({f"ms/{part}": value for part, value in milliseconds.items()})
    stacks = [(b, stack, owned) for b in buckets for stack, owned in b.stacks.items()]
    state = sum(tensor.nbytes for _, stack, _ in stacks for tensor in stack.saved.values())
    result.add_largest("state_mib", state / 2**20)
    for bucket, stack, owned in stacks:
        condition, residual = stack.health(bucket.begin(stack, groups))
        result.add_largest("condition_number", condition)
        result.add_largest("root_residual", residual)
        if stack.norms is None:
            continue
        norms, factors = stack.norms
        before, after = (values.flatten().tolist() for values in (norms, norms * factors))
        for (member, _), direction, update in zip(owned, before, after, strict=True):
            result.add_sum(f"update_rms/{kind_of(member.name)}", update**2, math.prod(stack.shape))
            if stack.config.grafting != "none" and min(direction, update) > 0.0:
                result.add_sum(_RATIO, math.log(direction / update), 1.0)
    return result


def kind_of(name: str) -> str:
    """What a parameter is, whatever its layer: 'layers.3.attention.wq.weight' is 'attention.wq'."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[:-1][-2:] or parts)


class Streaks:
    """Reads what stacks count on the device, without waiting for it, and stops weight decay.

    On every tenth step the ranks that share blocks join their counts and let them set out for the
    host, which reads them ten steps later.
    """

    def __init__(self, teams: Sequence[Team], device: torch.device) -> None:
        """All streaks begin here."""
        self._device = device
        self._teams = [(team, self._places(team)) for team in teams]
        for team in teams:
            for member in team.parts:
                member.stalled = False
            for stack in team.stacks:
                stack.skipped[1].zero_()
                stack.failed_roots[1].zero_()
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
        places = [number[member] for owned in team.stacks.values() for member, _ in owned]
        return to_device(torch.tensor(places, dtype=torch.int64, device="cpu"), self._device)

    def _longest(self, team: Team, places: Tensor) -> Tensor:
        """The longest streaks of each parameter: of bad gradients, then of failed roots."""
        longest = torch.zeros(2, len(team.parts), dtype=torch.int32, device=self._device)
        if len(places):
            skipped = torch.cat([stack.skipped[1] for stack in team.stacks])
            failed = torch.cat([stack.failed_roots[1] for stack in team.stacks])
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
