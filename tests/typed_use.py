"""What a user writes, for `mypy --strict` in run_tests.sh; nothing runs it."""

import torch
from torch import Tensor, nn

import shampoo_fsdp
from shampoo_fsdp import Shampoo, ShampooConfig, head_settings, param_groups


def use(model: nn.Module, loss: Tensor) -> float:
    """All that the package offers, with the types that it says."""
    version: str = shampoo_fsdp.__version__
    groups = param_groups(model, weight_decay=0.1, lr=1e-3)
    optimizer = Shampoo(groups, betas=(0.9, 0.95), **head_settings(model))
    also = Shampoo(model.named_parameters(), lr=torch.tensor(1e-3), exclude=[])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    optimizer.step()
    value: float = optimizer.step(lambda: float(loss))
    schedule.step()
    also.load_state_dict(optimizer.state_dict())
    config: ShampooConfig = optimizer.config
    figures: dict[str, float] = optimizer.summary()
    return value + figures["blocks"] + config.precondition_frequency + len(version)
