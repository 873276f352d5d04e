"""AdamW of which single entries are left out, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from shampoo_fsdp.kernels.language import launch, lerp, size_of

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["adamw_masked"]

_CHUNK, _TURNS = 1024, 4
"""Elements that a program has at once, and how often."""


def adamw_masked(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    skipped: Tensor,
    largest: float,
    *,
    step_size: float,
    lost: float,
    rate1: float,
    rate2: float,
    eps: float,
    root: float,
) -> None:
    """AdamW's step in place, in fp32. Where an entry of the gradient is NaN, or not below `largest`
    in size, the entries of weights and state stay bit for bit.

    For fp32 it reads 16 and writes 12 bytes per element, for 15 FLOPs; around torch's fused kernel,
    which has no such mask, these are 121 bytes.

    Args:
        weights, gradient, exp_avg, exp_avg_sq: those that `can_run`; dense, of one shape and less
            than 2^31 elements. The gradient is rounded to the type of the weights first.
        skipped: the number of entries that stayed is added to it; int64, of no dimensions.
        step_size: lr by the bias correction of the first average.
        lost: the share of the weights that goes before the step.
        rate1, rate2: 1 - beta.
        root: of the second bias correction.
    """
    tensors = (weights, gradient, exp_avg, exp_avg_sq)
    size = weights.numel()
    launch(
        _adamw_masked,
        (-(-size // (_CHUNK * _TURNS)),),
        (*tensors, skipped, step_size, lost, rate1, rate2, eps, root, largest, size),
        size_of(*tensors) + size_of(weights, exp_avg, exp_avg_sq),
        CHUNK=_CHUNK,
        TURNS=_TURNS,
    )


def _adamw_masked(
    weights, gradient, exp_avg, exp_avg_sq, skipped,
    step_size, lost, rate1, rate2, eps, root, largest, size,
    CHUNK: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Grid: programs of TURNS chunks each."""
    left_out = tl.zeros((CHUNK,), tl.int32)
    for turn in range(TURNS):
        at = (tl.program_id(0) * TURNS + turn) * CHUNK + tl.arange(0, CHUNK)
        inside = at < size
        g = tl.load(gradient + at, mask=inside, other=0.0)
        g = g.to(weights.dtype.element_ty).to(tl.float32)
        usable = tl.abs(g) < largest  # false for NaN
        left_out += inside.to(tl.int32) - (inside & usable).to(tl.int32)
        old1 = tl.load(exp_avg + at, mask=inside, other=0.0)
        old2 = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        kept = tl.load(weights + at, mask=inside, other=0.0)
        first = lerp(old1.to(tl.float32), g, rate1)
        second = old2.to(tl.float32) * (1.0 - rate2) + g * g * rate2
        step = tl.div_rn(first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
        changed = kept.to(tl.float32) * (1.0 - lost) - step * step_size
        # (A mask of single entries would take stores apart.)
        first = tl.where(usable, first.to(exp_avg.dtype.element_ty), old1)
        second = tl.where(usable, second.to(exp_avg_sq.dtype.element_ty), old2)
        changed = tl.where(usable, changed.to(weights.dtype.element_ty), kept)
        tl.store(exp_avg + at, first, mask=inside)
        tl.store(exp_avg_sq + at, second, mask=inside)
        tl.store(weights + at, changed, mask=inside)
    count = tl.sum(left_out, 0)
    if count > 0:
        tl.atomic_add(skipped, count.to(tl.int64))
