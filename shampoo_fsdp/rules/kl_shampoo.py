"""KL-Shampoo: each side's second moment, whitened by the other sides."""

from typing import ClassVar

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.rules.grafting import LARGEST_GRADIENT
from shampoo_fsdp.rules.matrices import along, per_block, scale_along, unfold
from shampoo_fsdp.rules.rule import Positions, register
from shampoo_fsdp.rules.shampoo import Shampoo
from shampoo_fsdp.rules.step import Step
from shampoo_fsdp.validation import refuse

__all__ = ["KLShampoo"]

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
class KLShampoo(Shampoo):
    """Lin et al. 2025 (arXiv 2509.03378): S_i estimates the second moment of G along dimension i
    after whitening by the others' S_j^(-1/2), so that their Kronecker product is the closest to the
    whole second moment in KL divergence; the direction is S_i^(-1/2) along each dimension.

    The roots are those of the last refresh, for the direction and for whitening (the paper averages
    eigenvalues on every step in a basis that may be old: four more products a step for two sides,
    and no better where we compared). The first side with a factor starts at zero and carries the
    scale; the others start at the identity.
    """

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

    def restart(self, where: Positions) -> None:
        super().restart(where)
        for i in self._sides[1:]:
            if i in self.diagonal:
                self.state[f"diagonals_{i}"][where] = 1.0
            else:
                self.factors[i].write_identity(where)

    def accumulate(self, gradient: Tensor, step: Step) -> None:
        """S_i <- beta2 S_i + (1 - beta2) W_(i) W_(i)^T / (product of the other sizes), W being G
        whitened along the other dimensions."""
        # Gradients that are all zero, as those of an idle expert, tell nothing. Without this the
        # sides that start from the identity would fade, and their roots grow without bound.
        decay = step.decay.masked_fill(step.idle, 1.0)
        lows: dict[float, Tensor] = {}
        for i in self._sides:
            share = gradient.shape[i + 1] / gradient[0].numel()
            whitened, rest = gradient, share
            if self.products_in != torch.float32:  # there the share enters with the rounding
                if share not in lows:
                    low = torch.empty_like(gradient, dtype=self.products_in)
                    lows[share] = torch.mul(gradient, share**0.5, out=low)
                whitened, rest = lows[share], 1.0
            for j in self._sides:
                if j == i:
                    continue
                if j in self.full:
                    root = self.roots[j].read(dtype=whitened.dtype)
                    whitened = along(whitened, root, j, symmetric=True)
                else:
                    root = self._diagonal_root(j, step.correction)
                    whitened = scale_along(whitened, root.to(whitened.dtype), j)
                # The roots of tiny gradients can raise a large one until its square overflows.
                whitened.clamp_(-LARGEST_GRADIENT, LARGEST_GRADIENT)
            if i in self.full:
                self._average(i, unfold(whitened, i), step, decay, rest)
            else:
                self._average_diagonal(i, whitened.float().square(), step, decay, rest)

    def refresh(self, where: Positions, cold: bool, correction: float | Tensor) -> Tensor:
        for i in () if cold else self._sides[1:]:
            self._bound(i, where)
        return super().refresh(where, cold, correction)

    def _bound(self, i: int, where: Positions) -> None:
        """Scale a side that has left the size of 1; usually by exactly 1. (The first side carries
        the scale of the gradients.)"""
        if i in self.diagonal:
            factors = diagonal = self.state[f"diagonals_{i}"][where]
        else:
            factors = self.factors[i].read(where)
            diagonal = factors.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1)
        scale = torch.where(mean > 0.0, mean.clamp(1.0 / _LARGEST_MEAN, _LARGEST_MEAN) / mean, 1.0)
        scaled = factors * per_block(scale, factors.ndim)
        if i in self.diagonal:
            self.state[f"diagonals_{i}"][where] = scaled
        else:
            self.factors[i].write(scaled, where)

    def _correction_of(self, i: int, correction: float | Tensor) -> float | Tensor:
        # The others did not start at zero.
        return correction if i == self._sides[0] else 1.0

    def _ridge(self, factors: Tensor, correction: float | Tensor) -> Tensor:
        """Relative to the mean of the eigenvalues. The first side has the size of single squared
        gradients, which is 1e-12 in large models, the others have that of 1."""
        diagonal = factors if factors.ndim == 2 else factors.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1) / correction
        ridge = torch.where(mean > 0.0, mean, 1.0) * self.config.preconditioner_eps
        return ridge.clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def _sides(self) -> list[int]:
        return sorted((*self.full, *self.diagonal))
