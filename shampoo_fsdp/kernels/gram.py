"""Factors F <- (1 - rate) F + rate U U^T, of half the products, in one pass over F."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from shampoo_fsdp.kernels.language import (
    can_run,
    describable,
    described,
    interpreted,
    large_tiles,
    launch,
    size_of,
    tiles,
    triangle,
)

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["update_factors"]


def update_factors(
    factors: Tensor, blocks: Tensor, rate: Tensor, share: float, *, sums: bool = False
) -> None:
    """F <- (1 - rate) F + rate share U U^T in place, or F + rate share U U^T for sums; in fp32.

    Tiles of the upper triangle are computed, and written twice. A block of rate 0 keeps F bit for
    bit, whatever its U is.

    It reads 2 and writes 4 bytes per element of a factor in fp32 (2 and 2 where it is packed), for
    as many FLOPs as U has columns. In plain PyTorch these are 16 to 24 bytes, and twice the FLOPs.

    Args: those that :func:`can_update`.
        factors: F, symmetric [B, n, n], or their upper triangles [B, n (n + 1) / 2]; in any type.
        blocks: U [B, n, rest], in 16 bits; it or U^T lies row by row in memory.
        rate: [B], fp32.
    """
    count, n, rest = blocks.shape
    packed = factors.ndim == 2
    transposed = blocks.stride(2) != 1
    source = blocks.mT if transposed else blocks
    cut = tiles(n, blocks.itemsize, not packed and large_tiles(blocks.device))
    tile, depth = cut["TILE"], cut["DEPTH"]
    side = -(-n // tile)
    launch(
        _update_factors,
        (side * (side + 1) // 2, count),
        (
            described(source, depth, tile) if transposed else described(source, tile, depth),
            factors if packed else described(factors, tile, tile),
            rate,
            share,
            n,
            rest,
            factors.stride(0),
        ),
        # Of whole factors one triangle is read.
        size_of(blocks) + size_of(factors) + size_of(factors) // (1 if packed else 2),
        count * n * (n + tile) * rest,
        TRANSPOSED=transposed,
        PACKED=packed,
        SUMS=sums,
        UPCAST=interpreted(),
        **cut,
    )


def can_update(factors: Tensor, blocks: Tensor) -> bool:
    """Whether the kernel takes these factors and blocks."""
    if not can_run(factors, blocks) or factors.stride(-1) != 1:
        return False
    source = blocks if blocks.stride(2) == 1 else blocks.mT
    return describable(source) and (factors.ndim == 2 or describable(factors))


def _update_factors(
    blocks, factors, rate, share, n, rest, stride,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of a triangle, blocks. `blocks` is a descriptor of U or U^T, `factors` one of F,
    or the address of packed ones."""
    row, column = triangle(tl.program_id(0))
    block = tl.program_id(1)
    rate = tl.load(rate + block)
    if rate == 0.0:
        return
    decay = 1.0 if SUMS else 1.0 - rate
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, rest, DEPTH):
        if TRANSPOSED:
            left = blocks.load([block, start, row * TILE]).reshape(DEPTH, TILE).T
            right = blocks.load([block, start, column * TILE]).reshape(DEPTH, TILE)
        else:
            left = blocks.load([block, row * TILE, start]).reshape(TILE, DEPTH)
            right = blocks.load([block, column * TILE, start]).reshape(TILE, DEPTH).T
        if UPCAST:  # the interpreter multiplies the bits of bf16 as if they were integers
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= rate * share
    if PACKED:
        i = row * TILE + tl.arange(0, TILE)[:, None]
        j = column * TILE + tl.arange(0, TILE)[None, :]
        at = factors + block.to(tl.int64) * stride + (i * n - i * (i - 1) // 2 + j - i)
        kept = (i <= j) & (j < n)
        total += decay * tl.load(at, mask=kept, other=0.0).to(tl.float32)
        tl.store(at, total.to(factors.dtype.element_ty), mask=kept)
    else:
        here = [block, row * TILE, column * TILE]
        total += decay * factors.load(here).reshape(TILE, TILE).to(tl.float32)
        total = total.to(factors.dtype)
        factors.store(here, total.reshape(1, TILE, TILE))
        if row != column:
            factors.store([block, column * TILE, row * TILE], total.T.reshape(1, TILE, TILE))
