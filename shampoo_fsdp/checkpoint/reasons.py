"""Saying why the state of a checkpoint does not fit, in the words of the settings."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.tensor import DTensor

from shampoo_fsdp.checkpoint.sharded import local_parts
from shampoo_fsdp.rules.kept import CAP, factor_entries, preconditioner_of
from shampoo_fsdp.validation import name_some

__all__ = [
    "CheckpointMismatch",
    "check_coverage",
    "check_others",
    "explanation",
    "fits",
]

_HINT = 'Set it as it was, or on_mismatch = "rebuild" to keep what fits and start the rest anew.'


class CheckpointMismatch(ValueError):
    """A checkpoint that does not fit what shall be loaded; says why and what to do."""


def fits(here: Any, saved: Any) -> bool:
    """Whether a tensor can be read from another one, or from what the metadata says of it."""
    return isinstance(saved, TensorStorageMetadata | Tensor) and _shape(saved) == tuple(here.shape)


def explanation(name: str, here: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """What has changed since the state of a parameter was saved, and what to do.

    Args:
        name: of the parameter.
        here: its state, by the names of the entries.
        saved: metadata of its state in the checkpoint; it does not fit.
    """
    return f"{next(_reasons(name, here, saved))} {_HINT}"


def _reasons(name: str, here: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    """The most telling one first."""
    if not saved:
        yield f"the checkpoint has no optimizer state for parameter '{name}'."
    if (CAP in here) != (CAP in saved):
        then, now = ("is", "is not") if CAP in saved else ("is not", "is")
        yield (
            f"parameter '{name}' {then} preconditioned in the checkpoint, but {now} here; see the "
            "settings 'exclude' and 'precondition_1d' (which counts a matrix of one row or column "
            "as one dimension)."
        )
    if CAP in here and len(_shape(saved[CAP])) != len(_shape(here[CAP])):
        yield (
            f"the factors of parameter '{name}' were saved by an earlier version, in a form that "
            "is not read any more."
        )
    if CAP in here and _shape(saved[CAP])[0] != _shape(here[CAP])[0]:
        yield (
            f"setting '{CAP}' is {_shape(saved[CAP])[0]} in the checkpoint, but "
            f"{_shape(here[CAP])[0]} here."
        )
    if CAP in here:
        then, now = preconditioner_of(_shape(saved[CAP])), preconditioner_of(_shape(here[CAP]))
        if then != now:
            yield f"setting 'preconditioner' is '{then}' in the checkpoint, but '{now}' here."
    if CAP in here and _shape(saved[CAP]) != _shape(here[CAP]):
        yield (
            f"parameter '{name}' is cut into other blocks in the checkpoint; see the settings "
            "'large_dim', 'merge_dims' and 'block_alignment' (batched_3d = false and merge_dims = "
            "'none' have been removed)."
        )
    for entry, value in here.items():
        if entry not in saved:
            setting = "root_method" if entry in factor_entries() else "grafting"
            yield (
                f"the checkpoint has no '{entry}' for parameter '{name}', only "
                f"{', '.join(sorted(saved))}; see the setting '{setting}'."
            )
        elif not fits(value, saved[entry]):
            setting = "merge_dims"
            if entry in factor_entries():
                setting = "max_factor_ratio' or 'symmetric_packing"
            yield (
                f"'{entry}' of parameter '{name}' has shape {_shape(saved[entry])} in the "
                f"checkpoint, but {_shape(value)} here; see the setting '{setting}'."
            )


def check_others(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise a CheckpointMismatch if a key of a state dict is missing or has another shape.

    Args:
        here: what shall be loaded, by key.
        saved: metadata of the checkpoint.
    """
    if missing := [key for key in here if key not in saved]:
        raise CheckpointMismatch(
            f"the checkpoint lacks {name_some(missing)}; it is of another model or job, or holds "
            "the model alone."
        )
    for key, value in here.items():
        if isinstance(value, Tensor) and not fits(value, saved[key]):
            raise CheckpointMismatch(
                f"'{key}' has shape {_shape(saved[key])} in the checkpoint, but {_shape(value)} "
                "here; it is of another model."
            )


def check_coverage(here: Mapping[str, Any], items: Sequence[ReadItem]) -> None:
    """Raise a CheckpointMismatch if what will be read does not fill a tensor on this rank.

    Args:
        here: what shall be loaded, by key.
        items: what will be read. (Pieces that were saved do not overlap.)
    """
    found: dict[str, int] = defaultdict(int)
    for item in items:
        if item.type == LoadItemType.TENSOR:
            found[item.dest_index.fqn] += math.prod(item.lengths)
    for key, value in here.items():
        if not isinstance(value, Tensor):
            continue
        if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
            continue
        if (wanted := sum(part.numel() for part in local_parts(value))) > found[key]:
            raise CheckpointMismatch(
                f"the checkpoint has only {found[key]:,} of the {wanted:,} numbers of '{key}' that "
                "belong on this rank; was it saved by one of several ranks alone (no_dist)? Save "
                "on all ranks, or with StateDictOptions(full_state_dict=True)."
            )


def _shape(value: Any) -> tuple[int, ...]:
    """Of a tensor or its metadata; () for what is no tensor."""
    return tuple(getattr(value, "shape", getattr(value, "size", ())))
