"""What a preconditioner is: the rule that turns a stack of momenta into directions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shampoo_fsdp.blocks import factor_kinds
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.eigenbasis import complete_basis, eigenbasis, warm_eigenbasis
from shampoo_fsdp.matrices import MatrixStack, StateEntry, matrix_entry, per_block

__all__ = ["Health", "Positions", "Preconditioner"]

Positions = slice | Tensor
"""Some blocks of a stack."""


class Health(NamedTuple):
    """Figures about the factors that are matrices, for reports; both [dimensions, B]."""

    condition: Tensor
    """Largest over smallest eigenvalue, with the ridge, as far as cheap products tell."""
    residual: Tensor
    """How far the roots or eigenbases in use are from those of the factors of today, relative."""


class Preconditioner(ABC):
    """A rule for a stack of blocks of one shape (d_1, ..., d_k).

    On a step the stack calls `accumulate`, `refresh` for the blocks that are due, `observe` and
    `direction`, in this order. To add a rule, write one file and name it in `__init__.py`.
    """

    products: ClassVar[int]
    """Matrix products with a d_i x d_i matrix per step and dimension, for the planner."""
    refresh_cost: ClassVar[float] = 1.0
    """Time of a factor's refresh over that of a root or eigenbasis by the same method, for the
    planner."""
    works_cold: ClassVar[bool]
    """Whether `direction` means something before the first refresh."""

    @classmethod
    @abstractmethod
    def layout(cls, shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
        """The state of one block: names, shapes and types. Entries of a name that ends in _i belong
        to dimension i, and those that differ in i alone are of one type; others have the shape of
        the block."""

    @staticmethod
    def _matrix_entries(
        i: int, n: int, config: ShampooConfig, *kinds: str
    ) -> dict[str, StateEntry]:
        """Entries of an n x n matrix of each kind for dimension i. Eigenvectors are no symmetric
        matrices; packing keeps the others as triangles."""
        dtypes = {"factors": config.factor_dtype}
        return {
            f"{kind}_{i}": matrix_entry(
                n,
                getattr(torch, dtypes.get(kind, config.root_dtype)),
                packed=config.symmetric_packing and kind != "eigenvectors",
            )
            for kind in kinds
        }

    def __init__(
        self, shape: Sequence[int], config: ShampooConfig, state: Mapping[str, Tensor]
    ) -> None:
        """
        Args:
            shape: of a block.
            state: stacked tensors [B, ...] as :meth:`layout` says; :meth:`restart` fills them.
        """
        kinds = factor_kinds(shape, config)
        self.config = config
        self.state = state
        self.full = [i for i, kind in enumerate(kinds) if kind == "full"]
        """Dimensions that have a matrix as their factor."""
        self.diagonal = [i for i, kind in enumerate(kinds) if kind == "diagonal"]
        """Dimensions whose factor is a diagonal."""
        self.factors = {i: MatrixStack(state[f"factors_{i}"]) for i in self.full}
        # Rounding of bf16 entries, 2^-9 of each, adds up to less in the eigenvalues of a matrix:
        # measured, spectra are right down to about 2^-12 of the largest.
        self.resolution = 0.0 if config.factor_dtype == "float32" else 2.0**-12
        self.warm = False
        """Whether any block has had its first refresh."""
        count = len(self.full) + len(self.diagonal)
        self.exponent = -config.root_exponent(count) if count else 0.0

    @abstractmethod
    def restart(self, where: Positions) -> None:
        """Set the state of these blocks to what it is before the first step."""

    @abstractmethod
    def accumulate(
        self, gradient: Tensor, decay: Tensor, weight: float, correction: float | Tensor
    ) -> None:
        """Add a gradient to the factors.

        Args:
            gradient: [B, d_1, ..., d_k]; zero where it is not usable.
            decay: of what was before, [B]; beta2, and 1 where the gradient is not usable.
            weight: of the gradient; 1 - beta2, or 1 for sums.
            correction: bias correction of the factors, this gradient included; a number or [B].
        """

    @abstractmethod
    def refresh(self, where: Positions, cold: bool, correction: float | Tensor) -> Tensor:
        """Take the roots or eigenbases of some blocks anew; one whose decomposition fails keeps
        its last.

        Args:
            where: n positions.
            cold: whether it is the first time for them.
            correction: as above, a number or [n].

        """

    def observe(self, gradient: Tensor, decay: Tensor, weight: float) -> None:  # noqa: B027
        """Look at the gradient once more, after the refresh; arguments as those of `accumulate`."""

    @abstractmethod
    def direction(
        self, momentum: Tensor, correction: float | Tensor, eps: float, out: Tensor
    ) -> Tensor:
        """The preconditioned momentum; linear in it.

        Args:
            momentum: [B, d_1, ..., d_k], fp32; stays as it is.
            correction: as above.
            eps: the optimizer's.
            out: memory that the result may use.
        """

    @abstractmethod
    def health(self, correction: float | Tensor) -> Health:
        """How the factors and their roots are; too costly for every step."""

    def _accumulate_gram(self, i: int, unfolded: Tensor, decay: Tensor, weight: float) -> None:
        """factors_i <- decay factors_i + weight U U^T; U is [B, d_i, rest]."""
        factor = self.factors[i].read().mul_(per_block(decay, 3))
        self.factors[i].keep(factor.baddbmm_(unfolded, unfolded.mT, alpha=weight))

    def _accumulate_diagonal(
        self, name: str, squares: Tensor, i: int, decay: Tensor, weight: float
    ) -> None:
        """state[name] [B, d_i] <- decay state[name] + weight * squares summed along the others."""
        others = [d for d in range(1, squares.ndim) if d != i + 1]
        total = squares.sum(others) if others else squares
        self.state[name].mul_(decay.view(-1, 1)).add_(total, alpha=weight)

    def _updated_basis(
        self,
        i: int,
        where: Positions,
        matrices: Tensor,
        cold: bool,
        iterations: int = 1,
        resolution: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues [n, d_i] and eigenvectors [n, d_i, d_i] of these matrices, kept in
        `eigenvectors_i` where that did not fail, and where it failed [n].

        Args:
            iterations: of "qr".
            resolution: of `complete_basis`, if it is wanted.
        """
        kept = self.state[f"eigenvectors_{i}"]
        before = kept[where].float()
        if cold or self.config.basis_method == "eigh":
            eigenvalues, vectors = eigenbasis(matrices)
        else:
            eigenvalues, vectors = warm_eigenbasis(matrices, before, iterations)
        if resolution is not None:
            eigenvalues, vectors = complete_basis(matrices, eigenvalues, vectors, resolution)
        failed = (eigenvalues.sum(1) + vectors.sum((1, 2))).isfinite().logical_not_()
        # No second moment: its definiteness is lost.
        failed |= (eigenvalues.amax(1) <= 0.0) & (matrices != 0.0).any(2).any(1)
        vectors = torch.where(per_block(failed, 3), before, vectors)
        kept[where] = vectors.to(kept.dtype)
        return eigenvalues, vectors, failed

    def _health_of_bases(self) -> Health:
        """From Q^T L Q, whose diagonal has the eigenvalues; the residual is what is beside it."""
        conditions, residuals = [], []
        for i in self.full:
            vectors = self.state[f"eigenvectors_{i}"].float()
            rotated = vectors.mT @ self.factors[i].read() @ vectors
            eigenvalues = rotated.diagonal(dim1=1, dim2=2)
            ridged = self._powers(eigenvalues, 1.0, self.config.preconditioner_eps)
            conditions.append(ridged.amax(1) / ridged.amin(1))
            whole = torch.linalg.matrix_norm(rotated)
            beside = torch.linalg.matrix_norm(rotated - torch.diag_embed(eigenvalues))
            residuals.append(beside / torch.where(whole > 0.0, whole, 1.0))
        return Health(torch.stack(conditions), torch.stack(residuals))

    def _powers(self, eigenvalues: Tensor, exponent: float, ridge: float | Tensor) -> Tensor:
        """Eigenvalues [n, d] to a power, after raising them to the resolution of the largest and
        adding the ridge, a number or [n]: what :func:`shampoo_fsdp.roots.inverse_root` does."""
        resolution = max(self.resolution, torch.finfo(torch.float32).eps)
        floor = eigenvalues.amax(1, keepdim=True).clamp_min(0.0) * resolution
        ridged = torch.maximum(eigenvalues, floor).add_(per_block(ridge, 2))
        return ridged.pow_(exponent)

    def _identity(self, n: int) -> Tensor:
        device = next(iter(self.state.values())).device
        return torch.eye(n, dtype=torch.float32, device=device)
