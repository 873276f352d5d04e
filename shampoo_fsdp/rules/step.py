"""One step of a stack of blocks, and how often one went wrong.

When roots are refreshed: `ShampooConfig.refresh_period`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.rules.matrices import Positions

__all__ = ["Step", "Tally"]


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
    usable: Tensor = field(init=False)
    """1 where the gradient is finite and not excessive, else 0, [B]; as the next two known once the
    gradients are there."""
    idle: Tensor = field(init=False)
    """Whether the gradient is zero in all of the block, as that of an idle expert, [B]."""
    decay: Tensor = field(init=False)
    """Of the factors, [B]: beta2, and 1 where the gradient is not usable, so that they stay."""

    in_one_pass: bool = field(default=False, init=False)
    """Whether a kernel takes the averages, with what is preconditioned and the grafted norms."""

    @property
    def weight(self) -> float:
        """That of the gradient in the factors: 1 - beta2, or 1 for sums."""
        return 1.0 if self.sums else 1.0 - self.group.betas[1]

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


class Tally:
    """How often something went wrong for each block of a stack; on the device, nobody waits."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.total = torch.zeros(blocks, dtype=torch.int32, device=device)
        """In all."""
        self.streak = torch.zeros(blocks, dtype=torch.int32, device=device)
        """The last times in a row."""

    def add(self, times: Tensor, stays: Tensor, where: Positions = slice(None)) -> None:
        """
        Args:
            times: how often it went wrong now, [n].
            stays: where the streak goes on, [n].
            where: n positions.
        """
        self.total[where] += times
        self.streak[where] = (self.streak[where] + (times > 0)) * stays
