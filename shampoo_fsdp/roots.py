"""Inverse roots of stacks of symmetric positive semi-definite matrices."""

import functools
from fractions import Fraction

import torch
from torch import Tensor

from shampoo_fsdp.eigenbasis import eigenbasis
from shampoo_fsdp.matrices import per_block

__all__ = [
    "ROOT_METHODS",
    "check_exponent",
    "inverse_root",
    "inverse_root_from_basis",
    "root_residual",
]

ROOT_METHODS = ("eigh", "eigh_pseudo_inverse", "coupled_newton", "newton_db")

_LARGEST_ORDER = 16

# A step of the matrix iterations treats eigenvalues below this, relative to the largest, as if they
# were this. A longer step all but annihilates the largest ones, and what rounding then makes of
# them stays; more so in `_coupled_newton`, whose M is never formed anew.
_SHORTEST_NEWTON, _SHORTEST_DB = 0.1, 0.02

# The ridge of the matrix iterations relative to ||A||_F, and the least eigenvalue with it, in units
# of the resolution. A sum of a thousand gradients that all lack the same directions has eigenvalues
# down to -5 there, from rounding; a negative one makes the iterations diverge.
_RIDGE, _LEAST = 8.0, 2.0

# The last multiplier of a matrix iteration is the identity, to rounding (1e-2 at worst, for
# matrices that lack rank), or the iteration has diverged.
_CONVERGED = 0.1


def inverse_root(
    matrices: Tensor,
    exponent: float,
    eps: float | Tensor,
    method: str,
    resolution: float = 0.0,
    divisor: float | Tensor = 1.0,
) -> Tensor:
    """(A / divisor + eps I)^exponent of each matrix A, computed in the dtype of A.

    What lies below the resolution r of the dtype (2^-23 in fp32), or `resolution` if that is more,
    is rounding, negative or not, and differs from mesh to mesh; no method lets its inverse root
    count:

    - "eigh", by eigenvalues and eigenvectors (Shi et al. 2023, arXiv 2309.06497, section 3.2.1):
      before the ridge eps is added, eigenvalues are raised to r times the largest.
    - "eigh_pseudo_inverse": the same, but eigenvalues of at most n r times the largest, the usual
      bound below which a matrix has no rank (torch.linalg.matrix_rank), contribute nothing.
    - "coupled_newton" (Guo & Higham 2006, equation 1.5; Anil et al. 2020, arXiv 2002.09018) and
      "newton_db" (coupled Newton-Schulz, Higham 2008, equation 6.35): by matrix products alone. The
      ridge is max(eps, 8 r ||A||_F), as these need a definite matrix. The number of products
      depends on the dtype and the exponent alone, and nothing is read back to the host.

    Args:
        matrices: fp32 or fp64, shape [B, n, n], symmetric.
        exponent: negative; see `check_exponent`.
        eps: the ridge; a number or [B].
        method: one of `ROOT_METHODS`.
        resolution: of A's entries, relative to the largest eigenvalue.
        divisor: of A; a number or [B]. Eigenvalues are divided where there are any, which is less
            work than dividing the matrices.

    Returns:
        shape [B, n, n]; all NaN where the method failed or the matrix was not finite.

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
        return inverse_root_from_basis(eigenvalues, vectors, exponent, eps, resolution, pseudo)
    if isinstance(divisor, Tensor) or divisor != 1.0:
        matrices = matrices / per_block(divisor, 3)
    iteration = _coupled_newton if method == "coupled_newton" else _newton_db
    power, order = _power_and_order(exponent)
    if method == "newton_db" and order == 1:
        power, order = 2 * power, 2
    normalised, scale = _normalised(matrices, eps, resolution)
    root, last = iteration(normalised, order)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    converged = (last - identity).abs().amax((-2, -1), keepdim=True) < _CONVERGED  # not for NaN
    # Rounding turns the iterates away from symmetry as much as from the root.
    root = (root + root.mT) * (0.5 * scale ** (-1.0 / order))
    return torch.where(converged, torch.linalg.matrix_power(root, power), torch.nan)


def inverse_root_from_basis(
    eigenvalues: Tensor,
    vectors: Tensor,
    exponent: float,
    eps: float | Tensor,
    resolution: float = 0.0,
    pseudo: bool = False,
) -> Tensor:
    """(A + eps I)^exponent from eigenvalues and eigenvectors of A, floored as in `inverse_root`.

    Args:
        eigenvalues: shape [B, n], in any order.
        vectors: shape [B, n, n], in the columns.
        exponent: negative.
        eps: the ridge; a number or [B].
        resolution: as in `inverse_root`.
        pseudo: whether directions that A lacks contribute nothing.

    Returns:
        shape [B, n, n].
    """
    resolution = max(resolution, torch.finfo(eigenvalues.dtype).eps)
    largest = eigenvalues.amax(-1, keepdim=True).clamp_min(0.0)
    floored = torch.maximum(eigenvalues, largest * resolution)
    powers = floored.add_(per_block(eps, 2)).pow_(exponent)
    if pseudo:
        missing = eigenvalues <= largest * (resolution * eigenvalues.shape[-1])
        powers = powers.masked_fill(missing, 0.0)
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT


def check_exponent(method: str, exponent: float) -> None:
    """Raise ValueError if the method cannot take this root.

    "coupled_newton" takes exponents -m/p, p up to 16; "newton_db" these with p = 1, 2, 4, 8, 16;
    eigenvectors give any.
    """
    if not exponent < 0.0:
        raise ValueError(f"an inverse root has a negative exponent, not {exponent}")
    if method not in ("coupled_newton", "newton_db"):
        return
    ratio = _ratio(exponent)
    orders = "1, 2, 4, 8 or 16" if method == "newton_db" else f"1 to {_LARGEST_ORDER}"
    halving = ratio is not None and ratio[1] & (ratio[1] - 1) == 0
    if ratio is None or (method == "newton_db" and not halving):
        raise ValueError(
            f'root_method = "{method}" takes roots with exponents -m/p, p = {orders}, and a factor '
            f'needs the exponent {exponent:g}: set root_method = "eigh", or other root_exponents'
        )


def root_residual(
    matrices: Tensor,
    roots: Tensor,
    exponent: float,
    eps: float | Tensor,
    divisor: float | Tensor = 1.0,
) -> Tensor:
    """||((A + eps I)^m X^p - I) v|| / ||v|| of X, which should be (A + eps I)^(-m/p).

    v = A^m u for two fixed vectors u: what A lacks, where X is what a method makes of rounding,
    does not count. It costs p + 2 m products of a matrix with two vectors, no random numbers and no
    host read.

    Args:
        matrices, roots: A * divisor and X, symmetric, shape [B, n, n].
        exponent, eps, divisor: as for `inverse_root`.

    Returns:
        shape [B]; 0 where A = 0, NaN where X is not finite, and all 0 for an exponent that is not
        -m/p with p up to 16.
    """
    ratio = _ratio(exponent)
    if ratio is None:
        return matrices.new_zeros(len(matrices))
    power, order = ratio
    k = torch.arange(matrices.shape[-1], dtype=torch.float64, device=matrices.device)
    phases = torch.stack((k * (0.618 * k + 1.0), k * (0.414 * k + 1.0)))
    # Rows: on CPUs a batch of row times matrix is several times as fast as of matrix times column.
    probes = phases.cos().to(matrices.dtype)
    for _ in range(power):
        probes = probes @ matrices  # [B, 2, n]
        largest = probes.abs().amax((-2, -1), keepdim=True)
        probes = probes / torch.where(largest > 0.0, largest, 1.0)  # squares must not overflow
    result = probes
    for _ in range(order):
        result = result @ roots
    for _ in range(power):
        result = result @ matrices / per_block(divisor, 3) + per_block(eps, 3) * result
    error: Tensor = torch.linalg.matrix_norm(result - probes)
    norm = torch.linalg.matrix_norm(probes)
    return error / torch.where(norm > 0.0, norm, 1.0)


def _ratio(exponent: float) -> tuple[int, int] | None:
    """m and p of an exponent -m/p, if there are any."""
    ratio = Fraction(-exponent).limit_denominator(_LARGEST_ORDER)
    if abs(float(ratio) + exponent) > 1e-6 * abs(exponent):
        return None
    return ratio.numerator, ratio.denominator


def _power_and_order(exponent: float) -> tuple[int, int]:
    ratio = _ratio(exponent)
    assert ratio is not None  # check_exponent
    return ratio


def _normalised(matrices: Tensor, eps: float | Tensor, resolution: float) -> tuple[Tensor, Tensor]:
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


def _coupled_newton(matrix: Tensor, order: int) -> tuple[Tensor, Tensor]:
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


def _newton_db(matrix: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """As `_coupled_newton`, by inverse square roots of square roots.

    Y <- A, Z <- I, then T = s^(1/2) (3 I - s Z Y) / 2, Y <- Y T, Z <- T Z: Y becomes the square
    root, Z its inverse. For p > 2 it takes more products than `_coupled_newton`.
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
