"""KL-Shampoo of one block.

Source:
    Lin et al. 2025, "Understanding and Improving Shampoo and SOAP via Kullback-Leibler
        Minimization", arXiv 2509.03378: KL-Shampoo, with moving averages of the factors and of
        the eigenvalues in an outdated basis.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.algebra import along, gram, kept_in, raised
from tests.reference.rule import RuleSettings, new_basis

__all__ = ["KLShampooRule"]


@dataclass
class _Side:
    """One dimension of KL-Shampoo: S, Q and the eigenvalues; for a diagonal no S, and Q = I."""

    matrix: Tensor | None
    basis: Tensor
    eigenvalues: Tensor
    corrected: bool
    """Whether S and the eigenvalues began at zero, so that they need the bias correction."""

    def whitening(self, correction: float, settings: RuleSettings) -> Tensor:
        eigenvalues = self.eigenvalues / (correction if self.corrected else 1.0)
        dtype = "float32" if self.matrix is None else settings.factor_dtype
        return raised(eigenvalues, settings.preconditioner_eps, dtype)


class KLShampooRule:
    """S_i is the average of the gradient's second moment along i, whitened along all others.

    Lin et al. 2025: the factors whose Kronecker product is nearest to the second moment in
    Kullback-Leibler divergence satisfy S_i = E[W_(i) W_(i)ᵀ] / (product of the other sizes), where
    W is the gradient times S_j^(-1/2) along every j but i. The first factor begins at zero, the
    others at the identity.
    """

    works_without_roots = True

    def __init__(self, shape: torch.Size, kinds: tuple[str, ...], settings: RuleSettings) -> None:
        if settings.beta2 == 1:
            raise ValueError("kl_shampoo needs beta2 < 1")
        self.settings = settings
        self.has_roots = False
        self.sides: dict[int, _Side] = {}
        for d, (size, kind) in enumerate(zip(shape, kinds, strict=True)):
            if kind != "none":
                first = not self.sides
                identity = torch.eye(size, dtype=torch.float64)
                start = torch.zeros_like(identity) if first else identity.clone()
                self.sides[d] = _Side(
                    matrix=start if kind == "full" else None,
                    basis=identity,
                    eigenvalues=start.diag().clone(),
                    corrected=first,
                )

    def accumulate(self, grad: Tensor, correction: float) -> None:
        for d, side in self.sides.items():
            whitened = grad
            for other, by in self.sides.items():
                if other != d:
                    powers = by.whitening(correction, self.settings) ** -0.5
                    whitened = along(whitened, torch.diag(powers) @ by.basis.T, other)
            moment = gram(whitened, d) / (math.prod(grad.shape) / grad.shape[d])
            if side.matrix is not None:
                average = self.settings.average(side.matrix, moment)
                side.matrix = kept_in(self.settings.factor_dtype, average)
            side.eigenvalues = self.settings.average(
                side.eigenvalues, (side.basis.T @ moment @ side.basis).diag()
            )

    def refresh(self, correction: float) -> None:
        for side in self.sides.values():
            if side.matrix is not None:
                basis = new_basis(side.matrix, side.basis, self.has_roots, self.settings)
                side.eigenvalues = (basis.T @ side.matrix @ basis).diag().clamp(min=0)
                side.basis = kept_in(self.settings.root_dtype, basis)
        self.has_roots = True

    def observe(self, grad: Tensor) -> None:
        pass

    def precondition(self, momentum: Tensor, correction: float) -> Tensor:
        exponent = self.settings.exponent(len(self.sides), own=1 / 2)
        for d, side in self.sides.items():
            powers = side.whitening(correction, self.settings) ** -exponent
            momentum = along(momentum, side.basis @ torch.diag(powers) @ side.basis.T, d)
        return momentum
