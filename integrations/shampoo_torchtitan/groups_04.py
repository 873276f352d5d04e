"""Which optimizer has which parameters, as jobs of TorchTitan 0.4 say it: each optimizer is a class
whose Config has a pattern, and Shampoo is one of them."""

import contextlib
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchtitan.components.optimizer import Adam, AdamW, BaseOptimizer, OptimizersContainer

import shampoo_fsdp
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import validate_hyperparameters
from shampoo_fsdp.runtime.groups import FromModel
from shampoo_torchtitan import checkpoint, metrics
from shampoo_torchtitan.container import (
    alike_on_all_ranks,
    complete_groups,
    hyperparameters,
    log_summary,
    named,
    with_heads,
    without_others,
)

FIELD = "optimizers"
"""Of a container's configuration, which has what is described here."""

_SETTINGS = dataclasses.fields(ShampooConfig)


@dataclass(kw_only=True, slots=True)
class _Config(BaseOptimizer.Config):
    lr: float = 8e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    _kinds: Mapping[Tensor, type[FromModel]] | None = None
    """Whether a parameter is one of an embedding; None if only its name tells."""

    def __post_init__(self) -> None:
        validate_hyperparameters(self.shampoo, **_hyperparameters(self))

    @property
    def shampoo(self) -> ShampooConfig:
        """Shampoo's own settings."""
        return ShampooConfig(**{field.name: getattr(self, field.name) for field in _SETTINGS})

    @shampoo.setter
    def shampoo(self, settings: ShampooConfig) -> None:
        for name, value in vars(settings).items():
            setattr(self, name, value)


def _hyperparameters(of: Any) -> dict[str, Any]:
    """Of one optimizer's Config."""
    return {name: getattr(of, name) for name in ("lr", "betas", "eps", "weight_decay")}


class Shampoo(shampoo_fsdp.Shampoo, BaseOptimizer):
    """Shampoo as an optimizer that jobs of TorchTitan 0.4 list:

        OptimizersContainer.Config(
            optimizers=[Shampoo.Config(pattern="layers", lr=1e-3), AdamW.Config(pattern=".*")]
        )

    `Config` has `pattern`, `lr`, `betas`, `eps`, `weight_decay` and the fields of
    :class:`shampoo_fsdp.ShampooConfig`. Embeddings are known by their names, as the container gives
    no types; `head_dim` must be given with `split_heads`.
    """

    Config = dataclasses.make_dataclass(
        "Config",
        [(field.name, field.type, copy.copy(field)) for field in _SETTINGS],
        bases=(_Config,),
        kw_only=True,
        slots=True,
    )

    def __init__(self, config: Any, *, params: Any) -> None:
        """
        Args:
            config: A `Shampoo.Config`.
            params: One group, with 'param_names'.

        Raises:
            JobError: The settings do not fit the parameters, on this rank or on another.
        """
        kinds = config._kinds
        groups = list(params) if kinds is None else [named(group, kinds) for group in params]
        with alike_on_all_ranks() if kinds is None else contextlib.nullcontext():
            super().__init__(groups, **_hyperparameters(config), config=config.shampoo)
            if kinds is None:
                log_summary([self])
        complete_groups(self, fused=True, foreach=None)  # AdamW's defaults
        checkpoint.extend_checkpoints()
        metrics.extend_metrics()


def complete(
    config: Any, model_parts: Sequence[nn.Module], kinds: Mapping[Tensor, type[FromModel]]
) -> Any:
    """A container's configuration, with what the model says to those of Shampoo.

    Args:
        config: A `ShampooOptimizers.Config`.
        kinds: Whether a parameter is one of an embedding.

    Raises:
        ValueError: The job sets what would change nothing.
    """
    optimizers = [
        dataclasses.replace(of, head_dim=with_heads(of.shampoo, model_parts).head_dim, _kinds=kinds)
        if isinstance(of, Shampoo.Config)
        else of
        for of in _listed(config)
    ]
    return dataclasses.replace(config, optimizers=optimizers)


def _listed(config: Any) -> list[Any]:
    """The optimizers that a `ShampooOptimizers.Config` lists, or the one of its other fields."""
    if not config.optimizers:
        return [Shampoo.Config(pattern=".*", **hyperparameters(config), **vars(config.shampoo))]
    if dataclasses.replace(config, optimizers=[]) != type(config)():
        raise ValueError(
            f"settings of the container would change nothing: its {len(config.optimizers)} "
            "optimizers have their own"
        )
    return list(config.optimizers)


def with_shampoo(
    config: OptimizersContainer.Config, own: ShampooConfig, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What becomes of a container's configuration with Shampoo in the place of Adam and AdamW.

    Args:
        own: Shampoo's settings.
        given: Hyperparameters that Shampoo has in the place of another optimizer's.
    """
    optimizers = [
        Shampoo.Config(pattern=of.pattern, **_hyperparameters(of) | given, **vars(own))
        if isinstance(of, Adam.Config | AdamW.Config)
        else of
        for of in config.optimizers
    ]
    return {FIELD: optimizers}


def adam(name: str, config: Any) -> OptimizersContainer.Config:
    """Adam or AdamW of all parameters, with what a `ShampooOptimizers.Config` has of them."""
    of = {"Adam": Adam, "AdamW": AdamW}[name].Config(pattern=".*", **hyperparameters(config))
    return OptimizersContainer.Config(optimizers=[of])


def settings(config: Any, names: Sequence[str]) -> ShampooConfig:
    """What parameters of these names get of the configuration of a container.

    Raises:
        ValueError: There are several Shampoos, of different settings.
    """
    listed = _listed(config) if hasattr(config, "shampoo") else config.optimizers
    ours = [of for of in listed if isinstance(of, Shampoo.Config)]
    if any(of.shampoo != ours[0].shampoo for of in ours):
        raise ValueError(
            f"the job has {len(ours)} Shampoos of different settings, and `plan` knows one kind"
        )
    return without_others(ours[0].shampoo, listed, ours, names) if ours else ShampooConfig()
