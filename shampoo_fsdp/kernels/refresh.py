"""What a refresh needs beside products: of the first polynomial of an inverse root, and to keep
roots in the place of the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shampoo_fsdp.kernels.language import can_run, launch, number, of_block, size_of

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["keep", "parts", "two_sums"]

_CHUNK = 2048
"""Entries that a program of `two_sums` has."""
_KEPT_CHUNK = 4096
"""And one of `keep`."""

# A^2, which gives the norm, is rounded, and eigenvalues must not be above it.
_SLACK = 1e-3


def line(
    squares: Tensor, unit: Tensor, ridge: Tensor, divisor: float | Tensor, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a polynomial of t = slope A + offset I needs to know, by one launch; [B] each.

    Args:
        squares: those of the entries of A^2, [B, parts].
        unit, divisor: the matrix of which the root is wanted is unit / divisor (A + ridge I).
        ridge: [B], as unit.

    Returns:
        slope = 1 / scale and offset = ridge / scale, scale being the root of A^2's norm and the
        ridge, and (scale unit / divisor)^(-1 / order).
    """
    if not can_run(squares, unit, ridge):
        return line_reference(squares, unit, ridge, divisor, order)
    results = torch.empty(3, len(unit), device=unit.device)
    count, pieces = squares.shape
    numbers = number(divisor, count), _SLACK, -1.0 / order
    given = squares, unit, ridge, *numbers, results, count, pieces
    most = 1 << (pieces - 1).bit_length()  # the next power of 2
    launch(_line, (count,), given, size_of(squares, unit, ridge, results), MOST=most)
    slope, offset, power = results
    return slope, offset, power


def line_reference(
    squares: Tensor, unit: Tensor, ridge: Tensor, divisor: float | Tensor, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch."""
    scale = torch.add(ridge, squares.sum(1).pow_(0.25), alpha=1.0 + _SLACK)
    return scale.reciprocal(), ridge / scale, (scale * unit / divisor) ** (-1.0 / order)


def two_sums(
    square: Tensor, matrices: Tensor, slope: Tensor, offset: Tensor, numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """a nu^2 + nu + b I and nu^2 + c I of nu = (slope A + (offset - middle) I) / half and A^2, in
    one pass with 16 bytes per entry in fp32, for 9 FLOPs; in plain PyTorch 40.

    Args:
        square, matrices: A^2 and A, [B, n, n]; the second result lies where A^2 does.
        slope, offset: [B].
        numbers: middle, half, a, b and c.
    """
    count, n, _ = square.shape
    dense = square.is_contiguous() and matrices.is_contiguous()
    if not square.numel() or n > 32768 or not dense or not can_run(square, matrices):
        return two_sums_reference(square, matrices, slope, offset, numbers)
    inner = torch.empty_like(square)
    arguments = square, matrices, inner, slope, offset, *numbers, n
    moved = size_of(square, matrices, inner, square)
    launch(_two_sums, (-(-n * n // _CHUNK), count), arguments, moved, CHUNK=_CHUNK)
    return inner, square


def two_sums_reference(
    square: Tensor, matrices: Tensor, slope: Tensor, offset: Tensor, numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    middle, half, a, b, c = numbers
    x, y = (values.view(-1, 1, 1) for values in (slope / half, (offset - middle) / half))
    squared = square.mul_(x.square()).addcmul_(matrices, x * y, value=2.0)
    squared.diagonal(dim1=1, dim2=2).add_(y[:, 0].square())
    inner = torch.add(matrices * x, squared, alpha=a)
    inner.diagonal(dim1=1, dim2=2).add_(y[:, 0] + b)
    squared.diagonal(dim1=1, dim2=2).add_(c)
    return inner, squared


def keep(new: Tensor, kept: Tensor, bad: Tensor, changes: Tensor) -> None:
    """kept <- new where that is not bad; changes <- ||new - kept||^2 and ||kept||^2.

    For fp32 matrices that are kept in bf16 it reads 6 and writes 2 bytes per entry; in plain
    PyTorch these are 28.

    Args:
        new, kept: [B, n, n]; each matrix dense.
        bad: [B], bool.
        changes: of the parts of a matrix, see :func:`parts`, in fp32 [B, parts, 2].
    """
    tensors = new, kept, changes
    dense = all(t[0].is_contiguous() for t in (new, kept)) and changes.is_contiguous()
    if not dense or not can_run(*tensors):
        return keep_reference(*tensors[:2], bad, changes)
    count, n, _ = new.shape
    arguments = new, kept, bad, changes, new.stride(0), kept.stride(0), n * n
    launch(_keep, (parts(n), count), arguments, size_of(*tensors, kept), CHUNK=_KEPT_CHUNK)


def keep_reference(new: Tensor, kept: Tensor, bad: Tensor, changes: Tensor) -> None:
    """The same in plain PyTorch, with all parts in the first."""
    new = torch.where(bad.view(-1, 1, 1), kept, new.to(kept.dtype))
    pair = new - kept, new
    norms = [torch.linalg.vector_norm(m, 2, (1, 2), dtype=torch.float32) for m in pair]
    changes.zero_()[:, 0] = torch.stack(norms, 1).square_()
    kept.copy_(new)


def parts(n: int) -> int:
    """Of a matrix of n x n."""
    return -(-n * n // _KEPT_CHUNK)


def _line(
    squares, unit, ridge, divisor, slack, exponent, results, count, parts, MOST: tl.constexpr
):
    """Grid: blocks."""
    block = tl.program_id(0)
    part = tl.arange(0, MOST)
    total = tl.sum(tl.load(squares + block * parts + part, mask=part < parts, other=0.0))
    offset = tl.load(ridge + block)
    scale = tl.sqrt(tl.sqrt(total)) * (1.0 + slack) + offset
    whole = scale * tl.load(unit + block) / of_block(divisor, block)
    tl.store(results + block, 1.0 / scale)
    tl.store(results + count + block, offset / scale)
    tl.store(results + 2 * count + block, tl.exp2(tl.log2(whole) * exponent))


def _two_sums(
    square, matrices, inner, slope, offset, middle, half, a, b, c, n, CHUNK: tl.constexpr
):
    """Grid: programs of a matrix, blocks."""
    block = tl.program_id(1)
    x = tl.load(slope + block) / half
    y = (tl.load(offset + block) - middle) / half
    within = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = within < n * n
    diagonal = (within // n == within % n).to(tl.float32)
    at = block.to(tl.int64) * n * n + within
    nu = tl.load(matrices + at, mask=inside, other=0.0) * x
    squared = tl.load(square + at, mask=inside, other=0.0) * (x * x) + nu * (2.0 * y)
    squared += diagonal * (y * y)
    tl.store(inner + at, a * squared + nu + diagonal * (y + b), mask=inside)
    tl.store(square + at, squared + diagonal * c, mask=inside)


def _keep(new, kept, bad, changes, stride, kept_stride, size, CHUNK: tl.constexpr):
    """Grid: programs of a matrix, blocks."""
    block = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = within < size
    good = tl.load(bad + block) == 0
    old = tl.load(kept + block * kept_stride + within, mask=inside, other=0.0)
    root = tl.load(new + block * stride + within, mask=inside & good, other=0.0)
    root = tl.where(good, root.to(kept.dtype.element_ty), old)
    tl.store(kept + block * kept_stride + within, root, mask=inside & good)
    root, change = root.to(tl.float32), root.to(tl.float32) - old.to(tl.float32)
    at = changes + (block * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(at, tl.sum(change * change, 0))
    tl.store(at + 1, tl.sum(root * root, 0))
