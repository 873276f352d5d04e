"""SOAP of one block.

Sources:
    Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321:
        Algorithm 3 (the method), Algorithm 4 (bases by one power iteration and a QR).
    Morwani et al. 2024, "A New Perspective on Shampoo's Preconditioner", arXiv 2406.17748: the
        second moment is nearly the Kronecker product of L and R over trace(L).
"""

import torch
from torch import Tensor

from tests.reference.algebra import FLOORS, along, complete_basis, kept_in
from tests.reference.rule import GramFactors, Settings, new_basis

RESOLUTION = 1e-5
"""Eigenvalues up to this, relative to the largest, count as zero."""
ITERATIONS = 2
"""Steps of "qr" at a refresh."""
FLOOR = 1e-8
"""Of second moments, relative to the largest: below it directions fade in proportion to them."""


class SoapRule(GramFactors):
    """Adam in the eigenbasis of Shampoo's factors (Vyas et al. 2024, Algorithm 3).

    The basis is the identity until the first refresh, and for dimensions without a full factor,
    whatever else they have. A block that has seen no gradient before this step's keeps its basis
    at later refreshes, and entries in the basis of the axes never fade.
    """

    works_without_roots = True

    def __init__(self, shape: torch.Size, kinds: tuple[str, ...], settings: Settings) -> None:
        kinds = tuple("full" if kind == "full" else "none" for kind in kinds)
        super().__init__(shape, kinds, settings)
        self.full_sides = kinds.count("full")
        self.second_moment = torch.zeros(shape, dtype=torch.float64)

    def refresh(self, correction: float) -> None:
        if self.has_roots and not self.second_moment.any():
            return
        eigenvalues: list[Tensor | None] = [None for _ in self.factors]
        least = max(FLOORS[self.settings.factor_dtype], RESOLUTION)
        for d, factor in enumerate(self.factors):
            if factor is not None:
                old = basis = self.bases[d]
                for _ in range(ITERATIONS):
                    basis = new_basis(factor, basis, self.has_roots, self.settings)
                values, basis = complete_basis(factor, basis, least)
                eigenvalues[d] = values
                self.bases[d] = kept_in(self.settings.root_dtype, basis)
                # The diagonal of a covariance, if it was diagonal in the old basis.
                self.second_moment = along(self.second_moment, (self.bases[d].T @ old) ** 2, d)
        if not self.has_roots and self.full_sides:
            self.second_moment = self._estimate(eigenvalues, correction)
        self.has_roots = True

    def _estimate(self, eigenvalues: list[Tensor | None], correction: float) -> Tensor:
        """V from the factors, since the entries that V has seen lie in another basis.

        Morwani et al. 2024: E[g gᵀ] is nearly the Kronecker product of all E[G_(i) G_(i)ᵀ], over
        the k-1 th power of their (common) trace. Along a dimension that keeps its own basis the
        eigenvalues are in proportion to what V has seen; if that is nothing, they are equal.
        """
        trace = next(values.sum() for values in eigenvalues if values is not None) / correction
        if trace == 0:
            return torch.zeros_like(self.second_moment)
        estimate = correction * trace * torch.ones_like(self.second_moment)
        order = estimate.ndim
        for d, values in enumerate(eigenvalues):
            if values is None:
                values = self.second_moment.sum([e for e in range(order) if e != d])
                if values.sum() == 0:
                    values = torch.ones_like(values)
            share = values / values.sum()
            estimate = estimate * share.reshape([-1 if e == d else 1 for e in range(order)])
        return estimate

    def observe(self, grad: Tensor) -> None:
        self.second_moment = self.settings.average(self.second_moment, self._project(grad) ** 2)

    def precondition(self, momentum: Tensor, correction: float) -> Tensor:
        root = (self.second_moment / correction).sqrt() + self.settings.eps
        largest = self.second_moment.max()
        seen = (self.second_moment / (FLOOR * largest)).clamp(max=1) if largest > 0 else 0.0
        if self.full_sides and all(torch.equal(b, torch.eye(len(b)).to(b)) for b in self.bases):
            seen = 1.0
        direction = self._project(momentum) / root * seen
        for d, basis in enumerate(self.bases):
            direction = along(direction, basis, d)
        return direction

    def _project(self, tensor: Tensor) -> Tensor:
        for d, basis in enumerate(self.bases):
            tensor = along(tensor, basis.T, d)
        return tensor
