"""The table `[optimizer.shampoo]` of a job of TorchTitan 0.2.

TorchTitan merges this module's `JobConfig` into its own (`job.custom_config_module`).
"""

from dataclasses import dataclass, field

from shampoo_fsdp import ShampooConfig


@dataclass
class Optimizer:
    """What we add to TorchTitan's `[optimizer]`."""

    shampoo: ShampooConfig = field(default_factory=ShampooConfig)
    """Shampoo's own settings; lr, betas, eps and weight_decay are those of `[optimizer]`."""


@dataclass
class JobConfig:
    """What we add to TorchTitan's JobConfig."""

    optimizer: Optimizer = field(default_factory=Optimizer)
