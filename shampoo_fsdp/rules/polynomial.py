"""Inverse roots by few matrix products, made for the units that GPUs have for them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import per_block
from shampoo_fsdp.rules.minimax import Stage, inverse_square_root
from shampoo_fsdp.rules.precision import multiply

__all__ = ["polynomial_root"]

# The square of A that gives the norm is rounded, and eigenvalues must not be above it.
_SLACK = 1e-3

# From this error on, polynomials after the first may be rounded to the 10 bits of TF32: what that
# does to the root of factors from trainings is less (0.004 where the polynomials leave 0.11). The
# first may not: A's small eigenvalues are below that rounding, and what is lost never comes back.
_COARSE = 0.01


def polynomial_root(
    matrices: Tensor, order: int, eps: float | Tensor, least: float, error: float
) -> Tensor:
    """(A + eps I)^(-1/p) of each matrix A, p a power of two, by square roots of square roots.

    For a square root Y <- A, Z <- I, and for one polynomial q after the other T = q(Z Y),
    Z <- T Z, Y <- Y T (Higham 2008, equation 6.35, with the polynomials of
    :mod:`shampoo_fsdp.rules.minimax`): Z becomes the inverse square root, Y the square root.

    In between nothing is made symmetric: rounding that does not commute with A would then grow by
    the root of A's condition in each T Z, as Z f(Y Z) = f(Z Y) Z no longer holds.

    Args:
        matrices: [B, n, n], symmetric.
        order: p, 2 or more.
        eps: a number or [B].
        least: of the eigenvalues, relative to the largest; what is below counts as at most this.
        error: of the root's eigenvalues, relative, that is wanted.

    Returns:
        [B, n, n]; what comes of a matrix that is not positive semi-definite may be anything.
    """
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    unit = torch.where(largest > 0.0, largest, 1.0)  # squares must not overflow or vanish
    scaled, ridge = matrices / unit, per_block(eps, 3) / unit
    square = multiply(scaled, scaled, "split")
    # Between the largest eigenvalue and that times the fourth root of how many are as large.
    norm = torch.linalg.matrix_norm(square, keepdim=True).sqrt_().mul_(1.0 + _SLACK)
    scale = norm + ridge
    # All errors together are less than twice the share.
    share = error if order == 2 else 0.5 * error
    stages, left = inverse_square_root(least, share)
    # nu = a A + b I, and its square.
    a = 1.0 / (scale * stages[0].half)
    b = (ridge / scale - stages[0].middle) / stages[0].half
    shifted = _plus_diagonal(scaled * a, b)
    squared = _plus_diagonal(torch.addcmul(square * a.square(), scaled, 2.0 * a * b), b.square())
    remaining, gain = order // 2, 1.0
    root, inverse = _coupled(shifted, squared, stages, share, keep_root=remaining > 1)
    while remaining > 1:
        above = 1.0 + left
        gain, least = (gain / above) ** 0.5, least**0.5 * (1.0 - left) / above
        stages, left = inverse_square_root(least, share)
        half = stages[0].half
        shifted = (root + root.mT).mul_(0.5 / (above * half))
        shifted.diagonal(dim1=-2, dim2=-1).sub_(stages[0].middle / half)
        squared = multiply(shifted, shifted, "split")
        remaining //= 2
        root, inverse = _coupled(shifted, squared, stages, share, keep_root=remaining > 1)
    return (inverse + inverse.mT).mul_((0.5 * gain) * (scale * unit) ** (-1.0 / order))


def _coupled(
    shifted: Tensor, squared: Tensor, stages: Sequence[Stage], error: float, *, keep_root: bool
) -> tuple[Tensor, Tensor]:
    """Y, if it is wanted, and Z.

    Args:
        shifted, squared: nu of the first polynomial, and its square.
    """
    fine, coarse = "split", "high" if error >= _COARSE else "split"
    first, *others = stages
    inverse = _evaluated(first, shifted, squared, fine)
    root = shifted
    if others or keep_root:
        beta, alpha = first.middle, first.half
        root = multiply(shifted, inverse, fine, inverse, beta, alpha)
    for k, stage in enumerate(others):
        identity = torch.eye(shifted.shape[-1], dtype=shifted.dtype, device=shifted.device)
        beta, alpha = -stage.middle / stage.half, 1.0 / stage.half
        shifted = multiply(inverse, root, coarse, identity, beta, alpha)
        factor = _evaluated(stage, shifted, multiply(shifted, shifted, coarse), coarse)
        inverse = multiply(factor, inverse, coarse)
        if keep_root or k + 1 < len(others):
            root = multiply(root, factor, coarse)
    return root, inverse


def _evaluated(stage: Stage, nu: Tensor, squared: Tensor, precision: str) -> Tensor:
    """q(nu), of two, three or five terms."""
    c = stage.coefficients
    if len(c) == 5:
        # c0 + c1 nu + c3 (c2/c3 + nu + c4/c3 nu^2) nu^2
        inner = torch.add(nu, squared, alpha=c[4] / c[3])
        inner.diagonal(dim1=-2, dim2=-1).add_(c[2] / c[3])
        result = multiply(inner, squared, precision, nu, c[1], c[3])
    elif len(c) == 3:
        result = torch.add(nu * c[1], squared, alpha=c[2])
    else:
        result = nu * c[1]
    result.diagonal(dim1=-2, dim2=-1).add_(c[0])
    return result


def _plus_diagonal(matrices: Tensor, values: Tensor) -> Tensor:
    """A + value I; values [B, 1, 1]."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(values.flatten(1))
    return matrices
