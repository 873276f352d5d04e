"""Shampoo in jobs that are functions, as those of TorchTitan 0.3 and newer.

In a user's own registry function, in the place of `default_adamw(lr=3e-4)`:

    from shampoo_torchtitan.configs import shampoo

    config.optimizer = shampoo(lr=3e-4, precondition_frequency=20)

or on the command line of any job, which keeps its groups and what is not given:

    --override.imports shampoo_torchtitan.configs.use_shampoo
    --override.imports 'shampoo_torchtitan.configs.use_shampoo={"precondition_frequency": 20}'
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive, override
from torchtitan.tools.logging import logger

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import settings_from_keywords, validate_hyperparameters
from shampoo_fsdp.model_groups import typed_parameters
from shampoo_fsdp.validation import name_some
from shampoo_torchtitan import checkpoint, container, metrics
from shampoo_torchtitan.generation import groups

__all__ = ["ShampooOptimizers", "shampoo", "use_shampoo"]


class ShampooOptimizers(OptimizersContainer):  # type: ignore[misc]
    """TorchTitan's container of optimizers, which tells Shampoo what only the model knows: which
    parameters are embeddings, and the rows of a head."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
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
            validate_hyperparameters(self.shampoo, **container.hyperparameters(self))

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        """
        Raises:
            JobError: The settings do not fit the model, on this rank or on another.
        """
        with container.alike_on_all_ranks():
            pairs = [pair for part in model_parts for pair in typed_parameters(part)]
            kinds = {pair.parameter: type(pair) for pair in pairs}
            complete = groups().complete(config, model_parts, kinds)
            super().__init__(complete, model_parts=model_parts)
            # With it all are planned, which is what may be refused.
            container.log_summary(container.shampoos_of(self))
        if container.shampoos_of(self):
            checkpoint.extend_checkpoints()
            metrics.extend_metrics()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As TorchTitan's, which leaves out what nothing here asks for; that is named."""
        super().load_state_dict(container.with_lr_factors(self, state_dict))
        here = {
            f"state.{name}.{entry}"
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            for entry in optimizer.state[parameter]
        }
        # An entry may be a dict, whose keys follow.
        asked = lambda key: not here.isdisjoint(accumulate(key.split("."), "{}.{}".format))  # noqa: E731
        unused = [key for key in state_dict if key.startswith("state.") and not asked(key)]
        if unused:
            logger.warning(f"The saved {name_some(unused)} is not used: there is none here.")

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return groups().factory(name)  # type: ignore[no-any-return]


def shampoo(
    lr: float = 8e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    param_groups: Sequence[Any] = (),
    **settings: Any,
) -> ShampooOptimizers.Config:
    """For `config.optimizer`, in the place of TorchTitan's `default_adamw(lr=...)`.

    Args:
        lr, betas, eps, weight_decay: Of all parameters, or of those of Shampoo's `param_groups`
            that do not bring their own.
        param_groups: TorchTitan's. With 0.3 those with `optimizer_name="Shampoo"` are Shampoo's;
            with 0.4 they are `Shampoo.Config(pattern=...)`, which bring their own of everything,
            and configs of others.
        **settings: Fields of ShampooConfig.

    Raises:
        ValueError, TypeError: Names the setting, what was found and what is allowed.
    """
    return ShampooOptimizers.Config(
        **{groups().FIELD: list(param_groups)},
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
        lr, betas, eps, weight_decay: Of all these groups; by default each keeps its own.
        **settings: Fields of ShampooConfig.

    Raises:
        JobError: The job's container is of another kind, or a setting is not allowed.
    """
    values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    given = {name: value for name, value in values.items() if value is not None}
    try:
        if type(config) is not OptimizersContainer.Config:
            raise ValueError(
                f"the job's optimizers are a {type(config).__qualname__}, which Shampoo would "
                "replace; allowed: TorchTitan's own OptimizersContainer.Config"
            )
        own = settings_from_keywords(settings)
        validate_hyperparameters(
            own, **container.hyperparameters(ShampooOptimizers.Config()) | given
        )
        if betas is not None:
            given["betas"] = tuple(betas)  # of JSON
        found = groups().with_shampoo(config, own, given)
        if found[groups().FIELD] == getattr(config, groups().FIELD):
            raise ValueError("it would change nothing: the job has no groups of Adam or AdamW")
        return derive(config, ShampooOptimizers.Config, **found)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise container.JobError(f"Bad job settings: use_shampoo: {error}") from None
