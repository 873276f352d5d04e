"""The table `[optimizer.shampoo]` of a job, and the checks that need no GPU and no process group.

TorchTitan merges this module's `JobConfig` into its own (`job.custom_config_module`). TorchTitan
checks types of the command line alone; those of the TOML file our launcher checks.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import validate_hyperparameters

__all__ = ["JobConfig", "Optimizer", "check_degrees", "check_job"]

_TITAN_OPTIMIZERS = ("Adam", "AdamW")
_OWN_IMPORTS = ("", "shampoo_torchtitan")


@dataclass
class Optimizer:
    """What we add to TorchTitan's `[optimizer]`."""

    shampoo: ShampooConfig = field(default_factory=ShampooConfig)
    """Shampoo's own settings; lr, betas, eps and weight_decay are those of `[optimizer]`."""


@dataclass
class JobConfig:
    """What we add to TorchTitan's JobConfig."""

    optimizer: Optimizer = field(default_factory=Optimizer)


def check_job(config: Any) -> None:
    """Checks what settings mean together, for jobs that use Shampoo, and the optimizer's name.

    Raises:
        ValueError: It names the setting, its value and what is allowed.
    """
    optimizer = config.optimizer
    if optimizer.name.lower() != "shampoo":
        # Other extensions may bring optimizers that only they know.
        known = config.experimental.custom_import not in _OWN_IMPORTS
        if not known and optimizer.name not in _TITAN_OPTIMIZERS:
            allowed = ", ".join(("shampoo", *_TITAN_OPTIMIZERS))
            raise ValueError(f"optimizer.name = {optimizer.name!r}: must be one of {allowed}")
        return
    validate_hyperparameters(
        getattr(optimizer, "shampoo", None) or ShampooConfig(),
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    if optimizer.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward = true: must be false with "
            'optimizer.name = "shampoo", which needs all gradients at once'
        )
    if config.fault_tolerance.enable:
        raise ValueError(
            'fault_tolerance.enable = true: must be false with optimizer.name = "shampoo", '
            "which does not support TorchFT"
        )


def check_degrees(config: Any, ranks: int) -> None:
    """Checks that the parallelism's degrees make as many ranks as there are.

    Raises:
        ValueError: It names the degrees and the number of ranks.
    """
    parallelism = config.parallelism
    names = (
        "data_parallel_replicate_degree",
        "data_parallel_shard_degree",
        "context_parallel_degree",
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
    )
    degrees = {name: int(getattr(parallelism, name)) for name in names}
    rest = degrees["data_parallel_shard_degree"] == -1  # whatever the others leave
    product = math.prod(degree for degree in degrees.values() if degree != -1)
    if product < 1 or (ranks % product if rest else ranks != product):
        shown = ", ".join(f"{name} = {n}" for name, n in degrees.items() if n not in (-1, 1))
        raise ValueError(
            f"[parallelism] {shown or 'data_parallel_shard_degree = 1'}: the degrees multiply to "
            f"{product}, which must {'divide' if rest else 'be'} the number of ranks, {ranks}"
        )
