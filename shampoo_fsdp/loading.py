"""Putting the entries of a state dict into a parameter's state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_fsdp.layout import shard_rectangle
from shampoo_fsdp.state import CAP, ShardedBlocks
from shampoo_fsdp.state_layout import preconditioner_of

__all__ = ["check_entries", "copy_entries"]


def check_entries(
    name: str, entries: Mapping[str, Tensor], saved: Mapping[str, Any] | None
) -> None:
    """Raise a ValueError that says why saved entries do not fit; changes nothing.

    Args:
        name: of the parameter.
        entries: its state here.
        saved: the state that shall be copied there.
    """
    if saved is None:
        raise ValueError(f"the state dict has no state for parameter '{name}'.")
    if CAP in entries and CAP in saved:
        here, there = entries[CAP].shape, saved[CAP].shape
        if len(here) != len(there):
            raise ValueError(
                "the state dict was saved by an earlier version, in a form that is not read any "
                "more."
            )
        for setting, now, then in (
            (CAP, here[0], there[0]),
            ("preconditioner", preconditioner_of(here), preconditioner_of(there)),
        ):
            if now != then:
                raise ValueError(
                    f"the state dict was saved with {setting} = {then}, but it is {now} here; "
                    "set it to the saved value."
                )
    for entry, value in entries.items():
        if entry not in saved:
            raise ValueError(
                f"the state dict has no '{entry}' for parameter '{name}', only "
                f"{sorted(saved)}; was it preconditioned (see 'exclude') when it was saved?"
            )
        source = torch.as_tensor(saved[entry])
        if source.shape != value.shape:
            raise ValueError(
                f"'{entry}' of parameter '{name}' has shape {tuple(source.shape)} in the state "
                f"dict but {tuple(value.shape)} here; was it saved with other settings?"
            )
        if isinstance(value, ShardedBlocks) and isinstance(source, ShardedBlocks):
            value.check_pieces(source, f"'{entry}' of parameter '{name}'")


def copy_entries(entries: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Copy saved entries that :func:`check_entries` has accepted, keeping types and devices.

    An entry that is the very tensor here has been read in place and is left as it is.
    """
    for entry, value in entries.items():
        source = torch.as_tensor(saved[entry])
        if source is value:
            continue
        if isinstance(value, ShardedBlocks):
            value.load(source)
        elif isinstance(value, DTensor) and not isinstance(source, DTensor):
            coordinate = value.device_mesh.get_coordinate()
            if coordinate is not None:
                rectangle = shard_rectangle(
                    value.shape, value.device_mesh.shape, value.placements, coordinate
                )
                value.to_local().copy_(source[tuple(slice(*interval) for interval in rectangle)])
        else:
            value.copy_(source)
