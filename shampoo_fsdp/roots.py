"""Inverse roots of stacks of symmetric positive semi-definite matrices."""

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

__all__ = ["inverse_root_eigh"]


def inverse_root_eigh(matrices: Tensor, exponent: float, eps: float) -> Tensor:
    """(A + eps I)^exponent of each matrix A, by its eigendecomposition.

    Shi et al. 2023 (arXiv 2309.06497), section 3.2.1. Before the ridge is added, eigenvalues are
    raised to the largest one times the resolution of fp32: what is below is rounding, negative or
    not, differs from mesh to mesh, and its inverse root would make it count.

    Never raises for a bad matrix: a stack that fails is decomposed again in fp64, then matrix by
    matrix.

    Args:
        matrices: fp32, shape [B, n, n], symmetric.
        exponent: negative.
        eps: the ridge.

    Returns:
        shape [B, n, n]; all NaN where the decomposition failed or the matrix was not finite.
    """
    finite = matrices.sum((1, 2)).isfinite().view(-1, 1, 1)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    eigenvalues, vectors = _eigh(torch.where(finite, matrices, identity))
    floor = eigenvalues[:, -1:].clamp_min(0.0) * torch.finfo(matrices.dtype).eps
    powers = torch.maximum(eigenvalues, floor).add_(eps).pow_(exponent)
    roots = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return torch.where(finite, roots, torch.nan)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return _symmetric_eigh(matrices)
    except LinAlgError:
        pass
    try:
        eigenvalues, vectors = _symmetric_eigh(matrices.double())
        return eigenvalues.to(matrices.dtype), vectors.to(matrices.dtype)
    except LinAlgError:
        if len(matrices) == 1:
            return torch.full_like(matrices[:, 0], torch.nan), torch.full_like(matrices, torch.nan)
    pairs = [_eigh(matrix.unsqueeze(0)) for matrix in matrices]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def _symmetric_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(matrices)
    return eigenvalues, vectors
