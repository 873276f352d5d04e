"""Momentum, second moment, what the preconditioner reads, and the grafted norm, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from shampoo_fsdp.kernels.language import launch, lerp, number, of_block, size_of

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["momenta"]

_CHUNK, _TURNS = 1024, 4
"""Elements that a program has at once, and how often."""


def momenta(
    gradient: Tensor,
    usable: Tensor,
    exp_avg: Tensor,
    moment: Tensor | None,
    mixed: Tensor,
    rate1: float | Tensor,
    rate2: float | Tensor,
    share: float | Tensor,
    eps: float | Tensor,
    factor: float | Tensor = 1.0,
    *,
    sums: bool = False,
) -> Tensor:
    """Let gradients G into the momentum M and the second moment V of their blocks.

        M <- M + rate1 (G - M)
        V <- (1 - rate2) V + rate2 G^2, or V + G^2 for sums
        mixed <- share M + (1 - share) G

    A block that is not usable keeps M and V bit for bit; its G counts as zero, whatever it is.

    For fp32 state, `mixed` in bf16 and Adam it reads 12 and writes 10 bytes per element, for 12
    FLOPs; in plain PyTorch these are 76 bytes. Momentum in bf16 takes 4 less.

    Args: tensors that `can_run`, all dense, with less than 2^31 elements in a block.
        gradient: G, [B, ...], fp32.
        usable: 1 or 0, [B], fp32.
        exp_avg: M, in any type.
        moment: V, in any of the types, or None.
        mixed: in any type; it may be the gradient's memory.
        rate1, rate2, share, eps, factor: numbers, or [1] or [B] on the device.

    Returns:
        the norm of mixed / (sqrt(V) + eps), or of mixed without V, times factor, in fp32, [B]; 0 of
        blocks that are not usable. (Operators of PyTorch in bf16 round on the way; this does not.)
    """
    tensors = (gradient, exp_avg, moment, mixed)
    count = len(gradient)
    size = gradient.numel() // count
    programs = -(-size // (_CHUNK * _TURNS))
    numbers = [number(value, count) for value in (rate1, rate2, share, eps, factor)]
    squares = gradient.new_empty(count, programs)
    launch(
        _momenta,
        (count * programs,),
        (*tensors, usable, squares, *numbers, size, programs),
        size_of(*tensors) + size_of(exp_avg, moment),
        CHUNK=_CHUNK,
        TURNS=_TURNS,
        SUMS=sums,
    )
    return squares.sum(1).sqrt_()


def _momenta(
    gradient, exp_avg, moment, mixed, usable, squares, rate1, rate2, share, eps, factor,
    size, programs,
    CHUNK: tl.constexpr, TURNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Grid: the programs of a block, block after block, of TURNS chunks each."""
    block = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    good = tl.load(usable + block).to(tl.int32) > 0
    rate1 = of_block(rate1, block)
    rate2 = of_block(rate2, block)
    share = of_block(share, block)
    eps = of_block(eps, block)
    factor = of_block(factor, block)
    start = block.to(tl.int64) * size
    total = tl.zeros((CHUNK,), tl.float32)
    for turn in range(TURNS):
        within = (program * TURNS + turn) * CHUNK + tl.arange(0, CHUNK)
        inside = within < size
        changes = inside & good
        at = start + within
        g = tl.load(gradient + at, mask=changes, other=0.0)
        first = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        new = lerp(first, g, rate1).to(exp_avg.dtype.element_ty)
        tl.store(exp_avg + at, new, mask=changes)
        first = tl.where(good, new.to(tl.float32), first)
        step = lerp(g, first, share).to(mixed.dtype.element_ty)
        tl.store(mixed + at, step, mask=inside)
        step = step.to(tl.float32)
        if moment is not None:
            second = tl.load(moment + at, mask=inside, other=0.0).to(tl.float32)
            new = second + g * g if SUMS else (1.0 - rate2) * second + rate2 * g * g
            second = tl.where(good, new, second)
            tl.store(moment + at, second, mask=changes)
            step = step / (tl.sqrt(second) + eps)
        total += tl.where(inside, step * step, 0.0)
    tl.store(squares + tl.program_id(0), tl.where(good, tl.sum(total, 0) * factor * factor, 0.0))
