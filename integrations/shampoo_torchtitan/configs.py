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

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.hyperparameters import settings_from_keywords, validate_hyperparameters
from shampoo_fsdp.model_groups import typed_parameters
from shampoo_fsdp.runtime.groups import FromModel
from shampoo_fsdp.validation import refuse
from shampoo_torchtitan import checkpoint, metrics
from shampoo_torchtitan.container import (
    JobError,
    ShampooContainer,
    alike_on_all_ranks,
    hyperparameters,
    with_heads,
)
from shampoo_torchtitan.param_groups import (
    HYPERPARAMETERS,
    NAME,
    change_groups,
    groups_with_defaults,
)

__all__ = ["ShampooOptimizers", "in_groups", "shampoo", "use_shampoo"]

_OF_ADAM = ("fused", "foreach")


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
                param_groups=groups_with_defaults(config),
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
        kept = {k: v for k, v in group.items() if k not in (*_OF_ADAM, "param_names")}
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
    beta1, beta2 = _two(betas)
    return ShampooOptimizers.Config(
        param_groups=param_groups or [],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
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
        if type(config) not in (OptimizersContainer.Config, ShampooOptimizers.Config):
            raise ValueError(
                f"the job's optimizers are a {type(config).__qualname__}, which Shampoo would "
                "replace; allowed: TorchTitan's own OptimizersContainer.Config"
            )
        own = settings_from_keywords(settings)
        if isinstance(config, ShampooOptimizers.Config):
            changes = {name: getattr(own, name) for name in settings if hasattr(own, name)}
            own = dataclasses.replace(config.shampoo, **changes)
        beta1, beta2 = (None, None) if betas is None else _two(betas)
        values = (lr, beta1, beta2, eps, weight_decay)
        given = {k: v for k, v in zip(HYPERPARAMETERS, values, strict=True) if v is not None}
        return in_groups(config, NAME, given, own, "it")
    except (TypeError, ValueError) as error:
        raise JobError(f"Bad job settings: use_shampoo: {error}") from None


def in_groups(
    old: OptimizersContainer.Config,
    name: str | None,
    given: dict[str, Any],
    shampoo: ShampooConfig,
    said: str,
) -> OptimizersContainer.Config:
    """A container with what :func:`change_groups` makes of its groups."""
    groups = old.param_groups or [ParamGroupConfig(pattern=".*", optimizer_name=NAME)]
    common = {}
    if isinstance(old, ShampooOptimizers.Config):
        common = {key: getattr(old, key) for key in HYPERPARAMETERS}
    groups = change_groups(groups, name, common, given, shampoo, said)
    if any(group.optimizer_name == NAME for group in groups):
        # What the job said of all groups is in each of them now, and asks for nothing itself.
        fields = dataclasses.fields(ShampooOptimizers.Config)
        defaults = {field.name: field.default for field in fields if field.name in HYPERPARAMETERS}
        return derive(
            old, ShampooOptimizers.Config, param_groups=groups, shampoo=shampoo, **defaults
        )
    return derive(old, OptimizersContainer.Config, param_groups=groups)


def _two(betas: Any) -> tuple[Any, Any]:
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        refuse("betas", betas, "two numbers (beta1, beta2)")
    return betas[0], betas[1]
