"""What a user writes, for `mypy --strict` in run_tests.sh; nothing runs it."""

import torch
from torch import Tensor, nn

import shampoo_fsdp
from shampoo_fsdp import Shampoo, ShampooConfig, head_settings, param_groups
from shampoo_torchtitan.configs import ShampooOptimizers, shampoo


def use(model: nn.Module, loss: Tensor) -> float:
    """All that the package offers, with the types that it says."""
    version: str = shampoo_fsdp.__version__
    groups = param_groups(model, weight_decay=0.1, lr=1e-3)
    optimizer = Shampoo(groups, betas=(0.9, 0.95), **head_settings(model))
    also = Shampoo(model.named_parameters(), lr=torch.tensor(1e-3), exclude=[], fused=True)
    Shampoo(groups, config=ShampooConfig(precondition_frequency=10))
    # A misspelt setting is an error (mypy --strict complains where none is to be ignored).
    ShampooConfig(precondition_frequncy=10)  # type: ignore[call-arg]
    ShampooConfig(grafting="adamw")  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    optimizer.step()
    value: float = optimizer.step(lambda: float(loss))
    schedule.step()
    also.load_state_dict(optimizer.state_dict())
    config: ShampooConfig = optimizer.config
    figures: dict[str, float] = optimizer.summary()
    return value + figures["blocks"] + config.precondition_frequency + len(version)


def use_in_torchtitan() -> list[ShampooOptimizers.Config]:
    """The same for a job of TorchTitan 0.3."""
    return [shampoo(lr=3e-4, precondition_frequency=20)]
