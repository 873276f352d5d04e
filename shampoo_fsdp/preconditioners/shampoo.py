"""Shampoo: Kronecker factors of the gradient's second moment and their inverse roots."""

import torch
from torch import Tensor

from shampoo_fsdp.roots import inverse_root_eigh

__all__ = ["ShampooPreconditioner"]


class ShampooPreconditioner:
    """Factors and inverse roots of a stack of blocks of one shape (d_1, ..., d_k).

    Gupta et al. 2018 (arXiv 1802.09568), algorithms 1 and 2: one factor L_i, [B, d_i, d_i], for
    each dimension, the direction being the momentum multiplied by L_i^(-1/(2k)) along each.
    """

    def __init__(self, blocks: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.factors = [
            torch.zeros(blocks, n, n, dtype=torch.float32, device=device) for n in shape
        ]
        self.inverse_roots = [self._identity(n).repeat(blocks, 1, 1) for n in shape]
        self._exponent = -0.5 / len(shape)

    def update_factors(self, gradient: Tensor, decay: Tensor, beta2: float) -> None:
        """L_i <- beta2 L_i + (1 - beta2) G_(i) G_(i)^T, or plain sums for beta2 = 1.

        G_(i) is the gradient unfolded along dimension i.

        Args:
            gradient: [B, d_1, ..., d_k]; zero where it is not usable.
            decay: [B]; beta2, and 1 where the gradient is not usable.
        """
        weight = 1.0 - beta2 if beta2 < 1.0 else 1.0
        for i, factor in enumerate(self.factors):
            unfolded = _unfold(gradient, i)
            if beta2 < 1.0:
                factor.mul_(decay.view(-1, 1, 1))
            factor.baddbmm_(unfolded, unfolded.mT, alpha=weight)

    def refresh(self, due: slice | Tensor, correction2: float | Tensor, eps: float) -> Tensor:
        """Take the inverse roots of the due blocks' factors; a block whose decomposition fails
        keeps its last roots.

        Args:
            due: positions in the stack, n of them.
            correction2: bias correction of the due blocks' factors; [n, 1, 1] if not a number.
            eps: ridge.

        Returns:
            the number of failed roots, a tensor.
        """
        failed = torch.zeros((), dtype=torch.int64, device=self.factors[0].device)
        for factor, inverse_root in zip(self.factors, self.inverse_roots, strict=True):
            roots = inverse_root_eigh(factor[due] / correction2, self._exponent, eps)
            good = roots.sum((1, 2)).isfinite()
            failed += good.logical_not().sum()
            inverse_root[due] = torch.where(good.view(-1, 1, 1), roots, inverse_root[due])
        return failed

    def has_roots(self) -> Tensor:
        """Whether roots have ever been taken, for each block: they are the identity before.
        Bool, [B]."""
        taken = [
            (root != self._identity(root.shape[-1])).any(2).any(1) for root in self.inverse_roots
        ]
        return torch.stack(taken).any(0)

    def _identity(self, n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float32, device=self.factors[0].device)

    def precondition(self, momentum: Tensor) -> Tensor:
        """The momentum [B, d_1, ..., d_k] multiplied by the inverse root along each dimension."""
        *leading, last = self.inverse_roots
        result = _times(momentum, last)
        for i, root in enumerate(leading):
            result = _fold(torch.bmm(root, _unfold(result, i)), i, momentum.shape)
        return result


def _times(blocks: Tensor, last: Tensor) -> Tensor:
    """Multiply along the last dimension; the root is symmetric."""
    return torch.bmm(blocks.reshape(len(blocks), -1, last.shape[-1]), last).view(blocks.shape)


def _unfold(blocks: Tensor, i: int) -> Tensor:
    """[B, d_1, ..., d_k] -> [B, d_i, rest]; for matrices a view."""
    return blocks.movedim(i + 1, 1).reshape(len(blocks), blocks.shape[i + 1], -1)


def _fold(unfolded: Tensor, i: int, shape: torch.Size) -> Tensor:
    """Inverse of :func:`_unfold`."""
    rest = [n for d, n in enumerate(shape[1:]) if d != i]
    return unfolded.view(shape[0], shape[i + 1], *rest).movedim(1, i + 1)
