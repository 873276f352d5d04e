"""Grafting: the step size of another method for Shampoo's direction.

Agarwal et al. 2020 (arXiv 2002.11803); section 2.4 of Shi et al. 2023 (arXiv 2309.06497). The
grafted method sees the same gradients and momentum; of its step only the norm of each block is
used, or the whole step before preconditioning starts.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["LARGEST_GRADIENT", "AdamGrafting", "adamw_step"]

LARGEST_GRADIENT = 1e15
"""Squares of larger entries, summed over a block, would leave the range of fp32."""


class AdamGrafting:
    """Adam's second moment of a stack of blocks, [B, ...] in fp32."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.exp_avg_sq = torch.zeros(shape, dtype=torch.float32, device=device)

    def update(self, gradient: Tensor, decay: Tensor, beta2: float) -> None:
        """A <- beta2 A + (1 - beta2) G^2.

        Args:
            gradient: [B, ...]; zero where it is not usable.
            decay: [B, 1, ...]; beta2, and 1 where the gradient is not usable.
        """
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

    Entries of the gradients that are not finite, or whose squares would not be, count as zero,
    each by itself: which rank holds them makes no difference. The gradients stay as they are.
    """
    by_type: dict[torch.dtype, list[int]] = defaultdict(list)
    for i, parameter in enumerate(parameters):
        by_type[parameter.dtype].append(i)
    for dtype, members in by_type.items():
        chosen = [parameters[i] for i in members]
        # In one piece, so that the number of kernels does not grow with that of the parameters.
        flat = torch.cat([gradients[i].reshape(-1) for i in members]).to(dtype)
        flat.masked_fill_((flat.abs() < LARGEST_GRADIENT).logical_not_(), 0.0)
        parts = torch.split(flat, [parameter.numel() for parameter in chosen])
        # The fused kernel takes memory as it lies, whatever the strides.
        fused = flat.device.type in ("cpu", "cuda", "xpu") and all(
            parameter.is_contiguous() for parameter in chosen
        )
        adamw(
            chosen,
            [part.view_as(parameter) for part, parameter in zip(parts, chosen, strict=True)],
            [exp_avgs[i] for i in members],
            [exp_avg_sqs[i] for i in members],
            [],
            [steps[i] for i in members],
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )
