"""Eigenvalues, inverse roots and products along dimensions, in fp64."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.polynomials import chains

LARGEST_GRADIENT = 1e15
"""The optimizer leaves out larger entries, whose squares could leave the range of fp32."""
FLOORS = {"float32": 2.0**-23, "bfloat16": 2.0**-12}
"""Of eigenvalues, relative to the largest, by the type in which the optimizer keeps the factor."""
QR_TOLERANCE = 1e-6
"""A basis is kept if what it leaves off the diagonal is at most this fraction of the matrix."""
QR_SHIFT = 2.0**-16
"""Of the largest eigenvalue; added to all of them for the QR step."""
_noise: torch.Generator | None = None


def kept_in(dtype: str, tensor: Tensor) -> Tensor:
    """What remains of a tensor between steps. "float32" leaves it exact, except within
    :func:`rounded`. "bfloat16" does matter, and is no error."""
    if dtype == "bfloat16":
        return tensor.to(torch.bfloat16).double()
    if _noise is None:
        return tensor
    noise = torch.randn(tensor.shape, generator=_noise, dtype=tensor.dtype)
    return tensor + 2.0**-24 * tensor.abs().max() * noise


@contextmanager
def rounded(seed: int) -> Iterator[None]:
    """Let what is kept in "float32" be rounded: noise of 2^-24 of the largest entry.

    How far results move by it is as exact as fp32 can be, whatever computes them: it is the unit of
    rounding times the condition of the whole computation.
    """
    global _noise
    _noise = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _noise = None


def along(tensor: Tensor, matrix: Tensor, d: int) -> Tensor:
    """The mode product: multiply dimension d of the tensor with a matrix, from the left."""
    # tensordot puts the new dimension last.
    return torch.tensordot(tensor, matrix, dims=([d], [1])).movedim(-1, d)


def precondition(tensor: Tensor, roots: list[Tensor | None]) -> Tensor:
    """Multiply each dimension of the tensor with its root (Gupta et al. 2018, Algorithm 2).

    For a matrix: roots[0] @ tensor @ roots[1]. Vectors stand for diagonal matrices, None for the
    identity.
    """
    for d, root in enumerate(roots):
        if root is not None:
            tensor = along(tensor, torch.diag(root) if root.ndim == 1 else root, d)
    return tensor


def gram(tensor: Tensor, d: int) -> Tensor:
    """Contract the tensor with itself over all dimensions but d; for a matrix G Gᵀ, then Gᵀ G."""
    unfolded = tensor.movedim(d, 0).reshape(tensor.shape[d], -1)
    return unfolded @ unfolded.T


def raised(eigenvalues: Tensor, ridge: float, dtype: str = "float32", least: float = 0.0) -> Tensor:
    """Eigenvalues as their powers are taken.

    They are raised to the largest one times what the type resolves in which the optimizer keeps
    its factors: it cannot know what is below. `least` may ask for more. Then the ridge is added.
    """
    floor = eigenvalues.max().clamp(min=0) * max(FLOORS[dtype], least)
    return eigenvalues.clamp(min=floor) + ridge


def inverse_root(
    factor: Tensor, exponent: float, ridge: float, *, dtype: str, pseudo: bool, least: float
) -> Tensor:
    """(factor + ridge I)^(-exponent), eigenvalues raised before as by :func:`raised`.

    Args:
        factor: symmetric, [n, n]; or its diagonal, [n].
        exponent: 1/(2k) for a tensor with k factors (Gupta et al. 2018, Algorithm 2), so that it
            is 1/4 for matrices (Algorithm 1).
        ridge: preconditioner_eps.
        dtype: in which a matrix is kept; diagonals are fp32.
        pseudo: what lies in the null space, as far as the type resolves it, is sent to zero
            instead: all eigenvalues up to n times the floor.
        least: see :func:`raised`.
    """
    if factor.ndim == 1:
        return raised(factor, ridge, least=least) ** -exponent
    eigenvalues, eigenvectors = torch.linalg.eigh(factor)
    powers = raised(eigenvalues, ridge, dtype, least) ** -exponent
    if pseudo:
        cutoff = eigenvalues.max().clamp(min=0) * FLOORS[dtype] * len(factor)
        powers = torch.where(eigenvalues > cutoff, powers, 0.0)
    return eigenvectors @ torch.diag(powers) @ eigenvectors.T


def polynomial_root(factor: Tensor, order: int, ridge: float) -> Tensor:
    """About (factor + ridge I)^(-1/order), an order of 2 or 4, by the optimizer's polynomials,
    which are applied to eigenvalues here. They leave an error, that is no rounding, of 25% in
    factor X^order."""
    eigenvalues, eigenvectors = torch.linalg.eigh(factor)
    # The fourth root of the sum of the fourth powers is above the largest by little.
    scale = 1.001 * eigenvalues.pow(4).sum() ** 0.25 + ridge
    values = (eigenvalues + ridge) / scale
    if order == 2:
        inverse = _composed("_SQUARE_ROOT", values)
    else:
        above = 1.0 + chains()["_FIRST_OF_TWO"][1]
        roots = values * _composed("_FIRST_OF_TWO", values) / above
        inverse = above**-0.5 * _composed("_SECOND_OF_TWO", roots)
    powers = inverse * scale ** (-1.0 / order)
    return eigenvectors @ torch.diag(powers) @ eigenvectors.T


def _composed(name: str, values: Tensor) -> Tensor:
    """What a chain of polynomials makes of eigenvalues: about their inverse square root."""
    inverse = torch.ones_like(values)
    for coefficients, middle, half in chains()[name][0]:
        nu = (values * inverse**2 - middle) / half
        inverse = inverse * sum(c * nu**k for k, c in enumerate(coefficients))
    return inverse


def complete_basis(matrix: Tensor, basis: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues, those up to `least` of the largest as zeros, and eigenvectors. Those of the
    zeros are axes, each with a little of all the others, orthogonal to the rest one by one."""
    values = (basis.T @ matrix @ basis).diag()
    unseen = values <= least * values.max().clamp(min=0)
    values = torch.where(unseen, 0.0, values)
    if unseen.all() or not unseen.any():
        return values, basis
    n = len(matrix)
    half = torch.arange(n, dtype=torch.float64) + 0.5
    fixed = torch.eye(n).double() + 0.1 * (2 / n) ** 0.5 * torch.cos(
        torch.outer(half, half) * torch.pi / n
    )
    completed = basis.clone()
    seen = values.argsort(descending=True)[: int((~unseen).sum())]
    span, r = torch.linalg.qr(matrix @ basis[:, seen])
    completed[:, seen] = span = span * torch.where(r.diag() < 0, -1.0, 1.0)
    for place, vector in zip(unseen.nonzero().flatten(), fixed, strict=False):
        for _ in range(2):  # twice is enough
            vector = vector - span @ (span.T @ vector)
        completed[:, place] = vector / vector.norm()
        span = torch.cat([span, completed[:, place, None]], dim=1)
    return values, completed


def warm_qr_step(matrix: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration from an old basis (Vyas et al. 2024, Algorithm 4).

    It converges to eigenvectors in the order of the columns, the largest eigenvalue first, and away
    from them in any other order. So columns take this order for the step, by their Rayleigh
    quotients, and their own places again after it, where the second moments of SOAP are. Columns
    keep their signs, by a positive diagonal of R. A basis that is good enough is kept. The shift
    by QR_SHIFT keeps what the matrix lacks in place; eigenvectors are the same with it.
    """
    rotated = basis.T @ matrix @ basis
    off_diagonal = rotated - torch.diag(rotated.diag())
    if torch.linalg.matrix_norm(off_diagonal) <= QR_TOLERANCE * torch.linalg.matrix_norm(matrix):
        return basis
    order = rotated.diag().argsort(descending=True)
    shift = QR_SHIFT * rotated.diag().max().clamp(min=0)
    q, r = torch.linalg.qr((matrix @ basis + shift * basis)[:, order])
    turned = torch.empty_like(basis)
    turned[:, order] = q * torch.where(r.diag() < 0, -1.0, 1.0)
    return turned
