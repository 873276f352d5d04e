"""Which sides of a block have a matrix; how stacks of matrices are kept and multiply blocks."""

import functools
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig

__all__ = [
    "FactorKind",
    "Positions",
    "condition_number",
    "factor_kinds",
    "resolution_of",
    "sides_without_factor",
    "torch_dtype",
    "unpacked",
]

_T = TypeVar("_T", Tensor, float | Tensor)

Positions = slice | Tensor
"""Some blocks of a stack."""

StateEntry = tuple[tuple[int, ...], torch.dtype]
"""Shape for one block and type of an entry of the state."""

FactorKind = Literal["full", "diagonal", "none"]


def factor_kinds(shape: Sequence[int], config: ShampooConfig) -> tuple[FactorKind, ...]:
    """For each dimension of a block what factor it has; see `large_dim` and `max_factor_ratio`."""
    large: FactorKind = "diagonal" if config.large_dim == "diagonal" else "none"
    # Vectors have a factor only where precondition_1d asks for it.
    most = config.max_factor_ratio * math.prod(shape)
    vector = config.precondition_1d and not is_matrix(shape)
    kept = {n for n in shape if vector or n == min(shape) or n * n <= most}
    return tuple(
        large if n > config.max_preconditioner_dim else "full" if n in kept else "none"
        for n in shape
    )


def sides_without_factor(shape: Sequence[int], config: ShampooConfig) -> list[int]:
    """Lengths of the dimensions of a block that have no factor at all."""
    kinds = factor_kinds(shape, config)
    return [n for n, kind in zip(shape, kinds, strict=True) if kind == "none"]


def is_matrix(sizes: Sequence[int]) -> bool:
    """Whether two or more dimensions are longer than one: otherwise there is one row or column."""
    return sum(n > 1 for n in sizes) > 1


def resolution_of(dtype: torch.dtype) -> float:
    """Eigenvalues of a factor that are kept in this type are rounding below this, relative to the
    largest."""
    # Rounding of bf16 entries, 2^-9 of each, adds up to less in the eigenvalues of a matrix:
    # measured, spectra are right down to about 2^-12 of the largest.
    return 2.0**-12 if dtype == torch.bfloat16 else torch.finfo(torch.float32).eps


def condition_number(largest: Tensor, smallest: Tensor, resolution: float) -> Tensor:
    """The largest eigenvalue of factors by the smallest, which counts as at least `resolution` of
    the largest, as it does when roots are taken; NaN where all are zero."""
    return largest / torch.maximum(smallest, largest * resolution)


def torch_dtype(name: str) -> torch.dtype:
    """The type that a setting names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def matrix_entries(i: int, n: int, config: ShampooConfig, *kinds: str) -> dict[str, StateEntry]:
    """How n x n matrices of each kind are kept for dimension i. `symmetric_packing` keeps the upper
    triangles, but not of eigenvectors, which are no symmetric matrices."""
    entries: dict[str, StateEntry] = {}
    for kind in kinds:
        dtype = config.factor_dtype if kind == "factors" else config.root_dtype or "float32"
        packed = config.symmetric_packing and kind != "eigenvectors"
        shape = (n * (n + 1) // 2,) if packed else (n, n)
        entries[f"{kind}_{i}"] = shape, torch_dtype(dtype)
    return entries


class MatrixStack:
    """Matrices [B, n, n] that are kept in `storage`, see :func:`matrix_entries`."""

    def __init__(self, storage: Tensor) -> None:
        self.storage = storage
        self._packed = storage.ndim == 2
        self.size = (
            (math.isqrt(8 * storage.shape[1] + 1) - 1) // 2 if self._packed else storage.shape[1]
        )

    def read(self, where: Positions = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrices at these positions; of a slice their own memory, if they are kept as they
        are."""
        kept = self.storage[where].to(dtype)
        return unpacked(kept, self.size) if self._packed else kept

    def keep(self, matrices: Tensor, where: Positions = slice(None)) -> None:
        """Keep the change of what :meth:`read` gave of these positions."""
        copied = self._packed or self.storage.dtype != matrices.dtype or isinstance(where, Tensor)
        if copied:
            self.write(matrices, where)

    def write(self, matrices: Tensor, where: Positions = slice(None)) -> None:
        """Keep these matrices."""
        if self._packed:
            pack, _ = _triangle(self.size, matrices.device)
            self.storage[where] = matrices.flatten(1).index_select(1, pack).to(self.storage.dtype)
        else:
            self.storage[where] = matrices.to(self.storage.dtype)

    def write_identity(self, where: Positions = slice(None)) -> None:
        """Keep the identity at these positions."""
        n = self.size
        identity = torch.eye(n, dtype=torch.float32, device=self.storage.device)
        self.write(identity.expand(len(self.storage[where]), n, n), where)


def unpacked(triangles: Tensor, n: int) -> Tensor:
    """Upper triangles [B, n (n + 1) / 2] as symmetric matrices [B, n, n]."""
    _, unpack = _triangle(n, triangles.device)
    return triangles.index_select(1, unpack).view(-1, n, n)


@functools.cache
def _triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries of the upper triangle are in a flat matrix, and of a matrix in it."""
    rows, columns = torch.triu_indices(n, n, device=device)
    pack = rows * n + columns
    unpack = torch.empty(n, n, dtype=torch.int64, device=device)
    unpack[rows, columns] = unpack[columns, rows] = torch.arange(len(pack), device=device)
    return pack.int(), unpack.flatten().int()


def mean_eigenvalue(factors: Tensor) -> Tensor:
    """Of factors [B, d, d], or [B, d] if they are diagonals; [B]."""
    diagonal = factors if factors.ndim == 2 else factors.diagonal(dim1=1, dim2=2)
    return diagonal.mean(1)


def per_block(values: _T, ndim: int) -> _T:
    """A number as it is, or numbers [B] as [B, 1, ...] of this many dimensions."""
    return values.view(-1, *(1,) * (ndim - 1)) if isinstance(values, Tensor) else values


def scale_along(blocks: Tensor, factors: Tensor, i: int) -> Tensor:
    """Multiply blocks [B, d_1, ..., d_k] by factors [B, d_i] along dimension i."""
    ones = [1] * (blocks.ndim - 1)
    ones[i] = factors.shape[1]
    return blocks * factors.view(len(factors), *ones)


def unfold(blocks: Tensor, i: int) -> Tensor:
    """[B, d_1, ..., d_k] -> [B, d_i, rest]; for matrices a view."""
    return blocks.movedim(i + 1, 1).reshape(len(blocks), blocks.shape[i + 1], -1)


def along(
    blocks: Tensor, matrices: Tensor, i: int, *, symmetric: bool = False, out: Tensor | None = None
) -> Tensor:
    """Multiply blocks [B, d_1, ..., d_k] by matrices [B, e, d_i] along dimension i.

    Args:
        symmetric: whether the matrices are: as they lie in the state, CPUs would have to copy them
            to transpose them.
        out: memory of the blocks' shape and type that the result along the first dimension may use.
    """
    shape = (*blocks.shape[: i + 1], matrices.shape[1], *blocks.shape[i + 2 :])
    if i == blocks.ndim - 2:
        flat = blocks.reshape(len(blocks), -1, blocks.shape[-1])
        return torch.bmm(flat, matrices if symmetric else matrices.mT).view(shape)
    rest = [n for d, n in enumerate(shape[1:]) if d != i]
    memory = None if out is None or i else unfold(out, 0)
    unfolded = torch.bmm(matrices, unfold(blocks, i), out=memory)
    return unfolded.view(shape[0], shape[i + 1], *rest).movedim(1, i + 1)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on this device. From memory that is not pinned an accelerator would
    copy at once, and the host wait for all that it still has to do."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def on_device(
    values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of values of the host."""
    return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)


def largest_entries(rows: Tensor) -> Tensor:
    """The size of the largest entry of each row, NaN if one is; in one pass where memory is what
    takes the time. (On CPUs PyTorch's is 16 times slower than two.)"""
    on_cpu = rows.device.type == "cpu"
    least, largest = (rows.amin(1), rows.amax(1)) if on_cpu else rows.aminmax(dim=1)
    return torch.maximum(largest, -least)


def blank(gradient: Tensor, usable: Tensor) -> None:
    """Set to zero, in place, the blocks where this is 0 and not 1; in one pass but on CPUs, where
    that one is 5 times slower."""
    if gradient.device.type == "cpu":
        gradient.nan_to_num_().mul_(usable)
    else:
        gradient.masked_fill_(usable == 0.0, 0.0)
