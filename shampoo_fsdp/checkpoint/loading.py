"""Carrying out what was decided about state: of a folder, and of a state dict in memory.

    dcp.load(state, checkpoint_id=folder, planner=ShampooLoadPlanner(on_mismatch="rebuild"))

reads from a folder, into the places where values belong.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from shampoo_fsdp.checkpoint.fits import (
    OF_BEFORE,
    LoadReport,
    OnMismatch,
    check_others,
    decide,
    is_state_entry,
)
from shampoo_fsdp.checkpoint.owned import OwnedBlocks
from shampoo_fsdp.checkpoint.sharded import ShardedBlocks, local_parts, local_tensor
from shampoo_fsdp.plan.shards import placement_of, shard_rectangle
from shampoo_fsdp.rules.layout import factor_entries
from shampoo_fsdp.validation import refuse

__all__ = ["ShampooLoadPlanner"]

_logger = getLogger(__name__)

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


def other_pieces(
    here: Mapping[str, Any], saved: Mapping[str, Any], report: LoadReport
) -> list[str]:
    """Keys of the entries whose saved pieces on this rank are not those that it needs.

    Raises:
        ValueError: if they are on no other rank either, or were not read completely.
    """
    keys = []
    for key, value in here.items():
        if key in report.left_out:
            continue
        source = saved[report.renamed.get(key, key)]
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
                    f"'{key}' is the part of another rank; to change the mesh, use "
                    "torch.distributed.checkpoint, or StateDictOptions(full_state_dict=True)."
                )
    return keys


def carry_out(
    here: Mapping[str, Any], saved: Mapping[str, Any], report: LoadReport, gathered: Collection[str]
) -> None:
    """Copy saved entries, keeping types and devices, as was decided.

    Args:
        here, saved: see :func:`flat`.
        gathered: keys of entries whose pieces all ranks put together first.
    """
    begin(here, report)
    for key, value in here.items():
        if key not in report.left_out:
            source = saved[report.renamed.get(key, key)]
            _copy(value, source.full_tensor() if key in gathered else source)
    convert(here, report)


def begin(here: Mapping[str, Any], report: LoadReport) -> None:
    """Start state anew that is not read, once all ranks have accepted what is: with zeros, and of
    factors only their number of steps, by which the optimizer gives them their initial values."""
    for key in report.left_out:
        entry = key.rpartition(".")[2]
        if entry == "factor_step" or (is_state_entry(entry) and entry not in factor_entries()):
            start_anew([here[key]])


def convert(here: Mapping[str, Any], report: LoadReport) -> None:
    """Make averages of squares of their sums, or sums of averages, once all has been read."""
    for key in report.renamed:
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


class ShampooLoadPlanner(DefaultLoadPlanner):
    """Loads what fits of an optimizer's state; all the rest must fit, as with the default planner.

    It serves Shampoo and AdamW, each from checkpoints of both. Settings of parameter groups that
    the checkpoint lacks keep their values, but for `lr_factor`, which is 1 in Shampoo's of before
    there was one. See :mod:`shampoo_fsdp.checkpoint.fits`; what was not
    loaded is logged once, by the coordinator.

    Args:
        on_mismatch: what to do about state of other settings: "refuse" it, or "rebuild" what does
            not fit.
    """

    report: LoadReport
    """What this rank (and, on the coordinator, any rank) has not loaded."""

    def __init__(self, on_mismatch: OnMismatch = "refuse") -> None:
        super().__init__()  # which flattens
        if on_mismatch not in ("refuse", "rebuild"):
            refuse("on_mismatch", on_mismatch, "'refuse' or 'rebuild'")
        self.on_mismatch: OnMismatch = on_mismatch
        self.report = LoadReport()
        self._unread = 0

    def create_local_plan(self) -> LoadPlan:
        """Decide what this rank reads.

        Raises:
            CheckpointMismatch: names the setting or the key that does not fit.
        """
        assert self.metadata is not None
        saved = dict(self.metadata.state_dict_metadata)
        self.report = report = decide(self.state_dict, saved, self.on_mismatch)
        saved |= {key: saved[other] for key, other in report.renamed.items()}
        wanted = {k: v for k, v in self.state_dict.items() if k not in report.left_out}
        check_others(wanted, saved)
        plan: LoadPlan = create_default_local_load_plan(
            wanted, replace(self.metadata, state_dict_metadata=saved)
        )
        items = []
        for item in plan.items:
            index = item.storage_index
            index = replace(index, fqn=report.renamed.get(index.fqn, index.fqn))
            items.append(replace(item, storage_index=index))
        return LoadPlan(items, planner_data=replace(report, left_out=set(), renamed={}))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        for plan in global_plan:
            self.report.merge(plan.planner_data)
        if said := str(self.report):
            _logger.warning(f"Not all optimizer state comes from the checkpoint: {said}.")
        if self._without_lr_factor():
            _logger.warning(OF_BEFORE)
        return super().create_global_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        # Not before: now every rank has accepted the checkpoint.
        begin(self.state_dict, self.report)
        for key in self._without_lr_factor():
            *path, last = self.mappings[key]
            held: Any = self.original_state_dict
            for part in path:
                held = held[part]
            held[last] = 1.0
        self._unread = sum(item.type == LoadItemType.TENSOR for item in new_plan.items)
        return super().finish_plan(new_plan)

    def _without_lr_factor(self) -> list[str]:
        """Keys of what a checkpoint of Shampoo from before it lacks."""
        lacking = self.report.left_out if self.report.of_before else ()
        return [key for key in lacking if key.endswith(".lr_factor")]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self._unread -= 1
        if not self._unread:
            convert(self.state_dict, self.report)
