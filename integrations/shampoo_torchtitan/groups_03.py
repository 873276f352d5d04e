"""Which optimizer has which parameters, as jobs of TorchTitan 0.3 say it: groups, by names."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config.override import derive

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.runtime.groups import FromModel
from shampoo_torchtitan import container

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
    of_factory = {"config": container.with_heads(config.shampoo, model_parts), "kinds": kinds}
    return dataclasses.replace(
        config,
        param_groups=_with_common(config),
        optimizer_factory_kwargs_by_name=factories | {NAME: of_factory},
    )


def _listed(config: Any) -> list[ParamGroupConfig]:
    return config.param_groups or [ParamGroupConfig(pattern=".*", optimizer_name=NAME)]


def _with_common(config: Any) -> list[ParamGroupConfig]:
    ours = [group for group in _listed(config) if group.optimizer_name == NAME]
    common, defaults = container.hyperparameters(config), container.hyperparameters(type(config)())
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
        for group in _listed(config)
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
    optimizer = Shampoo([container.named(group, kinds) for group in groups], **settings)
    container.complete_groups(optimizer)
    return optimizer


def with_shampoo(
    config: OptimizersContainer.Config, own: ShampooConfig, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What becomes of a container's configuration with Shampoo in all groups of Adam and AdamW.

    Args:
        own: Shampoo's settings.
        given: Hyperparameters that Shampoo has in the place of another optimizer's.
    """
    groups = [
        dataclasses.replace(
            group, optimizer_name=NAME, optimizer_kwargs=group.optimizer_kwargs | given
        )
        if group.optimizer_name in container.ADAM
        else group
        for group in config.param_groups
    ]
    return {FIELD: groups, "shampoo": own}


def adam(name: str, config: Any) -> OptimizersContainer.Config:
    """Adam or AdamW of all parameters, with what a `ShampooOptimizers.Config` has of them."""
    values = container.hyperparameters(config)
    group = ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs=values)
    return derive(config, OptimizersContainer.Config, param_groups=[group])  # type: ignore[no-any-return]


def settings(config: Any, names: Sequence[str]) -> ShampooConfig:
    """What parameters of these names get of the configuration of a container."""
    if not hasattr(config, "shampoo"):
        return ShampooConfig()
    listed = _listed(config)
    ours = [group for group in listed if group.optimizer_name == NAME]
    return container.without_others(config.shampoo, listed, ours, names)
