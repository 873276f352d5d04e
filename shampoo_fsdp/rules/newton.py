"""Inverse roots of any order by Newton's method, matrix products alone."""

import functools

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import per_block

__all__ = ["coupled_newton"]

# A step treats eigenvalues below this, relative to the largest, as if they were this. A longer step
# all but annihilates the largest ones, and what rounding then makes of them stays, as M is never
# formed anew.
_SHORTEST = 0.1


def coupled_newton(matrices: Tensor, order: int, eps: float | Tensor, least: float) -> Tensor:
    """(A + eps I)^(-1/p) of matrices [B, n, n] (Guo & Higham 2006, equation 1.5).

    M <- A / norm, X <- I, then T = s^(1/p) ((p + 1) I - s M) / p, X <- X T, M <- T^p M: in the
    literature s = 1; the s of `_step_lengths` halve the number of products for the same error.

    Args:
        order: p.
        eps: a number or [B].
        least: of the eigenvalues, relative to the norm. As the number of steps is that which takes
            it to 1, what is below counts as at most a little less.
    """
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    unit = torch.where(largest > 0.0, largest, 1.0)  # squares must not overflow or vanish
    # The Frobenius norm is above the largest eigenvalue by at most the root of how many are as
    # large; no iteration estimates it, and no vector has to be right for it.
    scale = torch.linalg.matrix_norm(matrices / unit, keepdim=True) * unit + per_block(eps, 3)
    matrix = matrices / scale
    matrix.diagonal(dim1=-2, dim2=-1).add_((per_block(eps, 3) / scale).flatten(1))
    root = matrix
    steps = _step_lengths(order, least, torch.finfo(matrix.dtype).eps)
    for i, s in enumerate(steps):
        multiplier = matrix * (-(s ** (1.0 + 1.0 / order)) / order)
        multiplier.diagonal(dim1=-2, dim2=-1).add_(s ** (1.0 / order) * (order + 1) / order)
        root = multiplier if i == 0 else root @ multiplier
        if i + 1 < len(steps):
            matrix = torch.linalg.matrix_power(multiplier, order) @ matrix
    # Rounding turns the iterates away from symmetry as much as from the root.
    symmetric: Tensor = (root + root.mT).mul_(0.5 * scale ** (-1.0 / order))
    return symmetric


@functools.cache
def _step_lengths(order: int, least: float, resolution: float) -> tuple[float, ...]:
    """Lengths s of the steps that take all eigenvalues from [least, 1] to 1.

    A step takes the eigenvalue m / s to f(m) = m ((p + 1 - m) / p)^p, at most f(1) = 1. The best s
    takes the largest eigenvalue as far down as the smallest, f(s) = f(s least) (for p = 2: Chen &
    Chow 2014, "A stable scaling of Newton-Schulz for improving the sign function computation of a
    Hermitian matrix"), the smallest being taken as `_SHORTEST` if it is less. For p = 4 it
    multiplies small eigenvalues by 5.7; s = 1 multiplies them by 2.4.

    Args:
        order: p.
        least: the smallest eigenvalue, relative to the largest.
        resolution: of the dtype; how near to 1 is near enough.
    """

    def image(m: float) -> float:
        return m * ((order + 1 - m) / order) ** order

    steps: list[float] = []
    while 1.0 - least > 8.0 * resolution:
        smallest = max(least, _SHORTEST)
        low, high = 1.0, order + 1.0
        for _ in range(60):
            s = 0.5 * (low + high)
            low, high = (s, high) if image(s) > image(s * smallest) else (low, s)
        steps.append(low)
        least = min(image(low * least), image(low))
    return tuple(steps)
