"""Inverse roots of stacks of symmetric positive semi-definite matrices."""

import functools
from fractions import Fraction

import torch
from torch import Tensor

from shampoo_fsdp.rules.eigenbasis import eigenbasis
from shampoo_fsdp.rules.matrices import per_block, to_device
from shampoo_fsdp.rules.polynomial import polynomial_root

ROOT_METHODS = ("eigh", "eigh_pseudo_inverse", "coupled_newton", "polynomial")

_LARGEST_ORDER = 16

# A root by products whose `root_residual` is above this has diverged: it is twice of what is asked.
_FAILED = 0.5

# The smallest eigenvalues that coupled_newton is made for, in units of the resolution of the dtype.
# A sum of a thousand gradients that all lack the same directions has eigenvalues down to -5 there,
# from rounding. Such ones end as if they were a little larger than zero; were the iteration made
# for less, it would diverge.
_LEAST = 32.0

# What coupled_newton makes of eigenvalues far below those that it is made for: it counts them as if
# they were smaller by about this.
_BELOW = 10.0

# A step treats eigenvalues below this, relative to the largest, as if they were this. A longer step
# all but annihilates the largest ones, and what rounding then makes of them stays, as M is never
# formed anew.
_SHORTEST = 0.1


def inverse_root(
    matrices: Tensor,
    exponent: float,
    eps: float | Tensor,
    method: str,
    resolution: float = 0.0,
    divisor: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """(A / divisor + eps I)^exponent of each matrix A, computed in the dtype of A.

    What lies below the resolution r of the dtype (2^-23 in fp32), or `resolution` if that is more,
    is rounding, negative or not, and differs from mesh to mesh; no method lets its inverse root
    count:

    - "eigh", by eigenvalues and eigenvectors (Shi et al. 2023, arXiv 2309.06497, section 3.2.1):
      before the ridge eps is added, eigenvalues are raised to r times the largest.
    - "eigh_pseudo_inverse": the same, but eigenvalues of at most n r times the largest, the usual
      bound below which a matrix has no rank (torch.linalg.matrix_rank), contribute nothing.
    - "polynomial" (see :func:`shampoo_fsdp.rules.polynomial.polynomial_root`), for the exponents
      -1/2 and -1/4, else "coupled_newton" (Guo & Higham 2006, equation 1.5; Anil et al.
      2020, arXiv 2002.09018): by matrix products alone. Eigenvalues below 1e-5 and some 3 r times
      the largest, respectively, count as if they were there, smoothly. The number of products
      depends on the dtype, the exponent and the resolution alone, and nothing is read back to the
      host.

    Args:
        matrices: fp32 or fp64, shape [B, n, n], symmetric.
        exponent: negative; see `check_exponent`.
        eps: the ridge; a number or [B].
        method: one of `ROOT_METHODS`.
        resolution: of A's entries, relative to the largest eigenvalue.
        divisor: of A; a number or [B]. Eigenvalues are divided where there are any, which is less
            work than dividing the matrices.

    Returns:
        shape [B, n, n], and where the method failed or the matrix was not finite, [B]: there the
        root is anything.

    Raises:
        ValueError: if there is no such method, or it cannot take this root.
    """
    if method not in ROOT_METHODS:
        raise ValueError(f"no root method '{method}'; there are {', '.join(ROOT_METHODS)}")
    check_exponent(method, exponent)
    if method in ("eigh", "eigh_pseudo_inverse"):
        eigenvalues, vectors = eigenbasis(matrices)
        eigenvalues = eigenvalues / per_block(divisor, 2)
        pseudo = method == "eigh_pseudo_inverse"
        return root_from_basis(eigenvalues, vectors, exponent, eps, resolution, pseudo)
    power, order = _ratio(exponent) or (1, 1)  # there is one
    if by_products(method, exponent) == "coupled_newton":
        least = max(_BELOW * resolution, _LEAST * torch.finfo(matrices.dtype).eps)
        root = coupled_newton(matrices / per_block(divisor, 3), order, eps, least)
    else:
        root = polynomial_root(matrices, order, eps, divisor)
    # Of the root itself: in its powers, what A lacks or hardly has would count most.
    good = root_residual(matrices, root, order, eps, divisor) < _FAILED  # not for NaN
    return root if power == 1 else torch.linalg.matrix_power(root, power), good.logical_not_()


def by_products(method: str, exponent: float) -> str:
    """The method that takes this root: "polynomial" leaves all but -1/2 and -1/4 to
    "coupled_newton", as powers of a root, and roots of roots, magnify its errors."""
    few = _ratio(exponent) in ((1, 2), (1, 4))
    return method if method != "polynomial" or few else "coupled_newton"


def root_from_basis(
    eigenvalues: Tensor,
    vectors: Tensor,
    exponent: float,
    eps: float | Tensor,
    resolution: float = 0.0,
    pseudo: bool = False,
) -> tuple[Tensor, Tensor]:
    """(A + eps I)^exponent from eigenvalues [B, n], in any order, and eigenvectors of A in the
    columns of [B, n, n]; arguments and result as those of `inverse_root`.

    Args:
        pseudo: whether directions that A lacks contribute nothing.
    """
    powers = ridged_powers(eigenvalues, exponent, eps, resolution)
    if pseudo:
        resolution = max(resolution, torch.finfo(eigenvalues.dtype).eps)
        largest = eigenvalues.amax(-1, keepdim=True).clamp_min(0.0)
        missing = eigenvalues <= largest * (resolution * eigenvalues.shape[-1])
        powers = powers.masked_fill(missing, 0.0)
    root = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return root, root.sum((-2, -1)).isfinite().logical_not_()


def ridged_powers(
    eigenvalues: Tensor, exponent: float, eps: float | Tensor, resolution: float = 0.0
) -> Tensor:
    """Eigenvalues [B, n] to a power, after raising them to the resolution of the largest and adding
    the ridge; arguments as those of `inverse_root`."""
    resolution = max(resolution, torch.finfo(eigenvalues.dtype).eps)
    floor = eigenvalues.amax(-1, keepdim=True).clamp_min(0.0) * resolution
    return torch.maximum(eigenvalues, floor).add_(per_block(eps, 2)).pow_(exponent)


def check_exponent(method: str, exponent: float) -> None:
    """Raise ValueError if the method cannot take this root.

    Methods by products take exponents -m/p, p up to 16; eigenvectors give any.
    """
    if not exponent < 0.0:
        raise ValueError(f"an inverse root has a negative exponent, not {exponent}")
    if method in ("coupled_newton", "polynomial") and _ratio(exponent) is None:
        raise ValueError(
            f'root_method = "{method}" takes roots with exponents -m/p, p = 1 to {_LARGEST_ORDER}, '
            f"and a factor needs the exponent {exponent:g}: set root_method = "
            '"eigh", or other root_exponents'
        )


def root_residual(
    matrices: Tensor, roots: Tensor, order: int, eps: float | Tensor, divisor: float | Tensor = 1.0
) -> Tensor:
    """||((A + eps I) X^p - I) v|| / ||v|| of X, which should be (A + eps I)^(-1/p), in the 1-norm,
    whose sums stay in range where squares would not.

    v = A u for two fixed vectors u: what A lacks, where X is what a method makes of rounding, does
    not count. It costs p + 2 products of a matrix with two vectors, no random numbers and no host
    read.

    Args:
        matrices, roots: A * divisor and X, symmetric, shape [B, n, n].
        order: p.
        eps, divisor: as for `inverse_root`.

    Returns:
        shape [B]; 0 where A = 0, NaN where X is not finite.
    """
    probes = to_device(_probes(matrices.shape[-1], matrices.dtype), matrices.device)
    probes = result = probes.expand(len(matrices), -1, -1) @ matrices
    for _ in range(order):
        result = result @ roots
    result = torch.baddbmm(per_block(eps, 3) * result, result / per_block(divisor, 3), matrices)
    error, norm = (torch.linalg.vector_norm(rows, 1, (1, 2)) for rows in (result - probes, probes))
    relative: Tensor = error / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return relative


@functools.cache
def _probes(n: int, dtype: torch.dtype) -> Tensor:
    """Two vectors of n numbers, [2, n], on the CPU."""
    k = torch.arange(n, dtype=torch.float64, device="cpu")
    phases = torch.stack((k * (0.618 * k + 1.0), k * (0.414 * k + 1.0)))
    # Rows: on CPUs a batch of row times matrix is several times as fast as of matrix times column.
    return phases.cos().to(dtype)


def _ratio(exponent: float) -> tuple[int, int] | None:
    """m and p of an exponent -m/p, if there are any."""
    ratio = Fraction(-exponent).limit_denominator(_LARGEST_ORDER)
    if abs(float(ratio) + exponent) > 1e-6 * abs(exponent):
        return None
    return ratio.numerator, ratio.denominator


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
