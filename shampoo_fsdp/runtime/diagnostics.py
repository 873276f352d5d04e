"""Figures that a person watches during a run, of this rank's blocks and last step."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.runtime.bucket import OwnedStack

__all__ = ["Diagnostics", "diagnose", "kind_of", "merged"]


@dataclass
class Diagnostics:
    """What one rank knows; :func:`merged` puts the ranks' together."""

    largest: dict[str, float] = field(default_factory=dict)
    """The largest of any rank counts: milliseconds of the parts of the step ("ms/roots"), the
    worst residual of the roots in use ("root_residual"), the worst condition number of a factor
    ("condition_number"), both as `Health` says, and memory ("state_mib")."""
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Sums of squares and numbers of elements of the updates before lr, by kind of parameter."""
    ratios: tuple[float, float] = (0.0, 0.0)
    """Sum and number, over grafted blocks, of log(norm of the direction / of the grafted step)."""


def merged(ranks: Iterable[Diagnostics]) -> dict[str, float]:
    """The figures of all ranks together, by name."""
    largest: dict[str, float] = {}
    squares: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    total, number = 0.0, 0.0
    for rank in ranks:
        for name, value in rank.largest.items():
            largest[name] = max(value, largest.get(name, value))
        for name, (square, elements) in rank.squares.items():
            squares[name] = squares[name][0] + square, squares[name][1] + elements
        total, number = total + rank.ratios[0], number + rank.ratios[1]
    figures = dict(sorted(largest.items()))
    if number:
        figures["direction_over_graft"] = math.exp(total / number)
    for name, (square, elements) in sorted(squares.items()):
        figures[f"update_rms/{name}"] = math.sqrt(square / elements)
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
    result.largest["state_mib"] = state / 2**20
    squares: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    ratios, blocks = 0.0, 0
    for owned in stacks:
        stack = owned.stack
        condition, residual = stack.health(owned.begin(groups))
        for name, value in (("root_residual", residual), ("condition_number", condition)):
            result.largest[name] = max(value, result.largest.get(name, 0.0))
        if stack.norms is None:
            continue
        elements = math.prod(stack.shape)
        before, after = (norms.flatten().tolist() for norms in stack.norms)
        for member, direction, update in zip(owned.members, before, after, strict=True):
            kind = kind_of(member.name)
            square, number = squares[kind]
            squares[kind] = square + update**2, number + elements
            if stack.config.grafting != "none" and min(direction, update) > 0.0:
                ratios, blocks = ratios + math.log(direction / update), blocks + 1
    result.squares = dict(squares)
    result.ratios = ratios, blocks
    return result


def kind_of(name: str) -> str:
    """What a parameter is, whatever its layer: 'layers.3.attention.wq.weight' is 'attention.wq'."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[:-1][-2:] or parts)
