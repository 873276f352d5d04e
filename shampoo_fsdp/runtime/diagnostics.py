"""Figures that a person watches during a run, of this rank's blocks and last step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.runtime.bucket import OwnedStack

__all__ = ["Diagnostics", "diagnose", "merged"]

_RATIO = "direction_over_graft"


@dataclass
class Diagnostics:
    """What one rank knows; :func:`merged` puts the ranks' together."""

    largest: dict[str, float] = field(default_factory=dict)
    """The largest of any rank counts: milliseconds of the parts of the step ("ms/roots"), the
    worst residual of the roots in use ("root_residual"), the worst condition number of a factor
    ("condition_number"), both as `Health` says, and memory ("state_mib")."""
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


def diagnose(
    stacks: Sequence[OwnedStack],
    milliseconds: Mapping[str, float],
    groups: Sequence[GroupSettings],
) -> Diagnostics:
    """Read the figures back; the host waits for the device.

    Args:
        stacks: stacks of this rank.
        milliseconds: of the last step's parts.
        groups: of the optimizer.
    """
    result = Diagnostics({f"ms/{part}": value for part, value in milliseconds.items()})
    state = sum(tensor.nbytes for owned in stacks for tensor in owned.stack.saved.values())
    result.add_largest("state_mib", state / 2**20)
    for owned in stacks:
        stack = owned.stack
        condition, residual = stack.health(owned.begin(groups))
        result.add_largest("condition_number", condition)
        result.add_largest("root_residual", residual)
        if stack.norms is None:
            continue
        norms, factors = stack.norms
        before, after = (values.flatten().tolist() for values in (norms, norms * factors))
        for member, direction, update in zip(owned.members, before, after, strict=True):
            result.add_sum(f"update_rms/{kind_of(member.name)}", update**2, math.prod(stack.shape))
            if stack.config.grafting != "none" and min(direction, update) > 0.0:
                result.add_sum(_RATIO, math.log(direction / update), 1.0)
    return result


def kind_of(name: str) -> str:
    """What a parameter is, whatever its layer: 'layers.3.attention.wq.weight' is 'attention.wq'."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[:-1][-2:] or parts)
