"""The table [optimizer] of a job file in TOML, for TorchTitan 0.3, where a job has a container of
optimizers with groups."""

import dataclasses
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.validation import check_fields
from shampoo_torchtitan.configs import ShampooOptimizers, in_groups
from shampoo_torchtitan.param_groups import ADAM, HYPERPARAMETERS, NAME

__all__ = ["choose_optimizer"]


def choose_optimizer(
    old: OptimizersContainer.Config, table: dict[str, Any], *, of_user: bool
) -> OptimizersContainer.Config:
    """The optimizer of a job.

    Args:
        old: What the job has without the file's settings.
        table: [optimizer] of the file; what is used is taken out.
        of_user: Whether `old` is the user's, whose groups stay, and no default.

    Raises:
        ValueError, TypeError: Names the setting and what is allowed.
    """
    name = table.pop("name", None)
    given = {key: table.pop(key) for key in (*HYPERPARAMETERS, "shampoo") if key in table}
    check_fields(ShampooOptimizers.Config, given, "optimizer")
    own = given.pop("shampoo", {})
    if isinstance(name, str) and name.lower() == NAME.lower():
        name = NAME
    elif name is not None and name not in ADAM:
        raise ValueError(f"optimizer.name = {name!r}: must be one of shampoo, Adam, AdamW")

    of_shampoo = isinstance(old, ShampooOptimizers.Config)
    shampoo = dataclasses.replace(old.shampoo, **own) if of_shampoo else ShampooConfig(**own)
    if name == NAME and not of_user:
        return ShampooOptimizers.Config(shampoo=shampoo, **given)
    if of_shampoo and not old.param_groups and name in (None, NAME):
        return dataclasses.replace(old, shampoo=shampoo, **given)
    said = ["name"] * (name is not None) + list(given)
    return in_groups(old, name, given, shampoo, f"optimizer.{said[0]}" if said else "")
