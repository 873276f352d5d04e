"""Grafting: the step size of another method for Shampoo's direction.

Agarwal et al. 2020 (arXiv 2002.11803); section 2.4 of Shi et al. 2023 (arXiv 2309.06497). The
grafted method sees the same gradients and momentum; of its step only the norm of each block is
used, or the whole step before preconditioning starts.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["LARGEST_GRADIENT", "AdamGrafting", "adamw_step"]

LARGEST_GRADIENT = 1e15
"""Squares of larger entries, summed over a block, would leave the range of fp32."""


class AdamGrafting:
    """Adam's second moment of a stack of blocks, [B, ...] in fp32."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.exp_avg_sq = torch.zeros(shape, device=device)

    def update(self, gradient: Tensor, usable: Tensor, beta2: float) -> None:
        """A <- beta2 A + (1 - beta2) G^2 where `usable`; elsewhere the gradient is zero and A
        stays.

        Args:
            gradient: [B, ...].
            usable: bool, [B, 1, ...].
        """
        decay = torch.where(usable, beta2, 1.0)
        self.exp_avg_sq.mul_(decay).addcmul_(gradient, gradient, value=1.0 - beta2)

    def step(
        self,
        exp_avg: Tensor,
        correction1: float | Tensor,
        correction2: float | Tensor,
        eps: float,
    ) -> tuple[Tensor, float | Tensor]:
        """Adam's step M / correction1 / (sqrt(A / correction2) + eps), as a tensor [B, ...] and a
        factor that it still has to be multiplied by; corrections are numbers or [B, 1, ...]."""
        root = correction2**0.5
        denominator = self.exp_avg_sq.sqrt().add_(eps * root)
        return torch.div(exp_avg, denominator, out=denominator), root / correction1


def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of torch's AdamW on shards, in place.

    Entries of the gradients that are not finite, or whose squares would not be, are set to zero,
    each by itself: which rank holds them makes no difference.
    """
    for gradient in gradients:
        gradient.masked_fill_((gradient.abs() < LARGEST_GRADIENT).logical_not_(), 0.0)
    fused = parameters[0].device.type in ("cpu", "cuda", "xpu")
    adamw(
        parameters, gradients, exp_avgs, exp_avg_sqs, [], steps,
        fused=fused, foreach=not fused, amsgrad=False, maximize=False,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
