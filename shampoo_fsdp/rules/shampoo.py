"""Shampoo (Gupta et al. 2018, arXiv 1802.09568, algorithms 1 and 2).

For a block of m x n, its gradient G and momentum N:

    L <- beta2 L + (1 - beta2) G G^T        [m, m]; for beta2 = 1 sums
    R <- beta2 R + (1 - beta2) G^T G        [n, n]
    P_L = (L / c + ridge I)^(-1/4)          when a refresh is due; c is the bias correction
    P_R = (R / c + ridge I)^(-1/4)
    D = P_L N P_R

A block of k dimensions has a factor for each, of its gradient unfolded along it, and the exponent
is -1 / (2k). `root_rule.py` takes the roots.
"""

import torch
from torch import Tensor

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
        for i in self.sides:
            self._average(i, low if i in self.full else gradient, step)

    def direction(self, momentum: Tensor, step: Step, out: Tensor) -> Tensor:
        """D = P_L N P_R."""
        if not self.two_sided:
            return self.multiply_sides(momentum, step)
        left, right = self.inverse_roots()
        return torch.bmm(left, momentum @ right, out=out)

    def _ridge(self, factors: Tensor, correction: float | Tensor) -> float | Tensor:
        return self.config.preconditioner_eps
