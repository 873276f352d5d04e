"""Inverse roots by few matrix products, made for the units that GPUs have for them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import per_block
from shampoo_fsdp.rules.minimax import Stage, inverse_square_root
from shampoo_fsdp.rules.precision import Precise, fp32_product, split_product, tf32_product

__all__ = ["COARSE", "polynomial_root"]

# The square of A that gives the norm is rounded, and eigenvalues must not be above it.
_SLACK = 1e-3

COARSE = 0.01
"""From this error on, polynomials after the first may be rounded to the 10 bits of TF32: what that
does to the root of factors from trainings is less (0.004 where the polynomials leave 0.11). The
first may not: A's small eigenvalues are below that rounding, and what is lost never comes back. Nor
may a root that another one is taken of: its small eigenvalues would not be definite any more."""

Product = Callable[..., Tensor]


def polynomial_root(
    matrices: Tensor,
    order: int,
    eps: float | Tensor,
    divisor: float | Tensor,
    least: float,
    error: float,
) -> Tensor:
    """(A / divisor + eps I)^(-1/p) of each matrix A, p a power of two, by square roots of square
    roots.

    For a square root Y <- A, Z <- I, and for one polynomial q after the other T = q(Z Y),
    Z <- T Z, Y <- Y T (Higham 2008, equation 6.35, with the polynomials of
    :mod:`shampoo_fsdp.rules.minimax`): Z becomes the inverse square root, Y the square root.

    In between nothing is made symmetric: rounding that does not commute with A would then grow by
    the root of A's condition in each T Z, as Z f(Y Z) = f(Z Y) Z no longer holds.

    Args:
        matrices: [B, n, n], symmetric.
        order: p, 2 or more.
        eps, divisor: numbers or [B].
        least: of the eigenvalues, relative to the norm; what is below counts as at most this.
        error: of the root's eigenvalues, relative, that is wanted.

    Returns:
        [B, n, n]; what comes of a matrix that is not positive semi-definite may be anything.
    """
    # Squares must not overflow or vanish. The largest entry of a second moment is on its diagonal.
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1).view(-1, 1, 1)
    divisor = per_block(divisor, 3)
    lift = per_block(eps, 3) * divisor
    unit = largest.clamp_min(0.0) + lift
    unit = torch.where(unit > 0.0, unit, 1.0)
    scaled, ridge = matrices / unit, lift / unit
    precise = Precise(scaled)
    square = precise @ precise
    # Between the largest eigenvalue and that times the fourth root of how many are as large; the
    # Frobenius norm, with a square root, would be above it by eight where they decay slowly.
    scale = torch.linalg.matrix_norm(square, keepdim=True).sqrt_().mul_(1.0 + _SLACK) + ridge
    # All errors together are less than twice the share.
    share = error if order == 2 else 0.5 * error
    stages, left = inverse_square_root(least, share)
    # nu = a A + b I, and its square, a (a A^2 + 2 b A) + b^2 I.
    a = 1.0 / (scale * stages[0].half)
    b = ridge * a - stages[0].middle / stages[0].half
    nu = _plus_diagonal(scaled * a, b)
    squared = _plus_diagonal(square.mul_(a.square()).addcmul_(scaled, 2.0 * a * b), b.square())
    del scaled, square  # matrices are large
    remaining, gain = order // 2, 1.0
    start = _from_a(precise, scale, ridge)
    fine: Product = split_product if error >= COARSE else fp32_product
    product = tf32_product if error >= COARSE and remaining == 1 else fine
    inverse, factor, root = _coupled(nu, squared, start, stages, product, remaining > 1)
    while remaining > 1:
        remaining //= 2
        above = 1.0 + left
        gain, least = (gain / above) ** 0.5, least**0.5 * (1.0 - left) / above
        stages, left = inverse_square_root(least, share)
        middle, half = stages[0].middle, stages[0].half
        assert root is not None
        nu = (root[0] + root[0].mT).mul_(0.5 * root[1] / (above * half))
        nu.diagonal(dim1=-2, dim2=-1).sub_(middle / half)
        precise = Precise(nu)
        product = tf32_product if error >= COARSE and remaining == 1 else fine
        inverse, factor, root = _coupled(
            nu, precise @ precise, _from_nu(precise, stages[0]), stages, product, remaining > 1
        )
    power = (scale * unit / divisor) ** (-1.0 / order)
    return (inverse + inverse.mT).mul_((0.5 * gain * factor) * power)


def _coupled(
    nu: Tensor,
    squared: Tensor,
    times_start: Callable[[Tensor], tuple[Tensor, float]],
    stages: Sequence[Stage],
    product: Product,
    keep_root: bool,
) -> tuple[Tensor, float, tuple[Tensor, float] | None]:
    """Z, and Y if it is wanted, each as a matrix and a number that it has to be multiplied by: what
    can be a number in the next product takes no pass over the matrix.

    Args:
        nu, squared: of the first polynomial; symmetric.
        times_start: multiplies the first Y with a matrix; of the result, too, a number is apart.
        product: after the first polynomial.
    """
    first, *others = stages
    inverse, z = _evaluated(first, nu, squared, _precise_product)
    root, y = inverse, 0.0
    if others or keep_root:
        root, y = times_start(inverse)
        y *= z
    for k, stage in enumerate(others):
        nu = product(inverse, root, z * y / stage.half)
        nu.diagonal(dim1=-2, dim2=-1).sub_(stage.middle / stage.half)
        factor, t = _evaluated(stage, nu, product(nu, nu), product)
        inverse, z = product(factor, inverse), t * z
        if keep_root or k + 1 < len(others):
            root, y = product(root, factor), t * y
    return inverse, z, (root, y) if keep_root else None


def _precise_product(a: Tensor, b: Tensor) -> Tensor:
    """A B^T."""
    left = Precise(a)
    del a
    return left @ Precise(b)


def _from_a(precise: Precise, scale: Tensor, ridge: Tensor) -> Callable[..., tuple[Tensor, float]]:
    """Multiplies (A + ridge I) / scale with a matrix T."""

    def times(t: Tensor) -> tuple[Tensor, float]:
        return (precise @ Precise(t)).div_(scale).addcmul_(t, ridge / scale), 1.0

    return times


def _from_nu(precise: Precise, stage: Stage) -> Callable[..., tuple[Tensor, float]]:
    """Multiplies half nu + middle I with a matrix T."""

    def times(t: Tensor) -> tuple[Tensor, float]:
        return (precise @ Precise(t)).add_(t, alpha=stage.middle / stage.half), stage.half

    return times


def _evaluated(stage: Stage, nu: Tensor, squared: Tensor, product: Product) -> tuple[Tensor, float]:
    """q(nu), of two, three or five terms, as a matrix and a number; `squared` may be changed."""
    c = stage.coefficients
    if len(c) == 5:
        # c3 ((c2/c3 + nu + c4/c3 nu^2) nu^2 + c1/c3 nu + c0/c3)
        result = product(_two_terms(c[2] / c[3], nu, c[4] / c[3], squared), squared)
        result, scale = result.add_(nu, alpha=c[1] / c[3]), c[3]
    elif len(c) == 3:
        result, scale = squared.add_(nu, alpha=c[1] / c[2]), c[2]
    else:
        result, scale = nu.clone(), c[1]
    result.diagonal(dim1=-2, dim2=-1).add_(c[0] / scale)
    return result, scale


def _two_terms(value: float, nu: Tensor, factor: float, squared: Tensor) -> Tensor:
    """value I + nu + factor nu^2."""
    inner = torch.add(nu, squared, alpha=factor)
    inner.diagonal(dim1=-2, dim2=-1).add_(value)
    return inner


def _plus_diagonal(matrices: Tensor, values: Tensor) -> Tensor:
    """A + value I in place; values [B, 1, 1]."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(values.flatten(1))
    return matrices
