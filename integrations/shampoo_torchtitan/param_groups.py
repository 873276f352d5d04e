"""Parameter groups of TorchTitan 0.3's containers, in which some are Shampoo's."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan.tools.logging import logger

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import validate_hyperparameters
from shampoo_torchtitan.container import hyperparameters

__all__ = ["ADAM", "HYPERPARAMETERS", "NAME", "change_groups", "groups_with_defaults"]

NAME = "Shampoo"
"""Of the optimizer, in the groups of a container."""

ADAM = ("Adam", "AdamW")
"""Of the optimizers whose place it takes."""
HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps", "weight_decay")


def groups_with_defaults(config: Any) -> list[ParamGroupConfig]:
    """With what Shampoo's groups do not say themselves.

    Args:
        config: A ShampooOptimizers.Config.

    Raises:
        ValueError: The job sets what all of them say themselves.
    """
    common = hyperparameters(config)
    groups = config.param_groups or [ParamGroupConfig(pattern=".*", optimizer_name=NAME)]
    ours = [group for group in groups if group.optimizer_name == NAME]
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in HYPERPARAMETERS:
        key = "betas" if name.startswith("beta") else name
        value = getattr(config, name)
        if value != defaults[name] and ours and all(key in g.optimizer_kwargs for g in ours):
            raise ValueError(
                f"optimizer.{name} = {value} would change nothing: all param_groups of {NAME} have "
                f"{key!r} of their own"
            )
    return [
        dataclasses.replace(group, optimizer_kwargs=common | group.optimizer_kwargs)
        if group.optimizer_name == NAME
        else group
        for group in groups
    ]


def change_groups(
    groups: Sequence[ParamGroupConfig],
    name: str | None,
    common: dict[str, Any],
    given: dict[str, Any],
    shampoo: ShampooConfig,
    said: str,
) -> list[ParamGroupConfig]:
    """With another name and other hyperparameters in the groups of Adam, AdamW and Shampoo; those
    of others, such as Muon, stay.

    Args:
        name: Of the optimizer; None for that of each group.
        common: Hyperparameters of Shampoo's groups that do not say others.
        given: Those that win. Both by their names in HYPERPARAMETERS.
        said: What asks for the change, in an error; "" if nothing does.

    Raises:
        ValueError: There are no such groups, or a hyperparameter is not allowed.
    """
    ours = [group for group in groups if group.optimizer_name in (*ADAM, NAME)]
    if said and not ours:
        found = ", ".join(sorted({group.optimizer_name for group in groups}))
        raise ValueError(
            f"{said} would change nothing: the job's groups are those of {found}, not of Adam, "
            "AdamW or Shampoo"
        )
    return [
        _changed(group, name, common if group.optimizer_name == NAME else {}, given, shampoo)
        if group in ours
        else group
        for group in groups
    ]


def _changed(
    group: ParamGroupConfig,
    name: str | None,
    common: dict[str, Any],
    given: dict[str, Any],
    shampoo: ShampooConfig,
) -> ParamGroupConfig:
    kept = dict(group.optimizer_kwargs)
    if "betas" in kept:
        kept["beta1"], kept["beta2"] = kept.pop("betas")
    values = common | kept | given
    betas = values.pop("beta1", 0.9), values.pop("beta2", 0.95)
    if not {"beta1", "beta2"}.isdisjoint(common | kept | given):
        values["betas"] = betas
    validate_hyperparameters(
        shampoo,
        lr=values.get("lr", 1e-3),
        betas=betas,
        eps=values.get("eps", 1e-8),
        weight_decay=values.get("weight_decay", 0.0),
    )
    new = name or group.optimizer_name
    if new == NAME and group.optimizer_name in ADAM and "lr" in values and "lr" not in given:
        logger.warning(
            f"lr = {values['lr']:g} is the one of {group.optimizer_name}; Shampoo is best with "
            "about 3 times that: set lr"
        )
    return dataclasses.replace(group, optimizer_name=new, optimizer_kwargs=values)
