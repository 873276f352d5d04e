"""Inverse roots by few matrix products, made for the units that GPUs have for them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_fsdp.kernels.language import can_run, describable, kernels, sums_in_fp32
from shampoo_fsdp.kernels.product import Sum, product
from shampoo_fsdp.kernels.refresh import line, two_sums
from shampoo_fsdp.rules.matrices import per_block
from shampoo_fsdp.rules.precision import products_in


class Stage(NamedTuple):
    """A polynomial q with q(t) near t^(-1/2) on [middle - half, middle + half]."""

    coefficients: tuple[float, ...]
    """Those of the powers of nu = (t - middle) / half."""
    middle: float
    half: float

    @property
    def factored(self) -> tuple[float, float, float, float, float]:
        """u, a, b, c and d of q = u [(a nu^2 + nu + b) (nu^2 + c) + d]."""
        c0, c1, c2, u, c4 = self.coefficients
        a, c = c4 / u, c1 / u
        b = c2 / u - a * c
        return u, a, b, c, c0 / u - b * c


_Chain = tuple[tuple[Stage, ...], float]
"""Polynomials that make an inverse square root, one after the other, and the largest difference to
1 of it times the square root that it should invert."""

# Printed by `python -m benchmarks.polynomials`: fewest products for eigenvalues from 1e-5 to 1 and
# a `root_residual` of at most 0.25. Smaller eigenvalues count as about 1e-5.
# fmt: off
_SQUARE_ROOT: _Chain = (
    (
        Stage((2.25730005642, 3.56673029886, -10.5493352388, -9.91728715739, 16.5769668148),
              0.510055, 0.510045),
        Stage((1.03414720026, 1.30991280776, -3.91314415524, -4.01917293728, 6.45440745054),
              1.94794003006, 1.94579805482),
        Stage((0.855341480047, -0.0241290687404, -0.433407122637, -1.17345315241, 1.42179274373),
              1.53223160447, 1.44762982689),
    ),
    0.115393070111,
)
_FIRST_OF_TWO: _Chain = (
    (
        Stage((2.55558314641, -2.53963019658),
              0.510055, 0.510045),
        Stage((1.10472315538, 1.6591470175, -4.91362722132, -4.71684427678, 7.80799613428),
              2.00758954076, 2.00732992877),
        Stage((0.932628000232, 0.735832764275, -2.33035535668, -2.84812668064, 4.26274910023),
              1.82128257845, 1.80835434901),
        Stage((0.912113632181, -0.299378059375, 0.138897983677, -0.2283413823, 0.173061103717),
              1.20908283046, 0.888803125463),
    ),
    0.00860371177308,
)
_SECOND_OF_TWO: _Chain = (
    (
        Stage((1.78383741944, 1.50186328821, -4.70407031957, -5.61916649247, 8.48337022437),
              0.511604163592, 0.508495836408),
        Stage((0.904228499017, -0.297839460892, 0.133927500027, -0.274880484173, 0.22045466878),
              1.23330031325, 0.942016085791),
    ),
    0.0116170621564,
)
# fmt: on


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

    Where units for it are, matrices are multiplied as two parts of 8 bits by the first polynomial,
    in fp16, with 10 bits, by those after it: what that does to the root of factors from trainings
    is less than their error (0.004 against 0.11). The first needs more: A's small eigenvalues are
    below that rounding, and what is lost never comes back. So does a root that another one is taken
    of: its small eigenvalues would not be definite any more.

    Args:
        matrices: [B, n, n], symmetric.
        order: p.
        eps, divisor: numbers or [B].

    Returns:
        [B, n, n]; what comes of a matrix that is not positive semi-definite may be anything.
    """
    # (In fp16 a row has to begin at a multiple of 16 bytes.)
    ours = can_run(matrices) and describable(matrices) and matrices.shape[1] % 8 == 0
    halves = matrices.dtype == torch.float32 and (ours or sums_in_fp32(matrices.device.type))
    rounded = torch.float16 if halves else matrices.dtype
    with kernels("auto" if ours else "off"):
        # Squares must not overflow or vanish. A second moment's largest entry is on its diagonal.
        lift = eps * divisor
        unit = matrices.diagonal(dim1=-2, dim2=-1).amax(-1) + lift
        unit.clamp_min_(torch.finfo(unit.dtype).tiny)
        a, ridge = matrices / per_block(unit, 3), lift / unit
        square, squares = product(a, a, Sum(a.dtype), symmetric=True, squares=True)
        # Between the largest eigenvalue and that times the fourth root of how many are as large;
        # the Frobenius norm, with a square root, would be 8 times it where they decay slowly.
        slope, offset, power = line(squares, unit, ridge, divisor, order)

        (first, *others, last), error = _SQUARE_ROOT if order == 2 else _FIRST_OF_TWO
        dtype = rounded if order == 2 else a.dtype
        inverse, root = _first_of_a(first, a, square, slope, offset, dtype)
        del a, square  # matrices are large
        share = 0.5
        if order == 4:
            inverse, root = _iterate(others, inverse, root)
            (root,) = product(root, _factor(last, inverse, root), Sum(root.dtype))
            above = 1.0 + error
            (first, *others, last), _ = _SECOND_OF_TWO
            nu = (root + root.mT).mul_(0.5 / (above * first.half))
            _plus(nu, -first.middle / first.half)
            inverse, root = _first_of_nu(first, nu, rounded)
            share *= above**-0.5
            del nu
        with products_in("high"):  # where there is no fp16
            inverse, root = _iterate(others, inverse, root)
            factor = _factor(last, inverse, root, share)
            whole = torch.promote_types(inverse.dtype, torch.float32)
            (inverse,) = product(factor, inverse, Sum(whole, power))
        return inverse + inverse.mT


def _first_of_a(
    stage: Stage, a: Tensor, square: Tensor, slope: Tensor, offset: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """T = q(t) and t T in this type, t being slope A + offset I, [B].

    Args:
        square: A^2; may be changed.
    """
    if len(stage.coefficients) == 2:
        c0, c1 = stage.coefficients
        x, y = slope / stage.half, (offset - stage.middle) / stage.half
        t = low = _plus(a * per_block(c1 * x, 3), c1 * y + c0)
    else:
        u, *quadratics, d = stage.factored
        inner, squared = two_sums(square, a, slope, offset, (stage.middle, stage.half, *quadratics))
        t, low = _in_both(Sum(a.dtype, u, 0.0, u * d), dtype, inner, squared)
        del inner, squared
    (root,) = product(a, t, Sum(dtype, slope, offset), c=t, symmetric=True)
    return low, root


def _first_of_nu(stage: Stage, nu: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of a symmetric nu."""
    u, a, b, c, d = stage.factored
    sums = Sum(nu.dtype, a, 1.0, b), Sum(nu.dtype, 1.0, 0.0, c)
    inner, squared = product(nu, nu, *sums, c=nu, symmetric=True)
    t, low = _in_both(Sum(nu.dtype, u, 0.0, u * d), dtype, inner, squared)
    del squared, inner
    (root,) = product(nu, t, Sum(dtype, stage.half, stage.middle), c=t, symmetric=True)
    return low, root


def _in_both(sum_: Sum, dtype: torch.dtype, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A sum of a symmetric product in its own type and in this one."""
    types = dict.fromkeys((sum_.dtype, dtype))
    results = product(a, b, *(sum_._replace(dtype=own) for own in types), symmetric=True)
    return results[0], results[-1]


def _factor(stage: Stage, inverse: Tensor, root: Tensor, share: float = 1.0) -> Tensor:
    """share T, T being q(Z Y)."""
    (u, a, b, c, d), dtype = stage.factored, inverse.dtype
    (nu,) = product(inverse, root, Sum(dtype, 1.0 / stage.half, 0.0, -stage.middle / stage.half))
    inner, squared = product(nu, nu, Sum(dtype, a, 1.0, b), Sum(dtype, 1.0, 0.0, c), c=nu)
    return product(inner, squared, Sum(dtype, share * u, 0.0, share * u * d))[0]


def _iterate(stages: Sequence[Stage], inverse: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Z <- T Z, Y <- Y T for these polynomials."""
    for stage in stages:
        factor = _factor(stage, inverse, root)
        (inverse,) = product(factor, inverse, Sum(inverse.dtype))
        (root,) = product(root, factor, Sum(root.dtype))
    return inverse, root


def _plus(matrices: Tensor, values: float | Tensor) -> Tensor:
    """A + value I in place; a number or [B]."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(per_block(values, 2))
    return matrices
