"""KL-Shampoo (Lin et al. 2025, arXiv 2509.03378).

For a block of m x n, its gradient G and momentum N:

    L <- beta2 L + (1 - beta2) (G P_R) (G P_R)^T / n      [m, m], from zero
    R <- beta2 R + (1 - beta2) (P_L G)^T (P_L G) / m      [n, n], from the identity
    P_L = (L / c + ridge I)^(-1/2)                        when a refresh is due
    P_R = (R + ridge I)^(-1/2)
    D = P_L N P_R

Each side is the second moment of the gradient after whitening by the other: their Kronecker product
is the closest to the whole second moment in KL divergence. L carries the scale of the gradients,
and c is its bias correction; R has the size of 1. A block of other dimensions has such a factor for
each, whitened by all others and over the product of their sizes; the first one carries the scale.

The roots are those of the last refresh, for the direction and for whitening. (The paper averages
eigenvalues on every step in a basis that may be old: four more products a step for two sides, and
no better where we compared.)
"""

from typing import ClassVar

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.rules.grafting import LARGEST_GRADIENT
from shampoo_fsdp.rules.matrices import Positions, mean_eigenvalue, per_block
from shampoo_fsdp.rules.rule import Step, register
from shampoo_fsdp.rules.shampoo import ShampooRule
from shampoo_fsdp.validation import refuse

__all__ = ["KLShampooRule"]

# Relative to the largest eigenvalue, below which the others count as this. What all sides lack is
# magnified by its inverse: at the resolution of fp32, which does for Shampoo's smaller exponents,
# rounding, other on each mesh, would be as large as the gradient. (Final losses of a model of 1 M
# parameters, one run each: 1.560 with 1.2e-7, 1.554 with 1e-5, within noise; 1.599 with 3e-4.)
_RESOLUTION = 1e-5

# How far the mean of a side that has the size of 1 may leave it. While gradients are tiny, all
# sides would fade, and the first usual ones, whitened by such roots, would make all of them so
# large that these gradients decide for hundreds of steps.
_LARGEST_MEAN = 1e4


@register
class KLShampooRule(ShampooRule):
    """The equations above, on stacks of blocks; D is Shampoo's."""

    name = "kl_shampoo"
    number = 2
    # No pseudo-inverse: what both sides lack would be whitened to zero, and so never enter either.
    root_methods: ClassVar[tuple[str, ...]] = ("eigh", "coupled_newton", "polynomial", "qr")
    averages = True
    resolution = _RESOLUTION
    products = 3

    @classmethod
    def check(cls, config: ShampooConfig) -> None:
        super().check(config)
        if any(config.root_exponents):
            refuse("root_exponents", config.root_exponents, f"[] for {cls.name}")

    @classmethod
    def root_exponent(cls, config: ShampooConfig, factors: int) -> float:
        return 0.5

    def accumulate(self, gradient: Tensor, step: Step) -> None:
        """L <- beta2 L + (1 - beta2) (G P_R) (G P_R)^T / n, and R likewise."""
        # Gradients that are all zero, as those of an idle expert, tell nothing. Without this the
        # sides that start from the identity would fade, and their roots grow without bound.
        step.rate = step.rate.masked_fill(step.size == 0.0, 0.0)
        if not self.two_sided:
            return self._accumulate_sides(gradient, step)
        left, right = self.inverse_roots()
        m, n = gradient.shape[1:]
        gradient = self._in_range(gradient, step, left, right)
        self._average(0, gradient @ right, step, over=n)
        self._average(1, left @ gradient, step, over=m)

    def refresh(self, where: Positions, cold: bool, correction: float | Tensor) -> Tensor:
        """P_L = (L / c + ridge I)^(-1/2), P_R = (R + ridge I)^(-1/2)."""
        if not cold:
            self._scale_back(where)
        return super().refresh(where, cold, correction)

    def restart(self, where: Positions) -> None:
        """R, and all sides but the first, start from the identity."""
        super().restart(where)
        for i in self.sides[1:]:
            if i in self.full:
                self.factors[i].write_identity(where)
            else:
                self.state[f"diagonals_{i}"][where] = 1.0

    def _correction_of(self, i: int, correction: float | Tensor) -> float | Tensor:
        # The others did not start at zero.
        return correction if i == self.sides[0] else 1.0

    def _ridge(self, factors: Tensor, correction: float | Tensor) -> Tensor:
        """Relative to the mean of the eigenvalues. The first side has the size of single squared
        gradients, which is 1e-12 in large models, the others have that of 1."""
        ridge = mean_eigenvalue(factors) * (self.config.preconditioner_eps / correction)
        return ridge.clamp_min_(torch.finfo(torch.float32).tiny)

    # What follows is for gradients of odd sizes, and for blocks of other sides than two.

    def _in_range(self, gradient: Tensor, step: Step, left: Tensor, right: Tensor) -> Tensor:
        """The gradient in the type of the products; smaller where the roots, of tiny gradients,
        might raise it until its square overflows."""
        # No entry of a root is above the largest on its diagonal.
        diagonals = torch.cat([root.diagonal(dim1=1, dim2=2) for root in (left, right)], 1)
        whitened = diagonals.amax(1) * step.size * (max(gradient.shape[1:]) / LARGEST_GRADIENT)
        low = torch.empty_like(gradient, dtype=self.products_in)
        return torch.div(gradient, per_block(whitened.clamp_min_(1.0), 3), out=low)

    def _scale_back(self, where: Positions) -> None:
        """Sides that have left the size of 1; the scale is usually exactly 1."""
        for i in self.sides[1:]:
            diagonal = self.state.get(f"diagonals_{i}")
            factors = self.factors[i].read(where) if diagonal is None else diagonal[where]
            mean = mean_eigenvalue(factors)
            bounded = mean.clamp(1.0 / _LARGEST_MEAN, _LARGEST_MEAN)
            scale = torch.where(mean > 0.0, bounded / mean, 1.0)
            factors.mul_(per_block(scale, factors.ndim))
            if diagonal is None:
                self.factors[i].keep(factors, where)
            elif isinstance(where, Tensor):
                diagonal[where] = factors

    def _accumulate_sides(self, gradient: Tensor, step: Step) -> None:
        for i in self.sides:
            whitened = gradient.to(self.products_in)
            for j in self.sides:
                if j != i:
                    whitened = self.multiply_side(whitened, j, step)
                    whitened.clamp_(-LARGEST_GRADIENT, LARGEST_GRADIENT)  # see `_in_range`
            self._average(i, whitened, step, over=gradient[0].numel() / gradient.shape[i + 1])
