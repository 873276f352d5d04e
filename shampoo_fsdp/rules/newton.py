"""Inverse roots by matrix products alone; :mod:`shampoo_fsdp.rules.roots` says for what."""

import functools

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import per_block

__all__ = ["coupled_newton", "newton_db", "normalised"]

# A step of the matrix iterations treats eigenvalues below this, relative to the largest, as if they
# were this. A longer step all but annihilates the largest ones, and what rounding then makes of
# them stays; more so in `coupled_newton`, whose M is never formed anew.
_SHORTEST_NEWTON, _SHORTEST_DB = 0.1, 0.02

# The ridge of the matrix iterations relative to ||A||_F, and the least eigenvalue with it, in units
# of the resolution. A sum of a thousand gradients that all lack the same directions has eigenvalues
# down to -5 there, from rounding; a negative one makes the iterations diverge.
_RIDGE, _LEAST = 8.0, 2.0


def normalised(matrices: Tensor, eps: float | Tensor, resolution: float) -> tuple[Tensor, Tensor]:
    """A with its ridge, divided by a bound of its largest eigenvalue, and the bound, [B, 1, 1].

    The eigenvalues are then between about the resolution and 1. The bound is the Frobenius norm: it
    is above the largest eigenvalue by the root of how many are that large, no iteration estimates
    it, and no vector has to be right for it.
    """
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    unit = torch.where(largest > 0.0, largest, 1.0)  # squares must not overflow or vanish
    norm = torch.linalg.matrix_norm(matrices / unit, keepdim=True) * unit
    relative = max(_RIDGE * torch.finfo(matrices.dtype).eps, resolution)
    ridge = norm * relative
    ridge = ridge.maximum(per_block(eps, 3)) if isinstance(eps, Tensor) else ridge.clamp_min(eps)
    scale = norm + ridge
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.addcmul(matrices, ridge, identity).div_(scale), scale


def coupled_newton(matrix: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Inverse p-th root of matrices with eigenvalues in (0, 1], and the last multiplier T.

    M <- A, X <- I, then T = s^(1/p) ((p + 1) I - s M) / p, X <- X T, M <- T^p M: in the literature
    s = 1; the s of `_step_lengths` halve the number of products for the same error.
    """
    resolution = torch.finfo(matrix.dtype).eps
    steps = _step_lengths(order, _LEAST * resolution, _SHORTEST_NEWTON, resolution)
    root = multiplier = matrix
    for i, s in enumerate(steps):
        multiplier = matrix * (-(s ** (1.0 + 1.0 / order)) / order)
        multiplier.diagonal(dim1=-2, dim2=-1).add_(s ** (1.0 / order) * (order + 1) / order)
        root = multiplier if i == 0 else root @ multiplier
        if i + 1 < len(steps):
            matrix = torch.linalg.matrix_power(multiplier, order) @ matrix
    return root, multiplier


def newton_db(matrix: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """As `coupled_newton`, by inverse square roots of square roots.

    Y <- A, Z <- I, then T = s^(1/2) (3 I - s Z Y) / 2, Y <- Y T, Z <- T Z: Y becomes the square
    root, Z its inverse. For p > 2 it takes more products than `coupled_newton`.
    """
    resolution = torch.finfo(matrix.dtype).eps
    least = _LEAST * resolution
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = multiplier = matrix
    while order > 1:
        steps = _step_lengths(2, least, _SHORTEST_DB, resolution)
        for i, s in enumerate(steps):
            last = i + 1 == len(steps)
            a, b = 1.5 * s**0.5, -0.5 * s**1.5
            if i == 0:
                multiplier = torch.add(a * identity, matrix, alpha=b)
                inverse = multiplier
            else:
                multiplier = torch.baddbmm(identity, inverse, matrix, beta=a, alpha=b)
                if not last or order == 2:
                    inverse = multiplier @ inverse
            if not last or order > 2:
                matrix = matrix @ multiplier
        order, least = order // 2, least**0.5
    return inverse, multiplier


@functools.cache
def _step_lengths(
    order: int, least: float, shortest: float, resolution: float
) -> tuple[float, ...]:
    """Lengths s of the steps that take all eigenvalues from [least, 1] to 1.

    A step takes the eigenvalue m / s to f(m) = m ((p + 1 - m) / p)^p, at most f(1) = 1. The best s
    takes the largest eigenvalue as far down as the smallest, f(s) = f(s least) (for p = 2: Chen &
    Chow 2014, "A stable scaling of Newton-Schulz for improving the sign function computation of a
    Hermitian matrix"). For p = 4 it multiplies small eigenvalues by up to 12, and by 5.7 where
    `shortest` is 0.1; s = 1 multiplies them by 2.4.

    Args:
        order: p.
        least: the smallest eigenvalue, relative to the largest.
        shortest: `least` is taken as this if it is less: see `_SHORTEST_DB`.
        resolution: of the dtype; how near to 1 is near enough.
    """

    def image(m: float) -> float:
        return m * ((order + 1 - m) / order) ** order

    steps: list[float] = []
    while 1.0 - least > 8.0 * resolution:
        smallest = max(least, shortest)
        low, high = 1.0, order + 1.0
        for _ in range(60):
            s = 0.5 * (low + high)
            low, high = (s, high) if image(s) > image(s * smallest) else (low, s)
        steps.append(low)
        least = min(image(low * least), image(low))
    return tuple(steps)
