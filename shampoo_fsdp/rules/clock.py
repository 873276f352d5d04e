"""What a stack is told of a step. When roots are refreshed: `ShampooConfig.refresh_period`."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.rules.rule import Now

__all__ = ["Clock", "StepFacts"]


@dataclass(frozen=True)
class Clock:
    """Where the blocks of a stack are in time; one entry for each block."""

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


@dataclass(frozen=True)
class StepFacts:
    """What the arithmetic of one step needs to know."""

    group: GroupSettings
    warm: bool
    """Whether any block has had its first refresh."""
    rooted: Sequence[bool]
    """Which."""
    factors: float | Tensor
    """Bias correction of the factors, as the next two a number or [B]."""
    momentum: float | Tensor
    graft: float | Tensor

    def now(self, usable: Tensor, idle: Tensor) -> Now:
        """For the rule; `usable` [B] is 1 or 0."""
        beta2 = self.group.betas[1]
        # Decays are 1 where a gradient is not usable: there the state stays.
        decay, weight = 1.0 - (1.0 - beta2) * usable, 1.0 - beta2 if beta2 < 1.0 else 1.0
        return Now(decay, weight, beta2 == 1.0, self.factors, self.group.eps, self.warm, idle)
