"""KL-Shampoo of one block.

Source:
    Lin et al. 2025, "Understanding and Improving Shampoo and SOAP via Kullback-Leibler
        Minimization", arXiv 2509.03378: KL-Shampoo, with moving averages of the factors; roots are
        those of the last refresh, for whitening too.

A whitened entry above LARGEST_GRADIENT counts as that.
"""

import math

import torch
from torch import Tensor

from tests.reference.algebra import LARGEST_GRADIENT, along, gram
from tests.reference.rule import Settings
from tests.reference.shampoo import ShampooRule


class KLShampooRule(ShampooRule):
    """S_i is the average of the gradient's second moment along i, whitened along all others.

    Lin et al. 2025: the factors whose Kronecker product is nearest to the second moment in
    Kullback-Leibler divergence satisfy S_i = E[W_(i) W_(i)ᵀ] / (product of the other sizes), where
    W is the gradient times S_j^(-1/2) along every j but i. P = M times S_i^(-1/2) along each. The
    first factor begins at zero, the others at the identity. Gradients that are all zero do not
    count. From the second refresh on, a factor but the first whose mean eigenvalue has left
    [1e-4, 1e4] is scaled to the nearer end before. Eigenvalues are raised to 1e-5 times the
    largest; the ridge is a multiple of their mean.
    """

    def __init__(self, shape: torch.Size, kinds: tuple[str, ...], settings: Settings) -> None:
        super().__init__(shape, kinds, settings)
        self.first = next((d for d, f in enumerate(self.factors) if f is not None), None)
        for d, factor in enumerate(self.factors):
            if factor is not None and d != self.first:
                self.factors[d] = factor + (1 if factor.ndim == 1 else torch.eye(len(factor)))

    exponent = 1 / 2
    least = 1e-5

    def unit(self, factor: Tensor) -> float:
        mean = (factor if factor.ndim == 1 else factor.diag()).mean().item()
        return mean if mean > 0 else 1.0

    def refresh(self, correction: float) -> None:
        for d, factor in enumerate(self.factors):
            if factor is not None and d != self.first and self.has_roots:
                mean = self.unit(factor)
                self.factors[d] = factor * (min(max(mean, 1e-4), 1e4) / mean)
        super().refresh(correction)

    def accumulate(self, grad: Tensor, correction: float) -> None:
        if not grad.any():
            return
        for d, factor in enumerate(self.factors):
            if factor is None:
                continue
            whitened = grad
            for other, root in enumerate(self.newest_roots(correction)):
                if root is not None and other != d:
                    whitened = along(whitened, root if root.ndim == 2 else root.diag(), other)
                    whitened = whitened.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT)
            self.add(d, gram(whitened, d) / (math.prod(grad.shape) / grad.shape[d]))

    def corrected(self, d: int, correction: float) -> Tensor | None:
        return super().corrected(d, correction if d == self.first else 1.0)
