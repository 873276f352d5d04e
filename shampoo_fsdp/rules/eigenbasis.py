"""Eigenvectors of stacks of symmetric positive semi-definite matrices: anew, or from old ones."""

import math

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from shampoo_fsdp.rules.matrices import Positions, per_block

TOLERANCE = 1e-6
"""`warm_eigenbasis` keeps a basis whose ||offdiag(Q^T A Q)||_F is at most this times ||A||_F."""

# Added to A for the QR step, relative to its largest eigenvalue. What is below is followed slowly;
# with less, rounding turns what A lacks (bases of two meshes, 3 to 12 rows of a batch, 48 runs of
# SOAP: the parameters differed by at most 0.3% with this, by 3% with 2^-20).
_SHIFT = 2.0**-16


def updated_basis(
    kept: Tensor,
    where: Positions,
    matrices: Tensor,
    anew: bool,
    iterations: int = 1,
    resolution: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [n, d] and eigenvectors [n, d, d] of these matrices, kept where that did not
    fail, and where it failed [n].

    Args:
        kept: eigenvectors of all blocks, [B, d, d].
        where: n positions in it.
        anew: by `eigenbasis`, else from the last ones.
        iterations: see `warm_eigenbasis`.
        resolution: see `complete_basis`; None leaves the basis as it is.
    """
    before = kept[where].float()
    if anew:
        eigenvalues, vectors = eigenbasis(matrices)
    else:
        eigenvalues, vectors = warm_eigenbasis(matrices, before, iterations)
    if resolution is not None:
        eigenvalues, vectors = complete_basis(matrices, eigenvalues, vectors, resolution)
    failed = (eigenvalues.sum(1) + vectors.sum((1, 2))).isfinite().logical_not_()
    # No second moment: its definiteness is lost.
    failed |= (eigenvalues.amax(1) <= 0.0) & (matrices != 0.0).any(2).any(1)
    vectors = torch.where(per_block(failed, 3), before, vectors)
    kept[where] = vectors.to(kept.dtype)
    return eigenvalues, vectors, failed


def eigenbasis(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of each matrix.

    Never raises for a bad matrix: a stack that fails is decomposed matrix by matrix, and a matrix
    that fails in fp64.

    Args:
        matrices: shape [B, n, n], symmetric.

    Returns:
        eigenvalues, ascending, shape [B, n], and eigenvectors in the columns of shape [B, n, n].
        Where the decomposition failed or the matrix was not finite the eigenvalues are NaN, and the
        eigenvectors mean nothing.
    """
    # (Sums of finite entries may overflow.)
    finite = matrices.abs().amax((-2, -1), keepdim=True).isfinite()
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    eigenvalues, vectors = _eigh(torch.where(finite, matrices, identity))
    return eigenvalues.masked_fill(finite[:, 0].logical_not(), torch.nan), vectors


def warm_eigenbasis(
    matrices: Tensor, vectors: Tensor, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """Improve eigenvectors of matrices that have changed a little, by orthogonal iteration.

    Q <- the orthogonal factor of A Q, signs such that the triangular one has a positive diagonal
    (Vyas et al. 2024, arXiv 2409.11321, algorithm 4). Iterated, it finds eigenvectors in the order
    of the columns, largest eigenvalue first: the columns are put in that order for a step and back
    at their places after it, so that what is kept in the basis stays aligned with it.

    Nothing is read back to the host.

    Args:
        matrices: shape [B, n, n], symmetric.
        vectors: shape [B, n, n], orthonormal columns: the eigenvectors so far.
        iterations: number of steps.

    Returns:
        diag(Q^T A Q), shape [B, n], in the order of the columns, and Q, shape [B, n, n]: a matrix's
        Q untouched where it is good already (`TOLERANCE`). The eigenvalues are NaN where A or the
        old Q is not finite.
    """
    matrices, scale = _scaled(matrices)
    for _ in range(iterations):
        vectors = _orthogonal_step(matrices, vectors)
    eigenvalues = (vectors * (matrices @ vectors)).sum(-2) * scale[:, 0]
    finite = eigenvalues.isfinite().all(-1).view(-1, 1, 1)  # each entry of A and Q is in one
    return eigenvalues.masked_fill(finite[:, 0].logical_not(), torch.nan), vectors


def complete_basis(
    matrices: Tensor, eigenvalues: Tensor, vectors: Tensor, resolution: float
) -> tuple[Tensor, Tensor]:
    """Let the eigenvectors that a matrix says nothing about follow from those that it determines.

    Rounding chooses the former. Here they are fixed vectors, made orthogonal to the latter, which
    take one more step of orthogonal iteration. Without any of the former, or of the latter, all
    stay as they are. Nothing is read back from another device.

    Args:
        matrices: shape [B, n, n], symmetric.
        eigenvalues: shape [B, n], in any order.
        vectors: shape [B, n, n], orthonormal columns in the same order.
        resolution: relative to the largest eigenvalue; up to here, eigenvalues count as zero.

    Returns:
        eigenvalues and eigenvectors, shapes and order as they were; eigenvalues that count as zero
        are.
    """
    n = vectors.shape[-1]
    least = resolution * eigenvalues.amax(-1, keepdim=True).clamp_min(0.0)
    unseen = eigenvalues <= least  # not where they are NaN
    partly = (unseen.any(-1) & unseen.all(-1).logical_not()).view(-1, 1, 1)
    if partly.device.type == "cpu" and True not in partly.flatten().tolist():  # nothing waits there
        return eigenvalues.masked_fill(unseen, 0.0), vectors
    order = eigenvalues.argsort(dim=-1, descending=True, stable=True)
    filled = torch.arange(n, device=vectors.device) - unseen.logical_not().sum(-1, keepdim=True)
    fixed = _fixed_vectors(n, vectors)[filled.clamp_min(0)].mT
    columns = order.unsqueeze(-2).expand_as(vectors)
    step = (_scaled(matrices)[0] @ vectors).gather(-1, columns)
    turned = _orthogonal_factor(torch.where(filled.unsqueeze(-2) >= 0, fixed, step))
    turned = torch.empty_like(vectors).scatter_(-1, columns, turned)
    return eigenvalues.masked_fill(unseen, 0.0), torch.where(partly, turned, vectors)


def _fixed_vectors(n: int, like: Tensor) -> Tensor:
    """The axes, shape [n, n], in rows, each with a little of all others (a cosine transform, by
    which no axis is lost that the eigenvectors of a matrix span already)."""
    odd = 2 * torch.arange(n, device=like.device) + 1
    cosines = torch.cos((odd.unsqueeze(1) * odd % (8 * n)).to(like.dtype) * (math.pi / (4 * n)))
    identity = torch.eye(n, dtype=like.dtype, device=like.device)
    return identity.add_(cosines, alpha=0.1 * math.sqrt(2 / n))


def _scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices over their largest entries, which are on the diagonal, and these, [B, 1, 1]."""
    # Squares must not overflow or vanish.
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1).view(-1, 1, 1)
    scale = torch.where((largest > 0.0) & largest.isfinite(), largest, 1.0)
    return matrices / scale, scale


def _orthogonal_factor(matrices: Tensor) -> Tensor:
    """Q of QR, the diagonal of R positive."""
    q: Tensor
    q, r = torch.linalg.qr(matrices)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0.0, -1.0, 1.0).unsqueeze(-2)
    return q.mul_(signs)


def _orthogonal_step(matrices: Tensor, q: Tensor) -> Tensor:
    product = matrices @ q
    diagonal = (q * product).sum(-2, keepdim=True)  # of Q^T A Q
    # ||A Q - Q diag(Q^T A Q)|| is ||offdiag(Q^T A Q)||, without another product.
    error = torch.linalg.matrix_norm(torch.addcmul(product, q, diagonal, value=-1), keepdim=True)
    good = error <= TOLERANCE * torch.linalg.matrix_norm(matrices, keepdim=True)
    # The shift leaves the eigenvectors alone. Without it, directions that A lacks would be turned
    # anew at each step, by rounding.
    shift = _SHIFT * diagonal.amax(-1, keepdim=True).clamp_min(0.0)
    order = diagonal.argsort(dim=-1, descending=True, stable=True).expand_as(q)
    turned = _orthogonal_factor(product.addcmul_(q, shift).gather(-1, order))
    turned = torch.empty_like(q).scatter_(-1, order, turned)
    return torch.where(good, q, turned)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrices)
    except LinAlgError:
        if len(matrices) > 1:
            pairs = [_eigh(matrix.unsqueeze(0)) for matrix in matrices]
            return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        if matrices.dtype == torch.float64:
            return torch.full_like(matrices[:, 0], torch.nan), matrices
        eigenvalues, vectors = (found.to(matrices.dtype) for found in _eigh(matrices.double()))
    return eigenvalues, vectors
