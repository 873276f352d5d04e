"""Parameter groups: their parameters and names as they are given, and as checkpoints have them."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any, NamedTuple

from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import validate_hyperparameters
from shampoo_fsdp.validation import (
    TORCH_OPTIONS,
    check_fields,
    check_torch_options,
    name_some,
    refuse,
)

__all__ = ["FromEmbedding", "FromModel", "plain_name"]

_logger = getLogger(__name__)

# Wrappers (torch.compile, activation checkpointing, DDP) put these into names; a parameter is the
# same one with and without them.
_WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+|_orig_mod\.|_checkpoint_wrapped_module\.")


class FromModel(NamedTuple):
    """A parameter with its name, for torch.optim as any pair, whose module's type is known."""

    name: str
    parameter: Tensor


class FromEmbedding(FromModel):
    """One of an embedding."""


def check_entries(group: Any) -> None:
    """Raise a TypeError or ValueError if a parameter group has what groups cannot have."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"expected a parameter group with the key 'params', found {group!r}.")
    for field in dataclasses.fields(ShampooConfig):
        if field.name in group and field.name != "lr_factor":
            raise ValueError(f"setting '{field.name}' is no group's: give it to Shampoo.")
    check_torch_options(group)


def take_types(group: dict[str, Any]) -> dict[str, bool]:
    """Which parameters of a group are of embeddings, by name, where a model has told it; to be
    asked before torch.optim, which keeps names and tensors alone."""
    params = group["params"]
    if isinstance(params, Tensor | set):
        return {}
    params = group["params"] = list(params)
    of_model = [pair for pair in params if isinstance(pair, FromModel)]
    return {plain_name(pair.name): isinstance(pair, FromEmbedding) for pair in of_model}


def check_group(config: ShampooConfig, group: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first entry of a parameter group that is not allowed."""
    check_fields(ShampooConfig, {"lr_factor": group.get("lr_factor", 1.0)})
    values = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    if isinstance(lr := group["lr"], Tensor):
        if lr.device.type != "cpu" or lr.numel() != 1 or not lr.is_floating_point():
            refuse(
                "lr", lr, "a finite number >= 0, or a tensor of one, of floating point, on the CPU"
            )
        values["lr"] = float(lr)
    validate_hyperparameters(config, **values)


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The parameters' names in each group; their positions where they have none."""
    positions = map(str, itertools.count())
    unnamed = [list(itertools.islice(positions, len(group["params"]))) for group in groups]
    names = [group.get("param_names", own) for group, own in zip(groups, unnamed, strict=True)]
    return [list(map(plain_name, own)) for own in names]


def named_parameters(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, Tensor, int]]:
    """All parameters, with their names and the numbers of their groups."""
    pairs = enumerate(zip(names_of(groups), groups, strict=True))
    return [(n, p, g) for g, (own, of) in pairs for n, p in zip(own, of["params"], strict=True)]


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    return _WRAPPERS.sub("", name)


def find_saved(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[Mapping[str, Any] | None]]:
    """The keys of the saved state that belong to the parameters here, by name, and the saved
    settings of each group here, None where there are none.

    Parameters are told by their names where both optimizers know them and differ, else by their
    order.

    Args:
        groups: of the optimizer here.
        saved_groups: of the state dict.

    Raises:
        ValueError: if neither names nor numbers of parameters tell which is which.
    """
    names = names_of(groups)
    saved_names = [group.get("param_names", ()) for group in saved_groups]
    theirs = [[plain_name(name) for name in group] for group in saved_names]
    sizes = [len(group) for group in names]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    # (The keys of torch.distributed.checkpoint.state_dict are names of the parameters here.)
    numbered = all(isinstance(key, int) for group in saved_groups for key in group["params"])
    named = "param_names" in groups[0] and numbered and any(theirs)
    named = named and list(map(len, theirs)) == saved_sizes
    if sizes == saved_sizes and not (named and theirs != names):
        pairs = zip(names, saved_groups, strict=True)
        keys = {n: k for ours, g in pairs for n, k in zip(ours, g["params"], strict=True)}
        return keys, list(saved_groups)
    home = {name: (g, k) for g, group in enumerate(theirs) for k, name in enumerate(group)}
    found = {name: home[name] for group in names for name in group if name in home}
    if not named or not found:
        raise ValueError(
            f"the state dict has groups of {saved_sizes} parameters, here they have {sizes}, and "
            "no names tell which is which: build both optimizers with model.named_parameters()."
        )
    if unused := [name for name in home if name not in found]:
        _logger.warning(f"The saved state of {name_some(unused)} is not used.")
    keys = {name: saved_groups[g]["params"][k] for name, (g, k) in found.items()}
    sources = [next((found[name][0] for name in group if name in found), None) for group in names]
    return keys, [None if source is None else saved_groups[source] for source in sources]


def settings_to_load(
    config: ShampooConfig,
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any] | None],
) -> list[dict[str, Any]]:
    """Copies of the saved settings that each parameter group takes over.

    Raises:
        ValueError: names a setting whose saved value is not allowed.
    """
    result = []
    for group, saved in zip(groups, saved_groups, strict=True):
        check_torch_options(saved or {})
        # (AdamW's groups have torch's options. Names are those that state was made by.)
        left_out = {"params", "param_names", *(TORCH_OPTIONS.keys() - group.keys())}
        settings = {k: copy.deepcopy(v) for k, v in (saved or {}).items() if k not in left_out}
        # (lr is what a schedule has made of it, negative after its end.)
        check_group(config, {**group, **settings, "lr": 0.0})
        result.append(settings)
    return result


def warn_of_initial_lr(
    groups: Sequence[Mapping[str, Any]], own_lrs: Sequence[tuple[float | None, float]]
) -> None:
    """Say where the one that was loaded is not this job's, given its own initial lr and lr."""
    for group, (initial, lr) in zip(groups, own_lrs, strict=True):
        own, then = lr if initial is None else initial, group.get("initial_lr", group["lr"])
        if then != own:
            _logger.warning(
                f"The initial lr is {then} in the checkpoint and {own} here. Independent weight "
                "decay is relative to this job's if a schedule sets another lr than was loaded."
            )


def settle_initial_lr(
    groups: Sequence[dict[str, Any]],
    own_lrs: Sequence[tuple[float | None, float]],
    loaded_lrs: Sequence[float],
) -> None:
    """After loading: if a schedule of this job has set another lr than the checkpoint's, go by
    this job's initial lr, which "independent" weight decay is relative to."""
    for group, (initial, lr), loaded in zip(groups, own_lrs, loaded_lrs, strict=False):
        now, own = float(group["lr"]), lr if initial is None else initial
        if "initial_lr" in group and now != loaded and (initial is not None or now == own):
            group["initial_lr"] = own
