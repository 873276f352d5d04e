"""Grafting: the step size of a first-order method for the preconditioned direction.

Agarwal et al. 2020 (arXiv 2002.11803); section 2.4 of Shi et al. 2023 (arXiv 2309.06497). The
grafted method sees the same gradients and momentum; of its step only the norm of each block is
used, or the whole step before preconditioning starts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.rules.matrices import on_device

LARGEST_GRADIENT = 1e15
"""Squares of larger entries, summed over a block, would leave the range of fp32."""

_SECOND_MOMENTS = {"adam": "exp_avg_sq", "rmsprop": "exp_avg_sq", "adagrad": "sum"}


def second_moment_name(method: str) -> str | None:
    """Name of the second moment in a method's state, that of torch.optim's Adam and Adagrad."""
    return _SECOND_MOMENTS.get(method)


def update_second_moment(
    method: str, moment: Tensor, gradient: Tensor, decay: Tensor | float, beta2: float
) -> None:
    """A <- beta2 A + (1 - beta2) G^2; for AdaGrad A <- A + G^2.

    Args:
        moment, gradient: [B, ...]; the gradient is zero where it is not usable.
        decay: beta2, and 1 where the gradient is not usable; [B, 1, ...] or a number.
    """
    if method == "adagrad":
        moment.addcmul_(gradient, gradient)
    else:
        moment.mul_(decay).addcmul_(gradient, gradient, value=1.0 - beta2)


def graft_step(
    method: str,
    exp_avg: Tensor,
    moment: Tensor | None,
    correction1: float | Tensor,
    correction2: float | Tensor,
    eps: float,
) -> tuple[Tensor, float | Tensor]:
    """The method's step, M^ / (sqrt(A^) + eps) or, without a second moment, M^, as a tensor
    [B, ...] and a factor that it still has to be multiplied by.

    M^ = M / correction1. A^ = A / correction2 for Adam, A for RMSprop and AdaGrad, as in
    torch.optim. The tensor has the type of `exp_avg`, which it is for methods without a second
    moment.
    """
    ridge, factor = graft_numbers(method, correction1, correction2, eps)
    if moment is None:
        return exp_avg, factor
    denominator = torch.sqrt(moment, out=torch.empty_like(exp_avg)).add_(ridge)
    return torch.div(exp_avg, denominator, out=denominator), factor


def graft_numbers(
    method: str, correction1: float | Tensor, correction2: float | Tensor, eps: float
) -> tuple[float | Tensor, float | Tensor]:
    """The eps and the factor with which M / (sqrt(A) + eps), or M, is the method's step."""
    root = correction2**0.5 if method == "adam" else 1.0
    return eps * root, root / correction1


def accelerate(
    config: ShampooConfig,
    update: Tensor,
    buffer: Tensor,
    weight: float | Tensor,
    usable: float | Tensor = 1.0,
) -> None:
    """B <- momentum B + (1 - dampening) D; D <- B, or D + momentum B with Nesterov, as in
    torch.optim.SGD, whose first B is D.

    Args:
        update, buffer: D and B, [B, ...], changed in place.
        weight: 1 - dampening, and 1 on the first step; a number or [B, 1, ...].
        usable: 0 where B stays and D becomes zero, else 1; a number or [B, 1, ...].
    """
    momentum = config.momentum
    buffer.mul_(1.0 - (1.0 - momentum) * usable).add_(update * weight)
    if config.nesterov:
        update.add_(buffer * usable, alpha=momentum)
    else:
        torch.mul(buffer, usable, out=update)


def bias_correction(
    beta: float, steps: Sequence[int], device: torch.device, last: float | None = None
) -> float | Tensor:
    """1 - beta^t; a tensor [B] where the blocks' t differ.

    Args:
        last: the weight of the past in the newest average, if that is not beta.
    """
    if beta == 1.0:
        return 1.0
    last = beta if last is None else last
    return one_or_each([1.0 - last * beta ** (max(step, 1) - 1) for step in steps], device)


def one_or_each(values: Sequence[float], device: torch.device) -> float | Tensor:
    """A number that holds for all blocks, or fp32 [B]."""
    alike = min(values) == max(values)
    return values[0] if alike else on_device(values, device, torch.float32)
