"""AdamW of which single entries are left out, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shampoo_fsdp.kernels.language import Cost, can_run, launch, lerp, size_of

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["AdamW", "adamw_masked"]

_CHUNK, _TURNS = 1024, 4
"""Elements that a program has at once, and how often."""


class AdamW(NamedTuple):
    """Numbers of a step."""

    lr: float
    lost: float
    """The share of the weights that goes before the step: lr times the weight decay."""
    rate1: float
    """1 - beta1."""
    rate2: float
    """1 - beta2."""
    eps: float
    correction1: float
    """Of the bias, 1 - beta1^t."""
    correction2: float


def adamw_masked(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    skipped: Tensor,
    numbers: AdamW,
    largest: float,
) -> None:
    """AdamW's step in place, in fp32. Where an entry of the gradient is NaN, or not below `largest`
    in size, the entries of weights and state stay bit for bit.

    For fp32 it reads 16 and writes 12 bytes per element, for 15 FLOPs; around torch's fused kernel,
    which has no such mask, these are 121 bytes.

    Args:
        weights, gradient, exp_avg, exp_avg_sq: of one shape, in any type. The gradient is rounded
            to that of the weights first.
        skipped: the number of entries that stayed is added to it; int64, of no dimensions.
    """
    tensors = (weights, gradient, exp_avg, exp_avg_sq)
    size = weights.numel()
    dense = all(t.is_contiguous() for t in tensors)
    if not size or size >= 2**31 or not dense or not can_run(*tensors):
        return adamw_masked_reference(*tensors, skipped, numbers, largest)
    lr, lost, rate1, rate2, eps, correction1, correction2 = numbers
    factors = lr / correction1, lost, rate1, rate2, eps, correction2**0.5
    launch(
        _adamw_masked,
        (-(-size // (_CHUNK * _TURNS)),),
        (*tensors, skipped, *factors, largest, size),
        Cost(size_of(*tensors) + size_of(weights, exp_avg, exp_avg_sq)),
        CHUNK=_CHUNK,
        TURNS=_TURNS,
    )


def adamw_masked_reference(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    skipped: Tensor,
    numbers: AdamW,
    largest: float,
) -> None:
    """The same in plain PyTorch."""
    lr, lost, rate1, rate2, eps, correction1, correction2 = numbers
    gradient = gradient.to(weights.dtype)
    usable = gradient.abs() < largest  # false for NaN
    skipped += usable.logical_not().sum()
    gradient = torch.where(usable, gradient, 0.0).float()
    first = exp_avg.float().lerp(gradient, rate1)
    second = exp_avg_sq.float() * (1.0 - rate2) + gradient.square() * rate2
    step = first / (second.sqrt() / correction2**0.5 + eps)
    changed = weights.float() * (1.0 - lost) - step * (lr / correction1)
    for old, new in ((exp_avg, first), (exp_avg_sq, second), (weights, changed)):
        torch.where(usable, new.to(old.dtype), old, out=old)


def _adamw_masked(
    weights,
    gradient,
    exp_avg,
    exp_avg_sq,
    skipped,
    step_size,
    lost,
    rate1,
    rate2,
    eps,
    root,
    largest,
    size,
    CHUNK: tl.constexpr,
    TURNS: tl.constexpr,
):
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
