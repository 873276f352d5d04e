"""Loading a state dict: which of its entries belong to which parameter, and copying them."""

import copy
from collections.abc import Collection, Mapping, Sequence
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_fsdp.config import (
    TORCH_OPTIONS,
    ShampooConfig,
    check_torch_options,
    validate_hyperparameters,
)
from shampoo_fsdp.layout import shard_rectangle
from shampoo_fsdp.load_decision import LoadDecision, is_state_entry
from shampoo_fsdp.mismatch import name_some
from shampoo_fsdp.parameters import plain_name
from shampoo_fsdp.state import OwnedBlocks, ShardedBlocks, local_parts

__all__ = [
    "carry_out",
    "find_saved",
    "flat",
    "other_pieces",
    "settings_to_load",
    "strangers",
]

_logger = getLogger(__name__)

State = Mapping[str, Mapping[str, Any]]
"""The entries of each parameter, by the names of both."""


def find_saved(
    names: Sequence[Sequence[str]], given: bool, saved_groups: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[Mapping[str, Any] | None]]:
    """The keys of the saved state that belong to the parameters here, by name, and the saved
    settings of each group here, None where there are none.

    Parameters are told by their names where both optimizers know them and differ, else by their
    order.

    Args:
        names: of the parameters here, by group.
        given: whether these are more than numbers.
        saved_groups: of the state dict.

    Raises:
        ValueError: if neither names nor numbers of parameters tell which is which.
    """
    saved_names = [group.get("param_names", ()) for group in saved_groups]
    theirs = [[plain_name(name) for name in group] for group in saved_names]
    sizes = [len(group) for group in names]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    # (The keys of torch.distributed.checkpoint.state_dict are names of the parameters here.)
    numbered = all(isinstance(key, int) for group in saved_groups for key in group["params"])
    named = given and numbered and list(map(len, theirs)) == saved_sizes and any(theirs)
    if sizes == saved_sizes and not (named and theirs != list(map(list, names))):
        pairs = zip(names, saved_groups, strict=True)
        keys = {n: k for ours, g in pairs for n, k in zip(ours, g["params"], strict=True)}
        return keys, list(saved_groups)
    home = {name: (g, k) for g, group in enumerate(theirs) for k, name in enumerate(group)}
    found = {name: home[name] for group in names for name in group if name in home}
    if not named or not found:
        raise ValueError(
            f"the state dict has groups of {saved_sizes} parameters, here they have "
            f"{sizes}, and no names tell which is which: build both "
            "optimizers with named parameters, as model.named_parameters() gives them, of one "
            "model."
        )
    if unused := [name for name in home if name not in found]:
        _logger.warning(f"The saved state of {name_some(unused)} is not used.")
    keys = {name: saved_groups[g]["params"][k] for name, (g, k) in found.items()}
    sources = [next((found[name][0] for name in group if name in found), None) for group in names]
    return keys, [None if source is None else saved_groups[source] for source in sources]


def settings_to_load(
    config: ShampooConfig, group: Mapping[str, Any], saved: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Copies of the saved settings that a parameter group takes over.

    Raises:
        ValueError: names a setting whose saved value is not allowed.
    """
    saved = saved or {}
    check_torch_options(saved)
    left_out = {"params", *(TORCH_OPTIONS - group.keys())}  # AdamW's groups have these
    settings = {k: copy.deepcopy(v) for k, v in saved.items() if k not in left_out}
    if "param_names" in group or len(settings.get("param_names", ())) != len(group["params"]):
        settings.pop("param_names", None)
    # (lr is what a schedule has made of it, negative after its end.)
    loaded = {**group, **settings, "lr": 0.0}
    names = ("lr", "betas", "eps", "weight_decay")
    validate_hyperparameters(config, **{name: loaded[name] for name in names})
    return settings


def flat(state: State) -> dict[str, Any]:
    """The entries that this package knows, by the keys that checkpoints have for them."""
    return {
        f"state.{name}.{entry}": torch.as_tensor(value)
        for name, entries in state.items()
        for entry, value in entries.items()
        if is_state_entry(entry)
    }


def strangers(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the entries of a parameter that others have put into its state."""
    return {e: copy.deepcopy(v) for e, v in entries.items() if not is_state_entry(e)}


def other_pieces(
    here: Mapping[str, Any], saved: Mapping[str, Any], decision: LoadDecision
) -> list[str]:
    """Keys of the entries whose saved pieces on this rank are not those that it needs.

    Raises:
        ValueError: if they are on no other rank either, or were not read completely.
    """
    keys = []
    for key, value in here.items():
        if key in decision.left_out:
            continue
        source = saved[decision.renamed.get(key, key)]
        if isinstance(source, ShardedBlocks | OwnedBlocks):
            mine, theirs = _local(value), _local(source)
            assert isinstance(theirs, OwnedBlocks)
            theirs.check_read(f"'{key}'")
            if isinstance(mine, OwnedBlocks) and theirs.has_pieces_of(mine):
                continue
            if isinstance(source, ShardedBlocks):
                keys.append(key)
            elif not theirs.complete:
                raise ValueError(
                    f"'{key}' is the part of another rank; to change the mesh, use a full state "
                    "dict (StateDictOptions(full_state_dict=True)), or save and load with "
                    "torch.distributed.checkpoint."
                )
    return keys


def carry_out(
    here: Mapping[str, Any],
    saved: Mapping[str, Any],
    decision: LoadDecision,
    gathered: Collection[str],
) -> None:
    """Copy saved entries, keeping types and devices, as was decided.

    Args:
        here, saved: see :func:`flat`.
        gathered: keys of entries whose pieces all ranks put together first.
    """
    for key in decision.to_zero:
        for part in local_parts(here[key]):
            part.detach().zero_()
    for key, value in here.items():
        if key not in decision.left_out:
            source = saved[decision.renamed.get(key, key)]
            _copy(value, source.full_tensor() if key in gathered else source)
    for key in decision.renamed:
        steps = here[decision.step_of[key]].clamp(min=1.0)
        for part in local_parts(here[key]):
            part.mul_(steps if key.endswith(".sum") else 1.0 / steps)


def _copy(value: Tensor, source: Tensor) -> None:
    if source is value:  # it was read in place
        return
    mine = _local(value)
    if isinstance(mine, OwnedBlocks):
        theirs = _local(source)
        whole = isinstance(source, DTensor) and not isinstance(theirs, OwnedBlocks)
        mine.load(source.full_tensor() if whole else theirs)  # type: ignore[attr-defined]
    elif isinstance(value, DTensor) and not isinstance(source, DTensor):
        coordinate = value.device_mesh.get_coordinate()
        if coordinate is not None:
            rectangle = shard_rectangle(
                value.shape, value.device_mesh.shape, value.placements, coordinate
            )
            value.to_local().copy_(source[tuple(slice(*interval) for interval in rectangle)])
    elif isinstance(source, DTensor) and not isinstance(value, DTensor):
        value.copy_(source.full_tensor())
    else:
        value.copy_(source)


def _local(entry: Tensor) -> Tensor:
    return entry.to_local() if isinstance(entry, DTensor) else entry
