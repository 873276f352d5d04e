"""What the rules have in common: settings, factors that are averages of G Gᵀ, new bases.

Sources:
    Gupta, Koren, Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
        arXiv 1802.09568: Algorithm 2 (sums).
    Shi et al. 2023, arXiv 2309.06497: Algorithm 2 and Section 3 (averages and bias correction).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tests.reference.algebra import eigenbasis, gram, kept_in, warm_qr_step

__all__ = ["GramFactors", "Preconditioner", "RuleSettings", "new_basis"]


@dataclass(frozen=True)
class RuleSettings:
    """What the rules need of the optimizer's settings."""

    beta2: float
    eps: float
    """The optimizer's, for SOAP's Adam."""
    preconditioner_eps: float
    root_method: str
    root_exponents: list[float] = field(default_factory=list)
    factor_dtype: str = "float32"
    """Of the matrices among the factors."""
    root_dtype: str = "float32"
    """Of inverse roots and eigenvectors."""

    def exponent(self, factors: int, own: float) -> float:
        """The power of a tensor with so many factors: the one that is set, or the rule's own."""
        given = self.root_exponents[factors - 1] if factors <= len(self.root_exponents) else 0.0
        return given or own

    def average(self, old: Tensor, new: Tensor) -> Tensor:
        """Exponential moving average, or the sum for beta2 = 1."""
        if self.beta2 == 1:
            return old + new
        return self.beta2 * old + (1 - self.beta2) * new


class Preconditioner(Protocol):
    """The factors of one block.

    On each step first `accumulate` (not for an unusable gradient), then `refresh` if one is due,
    then `observe` (not for an unusable gradient), then perhaps `precondition`. `correction` is the
    bias correction of averages with beta2, 1 - beta2^t.
    """

    works_without_roots: bool
    """Whether `precondition` makes sense before the first refresh."""
    has_roots: bool

    def accumulate(self, grad: Tensor, correction: float) -> None:
        """Update the factors."""
        ...

    def refresh(self, correction: float) -> None:
        """Update what is made of the factors now and then."""
        ...

    def observe(self, grad: Tensor) -> None:
        """Update what depends on the newest bases."""
        ...

    def precondition(self, momentum: Tensor, correction: float) -> Tensor:
        """P, from the bias-corrected momentum."""
        ...


class GramFactors:
    """L_i, the average of G_(i) G_(i)ᵀ, of each dimension; its diagonal, or None without one."""

    def __init__(self, shape: torch.Size, kinds: tuple[str, ...], settings: RuleSettings) -> None:
        self.settings = settings
        self.has_roots = False
        self.factors: list[Tensor | None] = []
        for size, kind in zip(shape, kinds, strict=True):
            shapes = {"full": (size, size), "diagonal": (size,), "none": None}
            factor_shape = shapes[kind]
            self.factors.append(
                None if factor_shape is None else torch.zeros(factor_shape, dtype=torch.float64)
            )

    def accumulate(self, grad: Tensor, correction: float) -> None:
        # Gupta et al. 2018, Algorithm 2 (sums); Shi et al. 2023, Section 3 (averages).
        for d, factor in enumerate(self.factors):
            if factor is not None:
                new = gram(grad, d)
                if factor.ndim == 1:
                    self.factors[d] = self.settings.average(factor, new.diag())
                else:
                    average = self.settings.average(factor, new)
                    self.factors[d] = kept_in(self.settings.factor_dtype, average)


def new_basis(matrix: Tensor, old: Tensor, warm: bool, settings: RuleSettings) -> Tensor:
    if warm and settings.root_method == "qr":
        return warm_qr_step(matrix, old)
    return eigenbasis(matrix)
