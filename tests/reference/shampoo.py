"""Shampoo of one block.

Sources:
    Gupta, Koren, Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
        arXiv 1802.09568: Algorithm 1 (matrices), Algorithm 2 (tensors of any order).
    Shi et al. 2023, arXiv 2309.06497: Section 3 (exponents of one's own, diagonal factors).
"""

import torch
from torch import Tensor

from tests.reference.algebra import inverse_root, kept_in, polynomial_root, precondition, raised
from tests.reference.rule import GramFactors, Settings, new_basis


class ShampooRule(GramFactors):
    """P = M times L_i^(-1/(2k)) along each of the k dimensions that have a factor."""

    least = 0.0
    """Relative to the largest: what eigenvalues are raised to at least."""

    def __init__(self, shape: torch.Size, kinds: tuple[str, ...], settings: Settings) -> None:
        super().__init__(shape, kinds, settings)
        self.roots: list[Tensor | None] = [None for _ in kinds]

    @property
    def exponent(self) -> float:
        count = sum(factor is not None for factor in self.factors)
        given = [0.0, *self.settings.root_exponents][count : count + 1]
        return (given and given[0]) or 1 / (2 * count)

    def corrected(self, d: int, correction: float) -> Tensor | None:
        """The factor of a dimension over its bias correction."""
        factor = self.factors[d]
        return None if factor is None else factor / correction

    def refresh(self, correction: float) -> None:
        for d in range(len(self.factors)):
            factor = self.corrected(d, correction)
            if factor is None or factor.ndim == 1 or factor.diag().max() <= 0:
                continue  # without a gradient there is no scale: the root stays the identity
            unit = self.unit(factor)
            if self.settings.root_method == "qr":
                factor = factor / unit
                basis = new_basis(factor, self.bases[d], self.has_roots, self.settings)
                eigenvalues = (basis.T @ factor @ basis).diag()
                ridge = self.settings.preconditioner_eps
                dtype = self.settings.factor_dtype
                powers = raised(eigenvalues, ridge, dtype, self.least) ** -self.exponent
                root = basis @ torch.diag(powers) @ basis.T * unit**-self.exponent
                self.bases[d] = kept_in(self.settings.root_dtype, basis)
            else:
                root = self._root(factor)
            self.roots[d] = kept_in(self.settings.root_dtype, root)
        self.has_roots = True

    def precondition(self, momentum: Tensor, correction: float) -> Tensor:
        return precondition(momentum, self.newest_roots(correction))

    def newest_roots(self, correction: float) -> list[Tensor | None]:
        """The root of a diagonal costs nothing, so that it is always that of the newest factor."""
        factors = [self.corrected(d, correction) for d in range(len(self.factors))]
        return [
            self._root(factor) if factor is not None and factor.ndim == 1 else root
            for factor, root in zip(factors, self.roots, strict=True)
        ]

    def unit(self, factor: Tensor) -> float:
        """What the ridge of a factor is a multiple of."""
        return 1.0

    def _root(self, factor: Tensor) -> Tensor:
        unit = self.unit(factor)
        order = round(1.0 / self.exponent * 1e6) / 1e6
        products = self.settings.root_method == "polynomial" and order in (2.0, 4.0)
        if products and factor.ndim == 2:
            root = polynomial_root(factor / unit, int(order), self.settings.preconditioner_eps)
            return root * unit**-self.exponent
        root = inverse_root(
            factor / unit,
            self.exponent,
            self.settings.preconditioner_eps,
            dtype=self.settings.factor_dtype,
            least=self.least,
            pseudo=self.settings.root_method == "eigh_pseudo_inverse",
        )
        return root * unit**-self.exponent
