"""Carrying out what was decided about state: of a folder, and of a state dict in memory.

What is read from a folder is in its place already; only `begin` and `convert` are left to do.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_fsdp.checkpoint.fits import LoadDecision, is_state_entry
from shampoo_fsdp.checkpoint.owned import OwnedBlocks, Reading
from shampoo_fsdp.checkpoint.sharded import ShardedBlocks, local_parts, local_tensor
from shampoo_fsdp.plan.shards import placement_of, shard_rectangle
from shampoo_fsdp.rules.layout import factor_entries

__all__ = [
    "begin",
    "carry_out",
    "check_not_being_read",
    "convert",
    "copy_own_part",
    "flat",
    "other_pieces",
    "start_anew",
]

State = Mapping[str, Mapping[str, Any]]
"""The entries of each parameter, by the names of both."""


def flat(state: State) -> dict[str, Any]:
    """The entries that this package knows, by the keys that checkpoints have for them."""
    return {
        f"state.{name}.{entry}": _as_tensor(value)
        for name, entries in state.items()
        for entry, value in entries.items()
        if is_state_entry(entry)
    }


def check_not_being_read(states: Mapping[Any, Any], reading: Reading) -> None:
    """Raise a RuntimeError, on all ranks alike, if a checkpoint is being read into the state of an
    optimizer, or into what others have put there."""
    entries = [v for of in states.values() if isinstance(of, Mapping) for v in of.values()]
    local = [local_tensor(entry) for entry in entries if isinstance(entry, Tensor)]
    for each in (reading, *(blocks.reading for blocks in local if isinstance(blocks, OwnedBlocks))):
        each.check()


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
            mine, theirs = local_tensor(value), local_tensor(source)
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
    begin(here, decision)
    for key, value in here.items():
        if key not in decision.left_out:
            source = saved[decision.renamed.get(key, key)]
            _copy(value, source.full_tensor() if key in gathered else source)
    convert(here, decision)


def begin(here: Mapping[str, Any], decision: LoadDecision) -> None:
    """Start state anew that is not read, once all ranks have accepted what is: with zeros, and of
    factors only their number of steps, by which the optimizer gives them their initial values."""
    for key in decision.left_out:
        entry = key.rpartition(".")[2]
        if entry == "factor_step" or (is_state_entry(entry) and entry not in factor_entries()):
            start_anew([here[key]])


def convert(here: Mapping[str, Any], decision: LoadDecision) -> None:
    """Make averages of squares of their sums, or sums of averages, once all has been read."""
    for key in decision.renamed:
        steps = here[f"{key.rpartition('.')[0]}.step"].clamp(min=1.0)
        for part in local_parts(here[key]):
            part.detach().mul_((steps if key.endswith(".sum") else 1.0 / steps).to(part.device))


def start_anew(entries: Iterable[Tensor]) -> None:
    """Fill this rank's part of entries with zeros."""
    for entry in entries:
        for part in local_parts(entry):
            part.detach().zero_()


def copy_own_part(value: Tensor, source: Any) -> None:
    """Copy what this rank has of an entry from what it has of another one; ranks exchange nothing.

    Raises:
        ValueError, TypeError, RuntimeError: it is no tensor of this shape, nor a number.
    """
    mine, theirs = local_tensor(value), local_tensor(_as_tensor(source))
    if mine.shape != theirs.shape:
        raise ValueError(f"of shape {tuple(theirs.shape)}")
    mine.copy_(theirs)


def _copy(value: Tensor, source: Tensor) -> None:
    if source is value:  # it was read in place
        return
    mine = local_tensor(value)
    if isinstance(mine, OwnedBlocks):
        theirs = local_tensor(source)
        whole = isinstance(source, DTensor) and not isinstance(theirs, OwnedBlocks)
        mine.load(source.full_tensor() if whole else theirs)  # type: ignore[attr-defined]
    elif isinstance(value, DTensor) and not isinstance(source, DTensor):
        coordinate = value.device_mesh.get_coordinate()
        if coordinate is not None:
            placements = tuple(map(placement_of, value.placements))
            mesh_shape = value.device_mesh.shape
            rectangle = shard_rectangle(value.shape, mesh_shape, placements, coordinate)
            value.to_local().copy_(source[tuple(slice(*interval) for interval in rectangle)])
    elif isinstance(source, DTensor) and not isinstance(value, DTensor):
        value.copy_(source.full_tensor())
    else:
        value.copy_(source)


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
