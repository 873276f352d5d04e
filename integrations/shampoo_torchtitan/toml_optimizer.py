"""The table [optimizer] of a job file in TOML, for TorchTitan 0.3, where a job has a container of
optimizers with groups."""

import dataclasses
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.validation import REMOVED
from shampoo_torchtitan.configs import ShampooOptimizers, in_groups
from shampoo_torchtitan.fields import check_field
from shampoo_torchtitan.param_groups import ADAM, HYPERPARAMETERS, NAME

__all__ = ["choose_optimizer"]

_TABLE = "optimizer.shampoo"


def choose_optimizer(
    old: OptimizersContainer.Config, settings: dict[str, Any], *, of_user: bool
) -> OptimizersContainer.Config:
    """The optimizer of a job.

    Args:
        old: What the job has without the file's settings.
        settings: Those of the file, by name with dots; what is used is taken out.
        of_user: Whether `old` is the user's, whose groups stay, and no default.

    Raises:
        ValueError, TypeError: Names the setting and what is allowed.
    """
    name = settings.pop("optimizer.name", None)
    for key in ("optimizer", _TABLE):
        if key in settings:
            raise TypeError(f"{key} = {settings[key]!r}: must be a table, [{key}]")
    own = {key: settings.pop(key) for key in list(settings) if key.startswith(f"{_TABLE}.")}
    own = {key.removeprefix(f"{_TABLE}."): value for key, value in own.items()}
    _check_own(own)  # also if the job has AdamW just now
    keys = [key for key in HYPERPARAMETERS if f"optimizer.{key}" in settings]
    given = {key: settings.pop(f"optimizer.{key}") for key in keys}
    for key, value in given.items():
        check_field(ShampooOptimizers.Config, key, value, "optimizer")
    if isinstance(name, str) and name.lower() == NAME.lower():
        name = NAME
    elif name is not None and name not in ADAM:
        raise ValueError(f"optimizer.name = {name!r}: must be one of shampoo, Adam, AdamW")

    if name == NAME and not of_user:
        return ShampooOptimizers.Config(shampoo=ShampooConfig(**own), **given)
    of_shampoo = isinstance(old, ShampooOptimizers.Config)
    shampoo = dataclasses.replace(old.shampoo if of_shampoo else ShampooConfig(), **own)
    if of_shampoo and not old.param_groups and name in (None, NAME):
        return dataclasses.replace(old, shampoo=shampoo, **given)
    said = ["name"] * (name is not None) + list(given)
    return in_groups(old, name, given, shampoo, f"optimizer.{said[0]}" if said else "")


def _check_own(own: dict[str, Any]) -> None:
    for key, value in own.items():
        if key in REMOVED:
            raise ValueError(f"setting {_TABLE}.{key} has been removed: {REMOVED[key]}")
        check_field(ShampooConfig, key, value, _TABLE)
    try:
        ShampooConfig(**own)
    except (TypeError, ValueError) as error:
        raise type(error)(f"[{_TABLE}] {error}") from None
