"""Inverse roots by few matrix products, made for the units that GPUs have for them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_fsdp.rules.matrices import per_block
from shampoo_fsdp.rules.precision import Precise, split_product, tf32_product

__all__ = ["polynomial_root"]


class Stage(NamedTuple):
    """A polynomial q with q(t) near t^(-1/2) on [middle - half, middle + half]."""

    coefficients: tuple[float, ...]
    """Those of the powers of nu = (t - middle) / half."""
    middle: float
    half: float


class Chain(NamedTuple):
    """Polynomials that make an inverse square root, one after the other."""

    error: float
    """Of the root times the square root that it should invert: the largest difference to 1."""
    stages: tuple[Stage, ...]


# Printed by `python -m benchmarks.polynomials`: fewest products for eigenvalues from 1e-5 to 1 and
# a `root_residual` of at most 0.25. Smaller eigenvalues count as about 1e-5.
# fmt: off
_SQUARE_ROOT = Chain(
    error=0.115393070111,
    stages=(
        Stage((2.25730005642, 3.56673029886, -10.5493352388, -9.91728715739, 16.5769668148),
              0.510055, 0.510045),
        Stage((1.03414720026, 1.30991280776, -3.91314415524, -4.01917293728, 6.45440745054),
              1.94794003006, 1.94579805482),
        Stage((0.855341480047, -0.0241290687404, -0.433407122637, -1.17345315241, 1.42179274373),
              1.53223160447, 1.44762982689),
    ),
)
_FIRST_OF_TWO = Chain(
    error=0.00860371177308,
    stages=(
        Stage((2.55558314641, -2.53963019658),
              0.510055, 0.510045),
        Stage((1.10472315538, 1.6591470175, -4.91362722132, -4.71684427678, 7.80799613428),
              2.00758954076, 2.00732992877),
        Stage((0.932628000232, 0.735832764275, -2.33035535668, -2.84812668064, 4.26274910023),
              1.82128257845, 1.80835434901),
        Stage((0.912113632181, -0.299378059375, 0.138897983677, -0.2283413823, 0.173061103717),
              1.20908283046, 0.888803125463),
    ),
)
_SECOND_OF_TWO = Chain(
    error=0.0116170621564,
    stages=(
        Stage((1.78383741944, 1.50186328821, -4.70407031957, -5.61916649247, 8.48337022437),
              0.511604163592, 0.508495836408),
        Stage((0.904228499017, -0.297839460892, 0.133927500027, -0.274880484173, 0.22045466878),
              1.23330031325, 0.942016085791),
    ),
)
# fmt: on

# The square of A that gives the norm is rounded, and eigenvalues must not be above it.
_SLACK = 1e-3

Product = Callable[..., Tensor]


def polynomial_root(
    matrices: Tensor, order: int, eps: float | Tensor, divisor: float | Tensor
) -> Tensor:
    """(A / divisor + eps I)^(-1/p) of each matrix A, p being 2 or 4; the fourth root is the square
    root of a square root.

    For a square root Y <- A, Z <- I, and for one polynomial q after the other T = q(Z Y),
    Z <- T Z, Y <- Y T (Higham 2008, equation 6.35, with minimax polynomials: Chen & Chow 2014):
    Z becomes the inverse square root, Y the square root.

    In between nothing is made symmetric: rounding that does not commute with A would then grow by
    the root of A's condition in each T Z, as Z f(Y Z) = f(Z Y) Z no longer holds.

    Polynomials after the first are rounded to the 10 bits of TF32: what that does to the root of
    factors from trainings is less than their error (0.004 against 0.11). The first is not: A's
    small eigenvalues are below that rounding, and what is lost never comes back. Nor is a root that
    another one is taken of: its small eigenvalues would not be definite any more.

    Args:
        matrices: [B, n, n], symmetric.
        order: p.
        eps, divisor: numbers or [B].

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
    chain = _SQUARE_ROOT if order == 2 else _FIRST_OF_TWO
    # nu = a A + b I, and its square, a (a A^2 + 2 b A) + b^2 I.
    a = 1.0 / (scale * chain.stages[0].half)
    b = ridge * a - chain.stages[0].middle / chain.stages[0].half
    nu = _plus_diagonal(scaled * a, b)
    squared = _plus_diagonal(square.mul_(a.square()).addcmul_(scaled, 2.0 * a * b), b.square())
    del scaled, square  # matrices are large
    start = _from_a(precise, scale, ridge)
    power = (scale * unit / divisor) ** (-1.0 / order)
    if order == 2:
        inverse, factor, _ = _coupled(nu, squared, start, chain, tf32_product)
        return (inverse + inverse.mT).mul_((0.5 * factor) * power)
    _, _, root = _coupled(nu, squared, start, chain, split_product, keep_root=True)
    assert root is not None
    above = 1.0 + chain.error
    chain = _SECOND_OF_TWO
    middle, half = chain.stages[0].middle, chain.stages[0].half
    nu = (root[0] + root[0].mT).mul_(0.5 * root[1] / (above * half))
    nu.diagonal(dim1=-2, dim2=-1).sub_(middle / half)
    precise = Precise(nu)
    start = _from_nu(precise, chain.stages[0])
    inverse, factor, _ = _coupled(nu, precise @ precise, start, chain, tf32_product)
    return (inverse + inverse.mT).mul_((0.5 * above**-0.5 * factor) * power)


def _coupled(
    nu: Tensor,
    squared: Tensor,
    times_start: Callable[[Tensor], tuple[Tensor, float]],
    chain: Chain,
    product: Product,
    *,
    keep_root: bool = False,
) -> tuple[Tensor, float, tuple[Tensor, float] | None]:
    """Z, and Y if it is wanted, each as a matrix and a number that it has to be multiplied by: what
    can be a number in the next product takes no pass over the matrix.

    Args:
        nu, squared: of the first polynomial; symmetric.
        times_start: multiplies the first Y with a matrix; of the result, too, a number is apart.
        product: after the first polynomial.
    """
    first, *others = chain.stages
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
