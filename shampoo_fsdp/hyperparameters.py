"""What keyword arguments say, and parameter groups: lr, betas, eps and weight_decay."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.validation import TORCH_OPTIONS, check_torch_options, refuse, refuse_unknown

__all__ = ["settings_from_keywords", "validate_hyperparameters"]


@dataclass(frozen=True)
class GroupSettings:
    """What a parameter group says, on this step, defaults resolved."""

    lr: float
    betas: tuple[float, float]
    """Of the momentum and of the factors."""
    beta3: float
    eps: float
    graft_beta2: float
    graft_eps: float
    weight_decay: float
    lost: float
    """The share of its weights that the group loses on this step."""

    @classmethod
    def of(
        cls, group: Mapping[str, Any], config: ShampooConfig, excluded_lr_factor: float = 1.0
    ) -> "GroupSettings":
        """
        Args:
            group: of the optimizer; its lr may be a tensor on the CPU, and its `lr_factor` may have
                been taken out: then it is 1.
            excluded_lr_factor: one more multiple of its lr. Neither changes "independent" weight
                decay.
        """

        def scaled(lr: Any) -> float:
            return excluded_lr_factor * (float(lr) * float(group.get("lr_factor", 1.0)))

        lr, initial = scaled(group["lr"]), scaled(group.get("initial_lr", group["lr"]))
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        lost = {
            "decoupled": lr * decay,
            "independent": decay * (lr / initial if initial else 1.0),
            "l2": 0.0,
        }
        return cls(
            lr=lr,
            betas=(beta1, beta2),
            beta3=beta1 * beta1 if config.beta3 is None else config.beta3,
            eps=group["eps"],
            graft_beta2=beta2 if config.grafting_beta2 is None else config.grafting_beta2,
            graft_eps=group["eps"] if config.grafting_eps is None else config.grafting_eps,
            weight_decay=decay,
            lost=lost[config.weight_decay_type],
        )


def _is_number(value: Any) -> bool:
    """Whether it is finite and real; numpy's numbers count as well."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def validate_hyperparameters(
    config: ShampooConfig, *, lr: Any, betas: Any, eps: Any, weight_decay: Any
) -> None:
    """Raise a ValueError that names the first entry of a parameter group that is not allowed."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not _is_number(value) or value < 0.0:
            refuse(name, value, "a finite number >= 0")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(map(_is_number, betas))):
        refuse("betas", betas, "two numbers (beta1, beta2)")
    beta1, beta2 = betas
    if not 0.0 <= beta1 < 1.0:
        refuse("beta1", beta1, "0 <= beta1 < 1")
    if config.beta3 and not beta1:
        refuse("beta3", config.beta3, "nothing but 0 if beta1 is 0, where there is no momentum")
    if not 0.0 <= beta2 <= 1.0:
        refuse("beta2", beta2, "0 <= beta2 <= 1 (1 sums the factors instead of averaging them)")
    if beta2 == 1.0 and config.rule.averages:
        rule = config.preconditioner
        refuse("beta2", beta2, f"a number below 1 for {rule}, whose factors are averages")
    method = config.elementwise_method
    if beta2 == 1.0 and config.grafting_beta2 is None and method in ("adam", "rmsprop"):
        allowed = f"a number below 1, or a 'grafting_beta2' with which '{method}' averages instead"
        refuse("beta2", beta2, allowed)


def settings_from_keywords(keywords: Mapping[str, Any]) -> ShampooConfig:
    """The configuration for keyword arguments; a TypeError names an unknown one.

    Options of torch.optim's optimizers are checked and left out. A `ShampooConfig` may come in
    place of its fields, as `config`.
    """
    if isinstance(config := keywords.get("config"), ShampooConfig):
        return config
    check_torch_options(keywords)
    keywords = {name: value for name, value in keywords.items() if name not in TORCH_OPTIONS}
    known = [f.name for f in dataclasses.fields(ShampooConfig)]
    for name in keywords:
        refuse_unknown(name, known, everywhere=("lr", "betas", "eps", "weight_decay", *known))
    return ShampooConfig(**keywords)
