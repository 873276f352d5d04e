"""Shampoo in jobs that are functions, TorchTitan 0.3's.

In a user's own registry function, in the place of `default_adamw(lr=3e-4)`:

    from shampoo_torchtitan.configs import shampoo

    config.optimizer = shampoo(lr=3e-4, precondition_frequency=20)

or on the command line of any job, which keeps its groups and what is not given (lr should be about
3 times AdamW's):

    --override.imports 'shampoo_torchtitan.configs.use_shampoo={"lr": 1e-3}'
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config.override import derive, override
from torchtitan.tools.logging import logger

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.hyperparameters import settings_from_keywords, validate_hyperparameters
from shampoo_fsdp.model_groups import typed_parameters
from shampoo_fsdp.runtime.groups import FromModel
from shampoo_torchtitan import checkpoint, metrics
from shampoo_torchtitan.container import (
    JobError,
    ShampooContainer,
    alike_on_all_ranks,
    hyperparameters,
    with_heads,
)

__all__ = ["ADAM", "NAME", "ShampooOptimizers", "complete_groups", "shampoo", "use_shampoo"]

NAME = "Shampoo"
"""Of the optimizer, in the groups of a container."""

ADAM = ("Adam", "AdamW")
"""Of the optimizers whose place it takes."""


class ShampooOptimizers(ShampooContainer, OptimizersContainer):  # type: ignore[type-arg]
    """TorchTitan's container of optimizers, in which groups may be named "Shampoo"."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """These hyperparameters are those of Shampoo's `param_groups` that do not bring their own;
        without any groups there is one of all parameters."""

        lr: float = 8e-4
        beta1: float = 0.9
        beta2: float = 0.95
        eps: float = 1e-8
        weight_decay: float = 0.1
        shampoo: ShampooConfig = field(default_factory=ShampooConfig)
        """Shampoo's own settings."""

        def __post_init__(self) -> None:
            validate_hyperparameters(self.shampoo, **hyperparameters(self))

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        """
        Raises:
            JobError: The settings do not fit the model, on this rank or on another.
        """
        with alike_on_all_ranks():
            own = with_heads(config.shampoo, model_parts)
            pairs = [pair for part in model_parts for pair in typed_parameters(part)]
            kinds = {pair.parameter: type(pair) for pair in pairs}
            factories = config.optimizer_factory_kwargs_by_name
            if factories.get(NAME):
                raise ValueError(
                    f"optimizer_factory_kwargs_by_name has {factories[NAME]} for {NAME}: give "
                    "these in `shampoo`"
                )
            complete = dataclasses.replace(
                config,
                param_groups=complete_groups(config),
                optimizer_factory_kwargs_by_name=factories
                | {NAME: {"config": own, "kinds": kinds}},
            )
            super().__init__(complete, model_parts=model_parts)
            self.log_summary()  # with it all are planned, which is what may be refused
        if not self.shampoos:
            return
        self.complete_groups(config.implementation)
        checkpoint.extend_checkpoints()
        metrics.extend_metrics()

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name == NAME:
            return _build_shampoo
        return OptimizersContainer._resolve_optimizer_factory(name)  # type: ignore[no-any-return]


def _build_shampoo(
    groups: list[dict[str, Any]], kinds: Mapping[Tensor, type[FromModel]], **settings: Any
) -> Shampoo:
    """What TorchTitan calls an optimizer factory; its groups carry `param_names`."""
    named = []
    for group in groups:
        pairs = [
            kinds[parameter](name, parameter)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
        kept = {k: v for k, v in group.items() if k not in ("fused", "foreach", "param_names")}
        named.append(kept | {"params": pairs})
    optimizer = Shampoo(named, **settings)
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        group["param_names"] = given["param_names"]  # TorchTitan's keys of checkpoints
    return optimizer


def shampoo(
    lr: float = 8e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    param_groups: list[ParamGroupConfig] | None = None,
    **settings: Any,
) -> ShampooOptimizers.Config:
    """For `config.optimizer`, in the place of TorchTitan's `default_adamw(lr=...)`.

    Args:
        lr, betas, eps, weight_decay: Of all parameters, or of those of Shampoo's `param_groups`
            that do not bring their own.
        param_groups: TorchTitan's; those with `optimizer_name="Shampoo"` are Shampoo's.
        **settings: Fields of ShampooConfig.

    Raises:
        ValueError, TypeError: Names the setting, what was found and what is allowed.
    """
    return ShampooOptimizers.Config(
        param_groups=param_groups or [],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        shampoo=settings_from_keywords(settings),
    )


@override(target=OptimizersContainer.Config, description="Shampoo in the place of Adam and AdamW")
def use_shampoo(
    config: OptimizersContainer.Config,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    **settings: Any,
) -> ShampooOptimizers.Config:
    """For `--override.imports`: Shampoo in all groups of Adam and AdamW.

    Args:
        config: The job's.
        lr, betas, eps, weight_decay: Of all these groups; by default each keeps its own. lr should
            be about 3 times AdamW's.
        **settings: Fields of ShampooConfig.

    Raises:
        JobError: The job's container is of another kind, or a setting is not allowed.
    """
    try:
        if type(config) is not OptimizersContainer.Config:
            raise ValueError(
                f"the job's optimizers are a {type(config).__qualname__}, which Shampoo would "
                "replace; allowed: TorchTitan's own OptimizersContainer.Config"
            )
        own = settings_from_keywords(settings)
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        given = {name: value for name, value in values.items() if value is not None}
        groups = [_with_shampoo(group, given, own) for group in config.param_groups]
        if groups == config.param_groups:
            raise ValueError("it would change nothing: the job has no groups of Adam or AdamW")
        return derive(config, ShampooOptimizers.Config, param_groups=groups, shampoo=own)
    except (TypeError, ValueError) as error:
        raise JobError(f"Bad job settings: use_shampoo: {error}") from None


def _with_shampoo(
    group: ParamGroupConfig, given: dict[str, Any], config: ShampooConfig
) -> ParamGroupConfig:
    """A group of Adam or AdamW as one of Shampoo; those of others, such as Muon, stay."""
    if group.optimizer_name not in ADAM:
        return group
    values = group.optimizer_kwargs | given
    defaults = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    validate_hyperparameters(config, **{key: values.get(key, defaults[key]) for key in defaults})
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    if "lr" in values and "lr" not in given:
        logger.warning(
            f"lr = {values['lr']:g} is the one of {group.optimizer_name}; Shampoo is best with "
            "about 3 times that: set lr"
        )
    return dataclasses.replace(group, optimizer_name=NAME, optimizer_kwargs=values)


def complete_groups(config: ShampooOptimizers.Config) -> list[ParamGroupConfig]:
    """The groups, with what those of Shampoo do not say themselves.

    Raises:
        ValueError: The job sets what all of them say themselves.
    """
    groups = config.param_groups or [ParamGroupConfig(pattern=".*", optimizer_name=NAME)]
    ours = [group for group in groups if group.optimizer_name == NAME]
    common, defaults = hyperparameters(config), hyperparameters(ShampooOptimizers.Config())
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
