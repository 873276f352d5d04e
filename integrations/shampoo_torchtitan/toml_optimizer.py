"""The table [optimizer] of a job file in TOML, for TorchTitan 0.3, where a job has a container of
optimizers with groups."""

import dataclasses
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config.override import derive

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import validate_hyperparameters
from shampoo_fsdp.validation import REMOVED
from shampoo_torchtitan.configs import ADAM, HYPERPARAMETERS, NAME, ShampooOptimizers
from shampoo_torchtitan.fields import check_field

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
    if not isinstance(old, ShampooOptimizers.Config):
        return _in_groups(old, name, given, ShampooConfig(**own))
    shampoo = dataclasses.replace(old.shampoo, **own)
    if not old.param_groups and name in (None, NAME):
        return dataclasses.replace(old, shampoo=shampoo, **given)
    return _in_groups(old, name, given, shampoo)


def _check_own(own: dict[str, Any]) -> None:
    for key, value in own.items():
        if key in REMOVED:
            raise ValueError(f"setting {_TABLE}.{key} has been removed: {REMOVED[key]}")
        check_field(ShampooConfig, key, value, _TABLE)
    try:
        ShampooConfig(**own)
    except (TypeError, ValueError) as error:
        raise type(error)(f"[{_TABLE}] {error}") from None


def _in_groups(
    old: OptimizersContainer.Config,
    name: str | None,
    given: dict[str, Any],
    shampoo: ShampooConfig,
) -> OptimizersContainer.Config:
    """With another name and other hyperparameters in the groups of Adam, AdamW and Shampoo; those
    of others, such as Muon, stay."""
    groups = old.param_groups or [ParamGroupConfig(pattern=".*", optimizer_name=NAME)]
    if (name or given) and not any(_is_ours(group) for group in groups):
        setting = "name" if name else next(iter(given))
        found = ", ".join(sorted({group.optimizer_name for group in groups}))
        raise ValueError(
            f"optimizer.{setting} would change nothing: the job's groups are those of {found}, not "
            "of Adam, AdamW or Shampoo"
        )
    common = {}
    if isinstance(old, ShampooOptimizers.Config):
        common = {key: getattr(old, key) for key in HYPERPARAMETERS}
    groups = [
        _changed(group, name, common if group.optimizer_name == NAME else {}, given)
        if _is_ours(group)
        else group
        for group in groups
    ]
    if any(group.optimizer_name == NAME for group in groups):
        # What the job said of all groups is in each of them now, and asks for nothing itself.
        return derive(
            old, ShampooOptimizers.Config, param_groups=groups, shampoo=shampoo, **_defaults()
        )
    return derive(old, OptimizersContainer.Config, param_groups=groups)


def _defaults() -> dict[str, Any]:
    fields = dataclasses.fields(ShampooOptimizers.Config)
    return {field.name: field.default for field in fields if field.name in HYPERPARAMETERS}


def _is_ours(group: ParamGroupConfig) -> bool:
    return group.optimizer_name in (*ADAM, NAME)


def _changed(
    group: ParamGroupConfig, name: str | None, common: dict[str, Any], given: dict[str, Any]
) -> ParamGroupConfig:
    """
    Args:
        common: Hyperparameters that the group has if it does not say others.
        given: Those of the file.
    """
    kept = dict(group.optimizer_kwargs)
    if "betas" in kept:
        kept["beta1"], kept["beta2"] = kept.pop("betas")
    values = common | kept | given
    betas = values.pop("beta1", 0.9), values.pop("beta2", 0.95)
    if not {"beta1", "beta2"}.isdisjoint(common | kept | given):
        values["betas"] = betas
    validate_hyperparameters(
        ShampooConfig(),
        lr=values.get("lr", 1e-3),
        betas=betas,
        eps=values.get("eps", 1e-8),
        weight_decay=values.get("weight_decay", 0.0),
    )
    name = name or group.optimizer_name
    return dataclasses.replace(group, optimizer_name=name, optimizer_kwargs=values)
