"""KL-Shampoo: each side's second moment, whitened by the other sides."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_fsdp.blocks import factor_kinds
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.matrices import (
    StateEntry,
    along,
    per_block,
    scale_along,
    unfold,
)
from shampoo_fsdp.preconditioners.base import Health, Positions, Preconditioner

__all__ = ["KLShampooPreconditioner"]


class KLShampooPreconditioner(Preconditioner):
    """Lin et al. 2025 (arXiv 2509.03378): S_i estimates the second moment of G along dimension i
    after whitening by the others' S_j^(-1/2), so that their Kronecker product is the closest to the
    whole second moment in KL divergence; the direction is S_i^(-1/2) along each dimension.

    S_j^(-1/2) comes from the eigenbasis Q_j of the last refresh and from eigenvalues, which are
    averaged there on every step, so that a basis may be old. Sides are updated one after the other,
    each with the newest of the others. The first side with a factor starts at zero and carries the
    scale; the others start at the identity. Until the first refresh Q is the identity. A diagonal
    dimension keeps it.
    """

    products = 5
    works_cold = True

    @classmethod
    def layout(cls, shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
        entries: dict[str, StateEntry] = {}
        for i, (n, kind) in enumerate(zip(shape, factor_kinds(shape, config), strict=True)):
            if kind == "full":
                entries |= cls._matrix_entries(i, n, config, "factors", "eigenvectors")
            if kind != "none":
                entries[f"eigenvalues_{i}"] = (n,), torch.float32
        return entries

    def restart(self, where: Positions) -> None:
        for i in self._sides:
            start = 0.0 if i == self._sides[0] else 1.0
            self.state[f"eigenvalues_{i}"][where] = start
            if i in self.full:
                identity = self._identity(self.factors[i].size)
                self.state[f"eigenvectors_{i}"][where] = identity
                blocks = len(self.state[f"eigenvectors_{i}"][where])
                self.factors[i].write(start * identity.expand(blocks, -1, -1), where)

    def accumulate(
        self, gradient: Tensor, decay: Tensor, weight: float, correction: float | Tensor
    ) -> None:
        """S_i <- beta2 S_i + (1 - beta2) W_(i) W_(i)^T / (product of the other sizes), W being G
        whitened along the other dimensions; its eigenvalues in the basis Q_i likewise."""
        for i in self._sides:
            whitened = gradient
            for j in self._sides:
                if j != i:
                    whitened = scale_along(
                        self._to_basis(whitened, j), self._inverse_roots(j, correction, 0.5), j
                    )
            share = weight * gradient.shape[i + 1] / gradient[0].numel()
            if i in self.full:
                self._accumulate_gram(i, unfold(whitened, i), decay, share)
            squares = self._to_basis(whitened, i).square()
            self._accumulate_diagonal(f"eigenvalues_{i}", squares, i, decay, share)

    def refresh(self, where: Positions, cold: bool, correction: float | Tensor) -> Tensor:
        failures = []
        for i in self.full:
            factor = self.factors[i].read(where)
            values, _, failed = self._updated_basis(i, where, factor, cold)
            kept = self.state[f"eigenvalues_{i}"]
            kept[where] = torch.where(per_block(failed, 2), kept[where], values.clamp_min(0.0))
            failures.append(failed)
        return torch.stack(failures)

    def health(self, correction: float | Tensor) -> Health:
        return self._health_of_bases()

    def direction(
        self, momentum: Tensor, correction: float | Tensor, eps: float, out: Tensor
    ) -> Tensor:
        result = momentum
        for i in reversed(self._sides):
            roots = self._inverse_roots(i, correction, -self.exponent)
            if i in self.full:
                vectors = self.state[f"eigenvectors_{i}"].float()
                result = along(result, (vectors * roots.unsqueeze(1)) @ vectors.mT, i)
            else:
                result = scale_along(result, roots, i)
        return result

    @property
    def _sides(self) -> list[int]:
        return sorted((*self.full, *self.diagonal))

    def _to_basis(self, blocks: Tensor, i: int) -> Tensor:
        if i in self.diagonal:
            return blocks
        return along(blocks, self.state[f"eigenvectors_{i}"].float().mT, i)

    def _inverse_roots(self, i: int, correction: float | Tensor, power: float) -> Tensor:
        """The eigenvalues of S_i to the power -`power`, [B, d_i]."""
        eigenvalues = self.state[f"eigenvalues_{i}"]
        if i == self._sides[0]:
            if isinstance(correction, Tensor):
                correction = correction.view(-1, 1)
            eigenvalues = eigenvalues / correction
        return self._powers(eigenvalues, -power)
