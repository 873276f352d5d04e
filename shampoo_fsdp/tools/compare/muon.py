"""Muon for comparisons; in fp32 where bf16 is emulated, as torch.optim.Muon is too slow there."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from shampoo_fsdp.rules.precision import has_fast_bfloat16

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024, with the size of AdamW's step (Liu et al. 2025, arXiv 2502.16982, eq. 4).

    Each rank takes the whole of each matrix.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float
    ) -> None:
        """
        Args:
            params: matrices.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                kept = self.state[weight]
                average = kept.setdefault("momentum_buffer", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1.0 - group["momentum"])
                mixed = weight.grad.lerp(average, group["momentum"])
                whole = mixed.full_tensor() if isinstance(mixed, DTensor) else mixed
                update = _orthogonal(whole) * (0.2 * max(whole.shape) ** 0.5)
                if isinstance(weight, DTensor):
                    update = distribute_tensor(update, weight.device_mesh, weight.placements)
                weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                weight.sub_(update.to(weight.dtype), alpha=group["lr"])


def _orthogonal(matrix: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    fast = has_fast_bfloat16(matrix.device.type)
    x = matrix.to(torch.bfloat16 if fast else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
