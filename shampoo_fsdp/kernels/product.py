"""Products of stacked square matrices, with the sums of a polynomial on the way out.

What the steps of an inverse root by polynomials consist of: with nu = a A + b I, nu^2 = product(A)
once the norm of A^2 has told a and b, and q(nu) = product(c2 + nu + c4 nu^2, nu^2) + c1 nu + c0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shampoo_fsdp.kernels.language import (
    Cost,
    can_run,
    describable,
    described,
    interpreted,
    large_tiles,
    launch,
    number,
    of_block,
    size_of,
    triangle,
)

if TYPE_CHECKING:
    import triton.language as tl

__all__ = [
    "Sum",
    "product",
    "product_reference",
    "product_tiles",
    "two_sums",
    "two_sums_reference",
]

_CHUNK = 2048
"""Entries that a program of `two_sums` has."""


class Sum(NamedTuple):
    """alpha P + beta C + gamma I; numbers, or [1] or [B] on the device."""

    out: Tensor
    """Where it is written, [B, n, n], in any type."""
    alpha: float | Tensor = 1.0
    beta: float | Tensor = 0.0
    gamma: float | Tensor = 0.0


def product(
    a: Tensor,
    b: Tensor,
    first: Sum,
    second: Sum | None = None,
    c: Tensor | None = None,
    *,
    symmetric: bool = False,
    norms: bool = False,
) -> Tensor | None:
    """One or two sums of P = A B, C and I, in fp32 until they are written.

    Matrices in fp32 are split in the kernel, A = h + l with h in bf16, for three products in 16
    bits, h h^T last; those in 16 bits are multiplied as they are.

    Per entry it reads the size of A, B and C and writes that of the sums, for 2 n FLOPs (6 n if
    split, half of both if symmetric). In plain PyTorch each sum is another 8 or 12 bytes, and each
    split of an operand 12.

    Args:
        a, b: [B, n, n], both fp32, fp16 or bf16.
        first, second: what is written; not onto A, B or C.
        c: [B, n, n], in any type.
        symmetric: A, B and A B are: then B is read by rows, and tiles of the upper triangle are
            computed, and written twice.
        norms: whether the Frobenius norms of the first sum are wanted.

    Returns:
        these, [B], fp32; else None.
    """
    count, n, _ = a.shape
    tensors = (a, b, first.out, second and second.out, c)
    fits = all(t is None or describable(t) for t in tensors)
    if not count or not fits or not can_run(*tensors):
        return product_reference(a, b, first, second, c, symmetric=symmetric, norms=norms)
    cut = product_tiles(n, a.dtype, large_tiles(a.device))
    tile, depth = cut["TILE"], cut["DEPTH"]
    side = -(-n // tile)
    programs = side * (side + 1) // 2 if symmetric else side * side
    squares = torch.empty(count, programs, device=a.device) if norms else None
    other = second or Sum(first.out)
    launch(
        _product,
        (programs, count),
        (
            described(a, tile, depth),
            described(b, tile, depth) if symmetric else described(b, depth, tile),
            None if c is None else described(c, tile, tile),
            described(first.out, tile, tile),
            None if second is None else described(second.out, tile, tile),
            squares,
            *(number(value, count) for value in (*first[1:], *other[1:])),
            n,
        ),
        # B is A where both are one matrix.
        Cost(
            size_of(a, None if b is a else b, c, first.out, second and second.out),
            2 * programs * count * tile**2 * n * (3 if a.dtype == torch.float32 else 1),
        ),
        SYMMETRIC=symmetric,
        INTERPRETED=interpreted(),
        **cut,
    )
    return None if squares is None else squares.sum(1).sqrt_()


def product_reference(
    a: Tensor,
    b: Tensor,
    first: Sum,
    second: Sum | None = None,
    c: Tensor | None = None,
    *,
    symmetric: bool = False,
    norms: bool = False,
) -> Tensor | None:
    """The same in plain PyTorch, in fp32."""
    multiplied = torch.bmm(a.float(), (b.mT if symmetric else b).float())
    if symmetric:
        multiplied = multiplied.triu() + multiplied.triu(1).mT
    _write(multiplied, c, first, *(() if second is None else (second,)))
    found: Tensor = torch.linalg.matrix_norm(first.out.float())
    return found if norms else None


def two_sums(p: Tensor, c: Tensor, first: Sum, second: Sum) -> None:
    """Two sums of P, C and I in one pass, with 16 bytes per entry in fp32, for 6 FLOPs; in plain
    PyTorch 40.

    Args:
        p, c: [B, n, n], in any type.
        first, second: what is written; P and C may be.
    """
    tensors = (p, c, first.out, second.out)
    count, n, _ = p.shape
    dense = all(t.is_contiguous() for t in tensors)
    if not p.numel() or n > 32768 or not dense or not can_run(*tensors):
        return two_sums_reference(p, c, first, second)
    launch(
        _two_sums,
        (-(-n * n // _CHUNK), count),
        (*tensors, *(number(value, count) for value in (*first[1:], *second[1:])), n),
        Cost(size_of(*tensors)),
        CHUNK=_CHUNK,
    )


def two_sums_reference(p: Tensor, c: Tensor, first: Sum, second: Sum) -> None:
    """The same in plain PyTorch."""
    _write(p.float(), c, first, second)


def _write(p: Tensor, c: Tensor | None, *sums: Sum) -> None:
    totals = []
    for sum_ in sums:
        alpha, beta, gamma = (
            torch.as_tensor(value, device=p.device).reshape(-1, 1, 1) for value in sum_[1:]
        )
        total = p * alpha if c is None else p * alpha + c.float() * beta
        total.diagonal(dim1=1, dim2=2).add_(gamma.flatten(1))
        totals.append(total)
    for sum_, total in zip(sums, totals, strict=True):  # not before: it may be onto P or C
        sum_.out.copy_(total)


def product_tiles(n: int, dtype: torch.dtype, large: bool) -> dict[str, int]:
    """How the work is cut, such that registers do."""
    large = large and n > 64
    return {
        "TILE": 128 if large else 64,
        "DEPTH": (128 if large else 64) // dtype.itemsize,
        "num_warps": 8 if large else 4,
        "num_stages": 3,
    }


def _product(
    a,
    b,
    c,
    out,
    second,
    squares,
    alpha,
    beta,
    gamma,
    alpha2,
    beta2,
    gamma2,
    n,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid: tiles of a matrix or of its upper triangle, blocks. Matrices come as descriptors."""
    block = tl.program_id(1)
    if SYMMETRIC:
        row, column = triangle(tl.program_id(0))
    else:
        side = tl.cdiv(n, TILE)
        row = tl.program_id(0) // side
        column = tl.program_id(0) % side
    here = [block, row * TILE, column * TILE]
    there = [block, column * TILE, row * TILE]
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, n, DEPTH):
        left = a.load([block, row * TILE, start]).reshape(TILE, DEPTH)
        if SYMMETRIC:
            right = b.load([block, column * TILE, start]).reshape(TILE, DEPTH).T
        else:
            right = b.load([block, start, column * TILE]).reshape(DEPTH, TILE)
        if INTERPRETED:  # it multiplies the bits of bf16 as if they were integers
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        precision: tl.constexpr = "ieee" if INTERPRETED else "bf16x3"
        total = tl.dot(left, right, total, input_precision=precision)
    i = row * TILE + tl.arange(0, TILE)[:, None]
    j = column * TILE + tl.arange(0, TILE)[None, :]
    diagonal = (i == j) & (i < n)
    if c is not None:
        added = c.load(here).reshape(TILE, TILE).to(tl.float32)
    if second is not None:
        result = total * of_block(alpha2, block) + tl.where(diagonal, of_block(gamma2, block), 0.0)
        if c is not None:
            result += added * of_block(beta2, block)
        result = result.to(second.dtype)
        second.store(here, result.reshape(1, TILE, TILE))
        if SYMMETRIC and row != column:
            second.store(there, result.T.reshape(1, TILE, TILE))
    result = total * of_block(alpha, block) + tl.where(diagonal, of_block(gamma, block), 0.0)
    if c is not None:
        result += added * of_block(beta, block)
    if squares is not None:
        share = tl.sum(result * result)
        if SYMMETRIC:
            share *= tl.where(row != column, 2.0, 1.0)
        tl.store(squares + block * tl.num_programs(0) + tl.program_id(0), share)
    result = result.to(out.dtype)
    out.store(here, result.reshape(1, TILE, TILE))
    if SYMMETRIC and row != column:
        out.store(there, result.T.reshape(1, TILE, TILE))


def _two_sums(
    p,
    c,
    first,
    second,
    alpha,
    beta,
    gamma,
    alpha2,
    beta2,
    gamma2,
    n,
    CHUNK: tl.constexpr,
):
    """Grid: programs of a matrix, blocks."""
    block = tl.program_id(1)
    within = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = within < n * n
    diagonal = within // n == within % n
    at = block.to(tl.int64) * n * n + within
    multiplied = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(c + at, mask=inside, other=0.0).to(tl.float32)
    result = multiplied * of_block(alpha, block) + added * of_block(beta, block)
    result += tl.where(diagonal, of_block(gamma, block), 0.0)
    tl.store(first + at, result.to(first.dtype.element_ty), mask=inside)
    result = multiplied * of_block(alpha2, block) + added * of_block(beta2, block)
    result += tl.where(diagonal, of_block(gamma2, block), 0.0)
    tl.store(second + at, result.to(second.dtype.element_ty), mask=inside)
