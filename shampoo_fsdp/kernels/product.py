"""Products of stacked square matrices, with the sums of a polynomial on the way out.

What the steps of an inverse root by polynomials consist of: with nu = a A + b I, nu^2 = product(A)
once the norm of A^2 has told a and b, and q(nu) = product(a nu^2 + nu + b, nu^2 + c) + d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shampoo_fsdp.kernels.language import (
    can_run,
    describable,
    described,
    interpreted,
    large_tiles,
    launch,
    number,
    of_block,
    size_of,
    sums_in_fp32,
    tiles,
    triangle,
)

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["Sum", "product"]


class Sum(NamedTuple):
    """alpha P + beta C + gamma I in a type; numbers, or [1] or [B] on the device."""

    dtype: torch.dtype = torch.float32
    alpha: float | Tensor = 1.0
    beta: float | Tensor = 0.0
    gamma: float | Tensor = 0.0


def product(
    a: Tensor,
    b: Tensor,
    *sums: Sum,
    c: Tensor | None = None,
    symmetric: bool = False,
    squares: bool = False,
) -> list[Tensor]:
    """One or two sums of P = A B, C and I, in fp32 until they are written.

    Matrices in fp32 are split in the kernel, A = h + l with h in bf16, for three products in 16
    bits, h h^T last; those in 16 bits are multiplied as they are.

    Per entry it reads the size of A, B and C and writes that of the sums, for 2 n FLOPs (6 n if
    split, half of both if symmetric). In plain PyTorch each sum is another 8 or 12 bytes, and each
    split of an operand 20.

    Args:
        a, b: [B, n, n], both fp32, fp16 or bf16.
        c: [B, n, n], in any type.
        symmetric: A, B and A B are: then B is read by rows, and tiles of the upper triangle are
            computed, and written twice.
        squares: whether those of the first sum's entries are wanted.

    Returns:
        the sums, [B, n, n], and then sums of squares, fp32 [B, parts].
    """
    count, n, _ = a.shape
    given = [a, b] if c is None else [a, b, c]
    rows = all(n * sum_.dtype.itemsize % 16 == 0 for sum_ in sums)
    if not rows or not can_run(*given) or not all(map(describable, given)):
        return product_reference(a, b, *sums, c=c, symmetric=symmetric, squares=squares)
    results = [torch.empty(a.shape, dtype=sum_.dtype, device=a.device) for sum_ in sums]
    cut = tiles(n, a.itemsize, large_tiles(a.device))
    tile, depth = cut["TILE"], cut["DEPTH"]
    side = -(-n // tile)
    programs = side * (side + 1) // 2 if symmetric else side * side
    parts = torch.empty(count, programs, device=a.device) if squares else None
    first, second = sums if len(sums) == 2 else (sums[0], Sum())
    launch(
        _product,
        (programs, count),
        (
            described(a, tile, depth),
            described(b, tile, depth) if symmetric else described(b, depth, tile),
            None if c is None else described(c, tile, tile),
            described(results[0], tile, tile),
            described(results[1], tile, tile) if len(sums) == 2 else None,
            parts,
            *(number(value, count) for value in (*first[1:], *second[1:])),
            n,
        ),
        # A matrix that is two of them is read once.
        size_of(*{id(t): t for t in (*given, *results)}.values()),
        2 * programs * count * tile**2 * n * (3 if a.dtype == torch.float32 else 1),
        SYMMETRIC=symmetric,
        INTERPRETED=interpreted(),
        **cut,
    )
    return results if parts is None else [*results, parts]


def product_reference(
    a: Tensor,
    b: Tensor,
    *sums: Sum,
    c: Tensor | None = None,
    symmetric: bool = False,
    squares: bool = False,
) -> list[Tensor]:
    """The same in plain PyTorch; fp64 stays what it is, and nothing is made symmetric."""
    rows, first = b if symmetric else b.mT, sums[0]
    if len(sums) == 1 and c is None and not isinstance(first.alpha, Tensor):
        multiplied, sums = _multiplied(a, rows, first.alpha), (first._replace(alpha=1.0),)
    else:
        multiplied = _multiplied(a, rows)
    # The first sum is the last to be made, for it may lie where the product does.
    results = [_summed(multiplied, c, sum_, sum_ is sums[0]) for sum_ in reversed(sums)][::-1]
    if squares:
        results.append(torch.linalg.vector_norm(results[0], 2, (1, 2)).square_().unsqueeze(1))
    return results


def split(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 matrices A = h + l, h being A in bf16, as [h, l, h] and [l, h, h], bf16 [B, n, 3n]: the
    first of A times the other of B, transposed, is h l^T + l h^T + h h^T, the small ones first, and
    nearly A B^T."""
    n = matrices.shape[-1]
    parts = matrices.new_empty(*matrices.shape[:-1], 4 * n, dtype=torch.bfloat16)
    high, low, *_ = torch.split(parts, n, -1)
    high.copy_(matrices)
    torch.sub(matrices, high, out=low)
    parts[..., 2 * n :].view(*matrices.shape[:-1], 2, n).copy_(high.unsqueeze(-2))
    return parts[..., : 3 * n], parts[..., n:]


def _multiplied(a: Tensor, rows: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha A B in fp32 for the rows of B^T; of fp32 matrices by three products in 16 bits where
    the device has units for it."""
    if a.dtype != torch.float64 and sums_in_fp32(a.device.type):
        if a.dtype == torch.float32:
            left = split(a)
            a, rows = left[0], (left if rows is a else split(rows))[1]
        multiplied = bmm_in_fp32(a, rows.mT)
        return multiplied if alpha == 1.0 else multiplied.mul_(alpha)
    if a.element_size() == 2:
        a, rows = a.float(), rows.float()
    if alpha == 1.0:
        return torch.bmm(a, rows.mT)
    return torch.baddbmm(a, a, rows.mT, beta=0.0, alpha=alpha)


def bmm_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """A B of matrices in 16 bits, summed and given in fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32)


def _summed(p: Tensor, c: Tensor | None, sum_: Sum, in_place: bool = False) -> Tensor:
    """A sum, of P in fp32 or fp64, which may change if it is in place."""
    _, alpha, beta, gamma = sum_
    if c is not None and not isinstance(alpha, Tensor) and not isinstance(beta, Tensor):
        if beta == 1.0:
            total = torch.add(c, p, alpha=alpha)
        else:
            total = (p.mul_(alpha) if alpha != 1.0 else p) if in_place else p * alpha
            total.add_(c, alpha=beta)
    else:
        alpha, beta = (v.view(-1, 1, 1) if isinstance(v, Tensor) else v for v in (alpha, beta))
        total = p
        if isinstance(alpha, Tensor) or alpha != 1.0 or not in_place:
            total = torch.mul(p, alpha, out=p if in_place else None)
        if c is not None:
            total.addcmul_(c, torch.as_tensor(beta))
    if isinstance(gamma, Tensor):
        gamma = gamma.view(-1, 1)
    total.diagonal(dim1=1, dim2=2).add_(gamma)
    return total.to(sum_.dtype)


def _product(
    a, b, c, out, second, squares, alpha, beta, gamma, alpha2, beta2, gamma2, n,
    TILE: tl.constexpr, DEPTH: tl.constexpr, SYMMETRIC: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
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
