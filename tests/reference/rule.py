"""Settings, and what the rules have in common: factors that are averages of G Gᵀ, new bases.

Sources:
    Gupta, Koren, Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
        arXiv 1802.09568: Algorithm 2 (sums).
    Shi et al. 2023, arXiv 2309.06497: Algorithm 2 and Section 3 (averages and bias correction).
"""

from typing import Any

import torch
from torch import Tensor

from shampoo_fsdp import ShampooConfig
from tests.reference.algebra import gram, kept_in, warm_qr_step


class Settings:
    """Those of :class:`ShampooConfig` and of a parameter group, by their names there, with the
    defaults that depend on others resolved. "float32" and "bfloat16" are types of what is kept of
    blocks from step to step; all is computed in fp64."""

    def __init__(self, config: ShampooConfig, **group: Any) -> None:
        vars(self).update(vars(config) | group)
        for name, default in (
            ("refresh_warmup_steps", 10 * self.precondition_frequency),
            ("grafting_beta2", self.betas[1]),
            ("grafting_eps", self.eps),
            ("beta3", self.betas[0] ** 2),
            ("root_method", "qr" if self.preconditioner == "soap" else "eigh"),
            ("root_dtype", "float32"),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)

    def correction(self, beta: float, t: int) -> float:
        """1 - beta^t; 1 for sums, or if it is not wanted."""
        return 1 - beta**t if self.use_bias_correction and beta < 1 else 1.0

    def average(self, old: Tensor, new: Tensor) -> Tensor:
        """Exponential moving average, or the sum for beta2 = 1."""
        beta2 = self.betas[1]
        return old + new if beta2 == 1 else beta2 * old + (1 - beta2) * new


class GramFactors:
    """L_i, the average of G_(i) G_(i)ᵀ, of each dimension; its diagonal, or None without one.

    On each step first `accumulate` (not for an unusable gradient), then `refresh` if one is due,
    then `observe` (not for an unusable gradient), then perhaps `precondition`. `correction` is the
    bias correction of averages with beta2, 1 - beta2^t.
    """

    works_without_roots = False
    """Whether `precondition` makes sense before the first refresh."""

    def __init__(self, shape: torch.Size, kinds: tuple[str, ...], settings: Settings) -> None:
        self.settings = settings
        self.has_roots = False
        self.bases = [torch.eye(size, dtype=torch.float64) for size in shape]
        self.factors: list[Tensor | None] = [
            {"full": torch.zeros_like(basis), "diagonal": basis[0] * 0.0, "none": None}[kind]
            for basis, kind in zip(self.bases, kinds, strict=True)
        ]

    def accumulate(self, grad: Tensor, correction: float) -> None:
        """Update the factors (Gupta et al. 2018, Algorithm 2; Shi et al. 2023, Section 3)."""
        for d, factor in enumerate(self.factors):
            if factor is not None:
                self.add(d, gram(grad, d))

    def add(self, d: int, moment: Tensor) -> None:
        """Put a second moment into the factor of a dimension."""
        factor = self.factors[d]
        if factor.ndim == 1:
            self.factors[d] = self.settings.average(factor, moment.diag())
        else:
            average = self.settings.average(factor, moment)
            self.factors[d] = kept_in(self.settings.factor_dtype, average)

    def observe(self, grad: Tensor) -> None:
        """Update what depends on the newest bases."""


def new_basis(matrix: Tensor, old: Tensor, warm: bool, settings: Settings) -> Tensor:
    if warm and settings.root_method == "qr":
        return warm_qr_step(matrix, old)
    return torch.linalg.eigh(matrix)[1]
