"""One step of a stack of blocks, and how often one went wrong.

When roots are refreshed: `ShampooConfig.refresh_period`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.rules.matrices import Positions, to_device

__all__ = ["Step"]


@dataclass
class Step:
    """A step of the blocks of one stack; sequences have one entry for each block."""

    group: GroupSettings
    """What their parameter group says; a second beta of 1 sums the factors."""
    steps: Sequence[int]
    """Gradients of the block's parameter so far, this one included."""
    factor_steps: Sequence[int]
    """Of these the ones since its factors were started, see `load_state_dict`."""
    active: Sequence[bool]
    """Whether the parameter has a gradient on this step. (The gradient blocks of one that has none
    must have been filled with NaN.)"""
    refreshed: Sequence[bool]
    """Whether the block has had its first refresh, this step's included."""
    cold: Sequence[bool]
    """Whether this step's is its first one."""
    correction: float | Tensor = field(default=1.0, init=False)
    """Bias correction of the factors, this step's gradient included; as the next two a number or
    [B]."""
    momentum_correction: float | Tensor = field(default=1.0, init=False)
    graft_correction: float | Tensor = field(default=1.0, init=False)
    size: Tensor = field(init=False)
    """Of the gradient's largest entry, [B], 0 where it is not usable; as the next two known once
    the gradients are there."""
    usable: Tensor = field(init=False)
    """1 where the gradient is finite and not excessive, else 0, [B]."""
    unusable: Tensor = field(init=False)
    """Whether it is 0."""
    rate: Tensor = field(init=False)
    """What the gradient counts in the factors, [B]: `weight`, and 0 where they stay."""
    in_one_pass: bool = field(default=False, init=False)
    """Whether a kernel takes the averages, with what is preconditioned and the grafted norms."""

    @property
    def weight(self) -> float:
        """That of the gradient in the factors: 1 - beta2, or 1 for sums."""
        return 1.0 if self.sums else 1.0 - self.group.betas[1]

    @property
    def decay(self) -> float | Tensor:
        """What the factors are multiplied by first; a number or [B]."""
        return 1.0 if self.sums else 1.0 - self.rate

    @property
    def sums(self) -> bool:
        """Whether factors are sums: beta2 is 1."""
        return self.group.betas[1] == 1.0

    @property
    def eps(self) -> float:
        """The optimizer's."""
        return self.group.eps

    @property
    def warm(self) -> bool:
        """Whether any block has had its first refresh."""
        return any(self.refreshed)


def bias_correction(
    beta: float, steps: Sequence[int], device: torch.device, last: float | None = None
) -> float | Tensor:
    """1 - beta^t; a tensor [B] where the blocks' t differ.

    Args:
        last: the weight of the past in the newest average, if that is not beta.
    """
    if beta == 1.0:
        return 1.0
    last = beta if last is None else last
    return one_or_each([1.0 - last * beta ** (max(step, 1) - 1) for step in steps], device)


def one_or_each(values: Sequence[float], device: torch.device) -> float | Tensor:
    """A number that holds for all blocks, or fp32 [B]."""
    alike = min(values) == max(values)
    return values[0] if alike else on_device(values, device, torch.float32)


def on_device(
    values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of values of the host."""
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)


class Tally:
    """How often something went wrong for each block of a stack; on the device, nobody waits."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.total = torch.zeros(blocks, dtype=torch.int32, device=device)
        """In all."""
        self.streak = torch.zeros(blocks, dtype=torch.int32, device=device)
        """The last times in a row."""

    def add(
        self, times: Tensor, stays: Tensor | None = None, where: Positions = slice(None)
    ) -> None:
        """
        Args:
            times: how often it went wrong now, [n].
            stays: where the streak goes on, [n], if that is not where it went wrong.
            where: n positions.
        """
        wrong = times.bool()
        total, streak = self.total[where], self.streak[where]  # views of a slice
        total += times
        streak += wrong
        streak *= wrong if stays is None else stays
        if isinstance(where, Tensor):
            self.total[where], self.streak[where] = total, streak
