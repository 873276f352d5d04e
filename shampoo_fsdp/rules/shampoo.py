"""Shampoo (Gupta et al. 2018, arXiv 1802.09568, algorithms 1 and 2).

For a block of m x n, its gradient G and momentum N:

    L <- beta2 L + (1 - beta2) G G^T        [m, m]; for beta2 = 1 sums
    R <- beta2 R + (1 - beta2) G^T G        [n, n]
    P_L = (L / c + ridge I)^(-1/4)          when a refresh is due; c is the bias correction
    P_R = (R / c + ridge I)^(-1/4)
    D = P_L N P_R

A block of k dimensions has a factor for each, of its gradient unfolded along it, and the exponent
is -1 / (2k).
"""

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import Positions, unfold
from shampoo_fsdp.rules.root_rule import RootRule
from shampoo_fsdp.rules.rule import register
from shampoo_fsdp.rules.step import Step

__all__ = ["ShampooRule"]


@register
class ShampooRule(RootRule):
    """The equations above, on stacks of blocks."""

    name = "shampoo"
    number = 0
    products = 2

    def accumulate(self, gradient: Tensor, step: Step) -> None:
        """L <- beta2 L + (1 - beta2) G G^T, and R likewise."""
        low = gradient.to(self.products_in)
        if self.two_sided:
            self._average(0, low, step, step.decay)
            self._average(1, low.mT, step, step.decay)
            return
        for i in self.full:
            self._average(i, unfold(low, i), step, step.decay)
        for i in self.diagonal:
            self._average_diagonal(i, gradient.square(), step, step.decay)

    def refresh(self, where: Positions, cold: bool, correction: float | Tensor) -> Tensor:
        """P_L = (L / c + ridge I)^(-1/4), P_R = (R / c + ridge I)^(-1/4)."""
        return self._take_roots(where, cold, correction)

    def direction(self, momentum: Tensor, step: Step, out: Tensor) -> Tensor:
        """D = P_L N P_R."""
        if not self.two_sided:
            return self._multiply_sides(momentum, step)
        left, right = self._read_roots()
        return torch.bmm(left, momentum @ right, out=out)

    def _ridge(self, factors: Tensor, correction: float | Tensor) -> float | Tensor:
        return self.config.preconditioner_eps
