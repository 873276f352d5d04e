"""The state of an optimizer: made at the start, and loaded from a state dict."""

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_fsdp.checkpoint.entries import state_entries
from shampoo_fsdp.checkpoint.fits import decide
from shampoo_fsdp.checkpoint.loading import carry_out, flat, other_pieces, strangers
from shampoo_fsdp.checkpoint.owned import OwnedBlocks
from shampoo_fsdp.checkpoint.sharded import ShardedBlocks
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.runtime.groups import (
    Given,
    Resumed,
    find_saved,
    settings_to_load,
    take_over,
)
from shampoo_fsdp.runtime.ranks import tell_all
from shampoo_fsdp.runtime.team import Parameters
from shampoo_fsdp.validation import name_some

__all__ = ["create_state", "forget_reading", "load_settings", "load_state", "whole_state"]

_logger = getLogger(__name__)


def create_state(parameters: Parameters, config: ShampooConfig) -> None:
    """Put the counters of all members into their state, and what their blocks have."""
    # All state exists from the start: loading a checkpoint into an optimizer without state
    # would make torch.distributed.checkpoint run a step with gradients of zero first.
    for member in parameters.members:
        member.create_counters()
    for team in parameters.teams:
        owned = defaultdict(list)
        for bucket in team.buckets:
            for member, block, saved in bucket.saved():
                owned[member].append((block, saved))
        for member, part in team.parts.items():
            member.state.update(
                state_entries(part.grid, owned[member], config, parameters.device, team.mesh)
            )


def forget_reading(state: Mapping[Any, Any]) -> None:
    """A checkpoint that was refused before any of it came has changed nothing."""
    for entries in state.values():
        for value in entries.values() if isinstance(entries, dict) else ():
            local = value.to_local() if isinstance(value, ShardedBlocks) else value
            if isinstance(local, OwnedBlocks):
                local.forget_reading()


def whole_state(
    parameters: Parameters, state: Mapping[Any, Any], *, keep: bool
) -> dict[Any, Any] | None:
    """The state with whole tensors, on the CPU; all ranks must call it.

    Args:
        state: the optimizer's.
        keep: whether this rank wants it; the result is None otherwise.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):  # all ranks put one tensor together at a time
            value = value.full_tensor()
        if not keep:
            return None
        if isinstance(value, OwnedBlocks):
            value = value.whole()
        return value.cpu() if isinstance(value, Tensor) else value

    entries = {
        member.parameter: {entry: whole(value) for entry, value in member.state.items()}
        for member in parameters.members
    }
    return {**state, **entries} if keep else None


def load_settings(
    given: Given,
    param_groups: list[dict[str, Any]],
    config: ShampooConfig,
    state_dict: Mapping[str, Any],
) -> list[Resumed]:
    """Take over the settings of a state dict, as :func:`load_state` does; nothing is exchanged."""
    _, saved_groups = find_saved(given, state_dict["param_groups"])
    return take_over(param_groups, _settings(config, param_groups, saved_groups))


def _settings(
    config: ShampooConfig,
    param_groups: list[dict[str, Any]],
    saved_groups: list[Mapping[str, Any] | None],
) -> list[dict[str, Any]]:
    return [
        settings_to_load(config, group, saved_group)
        for group, saved_group in zip(param_groups, saved_groups, strict=True)
    ]


def load_state(
    parameters: Parameters,
    given: Given,
    param_groups: list[dict[str, Any]],
    config: ShampooConfig,
    read: Callable[[], dict[str, Any]],
) -> tuple[dict[Any, Any], list[Resumed]]:
    """Take over a state dict; all ranks must call it.

    Args:
        param_groups: of the optimizer; they take over the saved settings.
        read: gives the state dict; where it raises, all ranks do.

    Returns:
        what the state dict has beside the state of parameters, and groups whose initial lr is not
        settled.

    Raises:
        ValueError: on every rank, names the parameter and the entry or setting that does not
            fit; nothing has been changed then.
    """
    here = flat({member.name: member.state for member in parameters.members})
    problem, saved, other = None, dict[str, Tensor](), list[str]()
    try:
        state_dict = read()
        state = state_dict["state"]
        keys, saved_groups = find_saved(given, state_dict["param_groups"])
        entries = {m.name: state.get(keys.get(m.name), {}) for m in parameters.members}
        groups = _settings(config, param_groups, saved_groups)
        saved = flat(entries)
        decision = decide(here, saved, config.on_mismatch)
        other = other_pieces(here, saved, decision)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem = str(error) if isinstance(error, ValueError) else repr(error)
    if problem := tell_all(parameters.rank_sets, problem):
        raise ValueError(problem)
    for ranks in parameters.rank_sets:
        other += itertools.chain(*ranks.gather(other))
    if frozen := [name for name, _ in given.frozen if state.get(keys.get(name))]:
        _logger.warning(f"The saved state of {name_some(frozen)}, frozen here, is not used.")
    if said := str(decision.report):
        _logger.warning(f"Not all optimizer state comes from the state dict: {said}.")

    resumed = take_over(param_groups, groups)
    carry_out(here, saved, decision, set(other))
    for member in parameters.members:
        for entry in strangers(member.state):
            del member.state[entry]
        member.state.update(strangers(entries[member.name]))
        if member.part and member.factor_step == 0:
            member.state["refreshed"].zero_()
    for bucket in parameters.buckets:
        bucket.state_was_loaded()
    known = {key for group in state_dict["param_groups"] for key in group["params"]}
    return {key: copy.deepcopy(state[key]) for key in state.keys() - known}, resumed
