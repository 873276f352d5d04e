"""The table `[optimizer.shampoo]` of a job, and the checks that need no GPU and no process group.

TorchTitan merges this module's `JobConfig` into its own (`job.custom_config_module`). TorchTitan
checks types of the command line alone; those of the TOML file our launcher checks.
"""

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import validate_hyperparameters
from shampoo_fsdp.validation import REMOVED, misfit

__all__ = ["JobConfig", "Optimizer", "check_degrees", "check_job", "check_table"]

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


def check_table(cls: type, table: dict[str, Any], path: str = "") -> None:
    """Checks the keys and the types of a TOML table.

    Args:
        cls: The dataclass that the table is for; fields that are dataclasses are tables in it.
        table: What the file says.
        path: The table's name in the file, with dots.

    Raises:
        ValueError: A key that does not exist.
        TypeError: A value of a type that the key does not take.
    """
    hints = typing.get_type_hints(cls)
    for key, value in table.items():
        name = f"{path}.{key}" if path else key
        if key not in hints and cls is ShampooConfig and key in REMOVED:
            raise ValueError(f"setting {name} has been removed: {REMOVED[key]}")
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown setting {name}.{hint} Allowed: {', '.join(sorted(hints))}")
        if not dataclasses.is_dataclass(hints[key]):
            if allowed := misfit(key, value, hints[key]):
                raise TypeError(f"{name} = {value!r}: must be {allowed}")
        elif isinstance(value, dict):
            check_table(typing.cast(type, hints[key]), value, name)
        else:
            raise TypeError(f"{name} = {value!r}: must be a table, [{name}]")


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
    try:
        validate_hyperparameters(
            getattr(optimizer, "shampoo", None) or ShampooConfig(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"[optimizer] {error}") from None
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
