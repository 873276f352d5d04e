"""The kernels that a step has no other form of, in plain PyTorch."""

import torch
from torch import Tensor


def per_block(value, ndim):
    return value.view(-1, *[1] * (ndim - 1)) if isinstance(value, Tensor) else value


def adamw_masked_reference(
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
    gradient = gradient.to(weights.dtype)
    usable = gradient.abs() < largest  # false for NaN
    skipped += usable.logical_not().sum()
    gradient = torch.where(usable, gradient, 0.0).float()
    first = exp_avg.float().lerp(gradient, rate1)
    second = exp_avg_sq.float() * (1.0 - rate2) + gradient.square() * rate2
    step = first / (second.sqrt() / root + eps)
    changed = weights.float() * (1.0 - lost) - step * step_size
    for old, new in ((exp_avg, first), (exp_avg_sq, second), (weights, changed)):
        torch.where(usable, new.to(old.dtype), old, out=old)


def update_factors_reference(
    factors: Tensor, blocks: Tensor, rate: Tensor, share: float, *, sums: bool = False
) -> None:
    rates = rate.view(-1, 1, 1)
    blocks = torch.where(rates == 0.0, 0.0, blocks.float())
    grams = torch.bmm(blocks, blocks.mT).mul_(rates * share)
    if factors.ndim == 2:
        rows, columns = torch.triu_indices(blocks.shape[1], blocks.shape[1], device=blocks.device)
        grams, rates = grams[:, rows, columns], rates.flatten(1)
    factors.copy_(factors.float().mul(1.0 if sums else 1.0 - rates).add_(grams))


def momenta_reference(
    gradient: Tensor,
    usable: Tensor,
    exp_avg: Tensor,
    moment: Tensor | None,
    mixed: Tensor,
    *numbers: float | Tensor,
    sums: bool = False,
) -> Tensor:
    ndim = gradient.ndim
    each = usable.view(-1, *[1] * (ndim - 1))
    rate1, rate2, share, eps, *_ = (per_block(value, ndim) for value in numbers)
    gradient = torch.where(each > 0.0, gradient, 0.0)
    exp_avg.copy_(exp_avg.float().lerp_(gradient, rate1 * each))
    if moment is not None:
        kept = moment.float() * (1.0 if sums else 1.0 - rate2 * each)
        moment.copy_(kept + gradient.square().mul_(1.0 if sums else rate2))
    mixed.copy_(gradient.lerp(exp_avg.float(), share))
    step = mixed.float()
    if moment is not None:
        step = step / (moment.float().sqrt() + eps)
    norms: Tensor = torch.linalg.vector_norm(step, 2, tuple(range(1, ndim)))
    return norms * (numbers[4] if len(numbers) > 4 else 1.0) * usable
