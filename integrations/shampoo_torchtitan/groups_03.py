"""Which optimizer has which parameters, as jobs of TorchTitan 0.3 say it: groups, by names."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig, default_adamw

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.runtime.choice import exactly
from shampoo_fsdp.runtime.groups import FromModel
from shampoo_torchtitan.container import ADAM, complete_groups, hyperparameters, named, with_heads

__all__ = ["FIELD", "adam", "complete", "factory", "settings", "with_shampoo"]

NAME = "Shampoo"
"""Of the optimizer, in the groups of a container."""

FIELD = "param_groups"
"""Of a container's configuration, which has what is described here."""


def complete(
    config: Any, model_parts: Sequence[nn.Module], kinds: Mapping[Tensor, type[FromModel]]
) -> Any:
    """A container's configuration, with what Shampoo's groups do not say themselves.

    Args:
        config: A `ShampooOptimizers.Config`.
        kinds: Whether a parameter is one of an embedding.

    Raises:
        ValueError: The job sets what would change nothing.
    """
    factories = config.optimizer_factory_kwargs_by_name
    if factories.get(NAME):
        raise ValueError(
            f"optimizer_factory_kwargs_by_name has {factories[NAME]} for {NAME}: give these in "
            "`shampoo`"
        )
    of_factory = {"config": with_heads(config.shampoo, model_parts), "kinds": kinds}
    return dataclasses.replace(
        config,
        param_groups=_with_common(config),
        optimizer_factory_kwargs_by_name=factories | {NAME: of_factory},
    )


def _with_common(config: Any) -> list[ParamGroupConfig]:
    groups = config.param_groups or [ParamGroupConfig(pattern=".*", optimizer_name=NAME)]
    ours = [group for group in groups if group.optimizer_name == NAME]
    common, defaults = hyperparameters(config), hyperparameters(type(config)())
    for key, value in common.items():
        if value != defaults[key] and ours and all(key in g.optimizer_kwargs for g in ours):
            raise ValueError(
                f"optimizer.{key} = {value} would change nothing: all param_groups of {NAME} have "
                "their own"
            )
    return [
        dataclasses.replace(group, optimizer_kwargs=common | group.optimizer_kwargs)
        if group.optimizer_name == NAME
        else group
        for group in groups
    ]


def factory(name: str) -> Callable[..., Any]:
    """What makes the optimizer of this name."""
    if name == NAME:
        return _build_shampoo
    return OptimizersContainer._resolve_optimizer_factory(name)  # type: ignore[no-any-return]


def _build_shampoo(
    groups: list[dict[str, Any]], kinds: Mapping[Tensor, type[FromModel]], **settings: Any
) -> Shampoo:
    """What TorchTitan calls an optimizer factory; its groups carry `param_names`."""
    optimizer = Shampoo([named(group, kinds) for group in groups], **settings)
    complete_groups(optimizer)
    return optimizer


def with_shampoo(
    config: OptimizersContainer.Config,
    own: ShampooConfig,
    changed: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """What becomes of a container's configuration with Shampoo in all groups of Adam and AdamW.

    Args:
        own: Shampoo's settings.
        changed: The hyperparameters that Shampoo has in the place of another optimizer's.
    """
    groups = [
        dataclasses.replace(
            group,
            optimizer_name=NAME,
            optimizer_kwargs=changed(group.optimizer_kwargs),
        )
        if group.optimizer_name in ADAM
        else group
        for group in config.param_groups
    ]
    return {FIELD: groups, "shampoo": own}


def adam(name: str, **hyperparameters: Any) -> OptimizersContainer.Config:
    """Adam or AdamW of all parameters."""
    config = default_adamw(**hyperparameters)
    config.param_groups[0].optimizer_name = name
    return config


def settings(config: Any, names: Sequence[str]) -> ShampooConfig:
    """What parameters of these names get of the configuration of a container."""
    if not hasattr(config, "shampoo"):
        return ShampooConfig()
    others = [name for name in names if _optimizer_of(name, config.param_groups) != NAME]
    return config.shampoo.completed(exclude=[*config.shampoo.exclude, *map(exactly, others)])  # type: ignore[no-any-return]


def _optimizer_of(name: str, groups: Sequence[ParamGroupConfig]) -> Any:
    """That of the first group that matches."""
    return next((g.optimizer_name for g in groups if re.search(g.pattern, name)), NAME)
