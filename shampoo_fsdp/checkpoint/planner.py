"""Loading checkpoints that were saved with other settings, or by another optimizer.

    dcp.load(state, checkpoint_id=folder, planner=ShampooLoadPlanner(on_mismatch="rebuild"))

Also, what is wrong with a checkpoint that cannot be read.
"""

from dataclasses import replace
from io import BytesIO
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from shampoo_fsdp.checkpoint.fits import (
    LoadDecision,
    LoadReport,
    OnMismatch,
    check_coverage,
    check_others,
    decide,
)
from shampoo_fsdp.checkpoint.loading import begin, convert
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader
from shampoo_fsdp.checkpoint.safe_values import load_values

__all__ = ["ShampooLoadPlanner", "find_damage"]

_logger = getLogger(__name__)


class ShampooLoadPlanner(DefaultLoadPlanner):
    """Loads what fits of an optimizer's state; all the rest must fit, as with the default planner.

    It serves Shampoo and AdamW, each from checkpoints of both. Settings of parameter groups that
    the checkpoint lacks keep their values. See :mod:`shampoo_fsdp.checkpoint.fits`; what was not
    loaded is logged once, by the coordinator.

    Args:
        on_mismatch: what to do about state of other settings: "refuse" it, or "rebuild" what does
            not fit.
    """

    report: LoadReport
    """What this rank (and, on the coordinator, any rank) has not loaded."""

    def __init__(self, on_mismatch: OnMismatch = "refuse") -> None:
        super().__init__()
        if on_mismatch not in ("refuse", "rebuild"):
            raise ValueError(
                f"setting 'on_mismatch' is {on_mismatch!r}; allowed: 'refuse' or 'rebuild'."
            )
        self.on_mismatch: OnMismatch = on_mismatch
        self.report = LoadReport()
        self._decision = LoadDecision()
        self._unread = 0

    def create_local_plan(self) -> LoadPlan:
        """Decide what this rank reads.

        Raises:
            CheckpointMismatch: names the setting or the key that does not fit.
        """
        assert self.metadata is not None
        saved = dict(self.metadata.state_dict_metadata)
        self._decision = decision = decide(self.state_dict, saved, self.on_mismatch)
        self.report = decision.report
        saved |= {key: saved[other] for key, other in decision.renamed.items()}
        wanted = {k: v for k, v in self.state_dict.items() if k not in decision.left_out}
        check_others(wanted, saved)
        plan: LoadPlan = create_default_local_load_plan(
            wanted, replace(self.metadata, state_dict_metadata=saved)
        )
        check_coverage(wanted, plan.items)
        items = [self._from_its_key(item) for item in plan.items]
        return LoadPlan(items, planner_data=self.report)

    def _from_its_key(self, item: ReadItem) -> ReadItem:
        other = self._decision.renamed.get(item.storage_index.fqn)
        if other is None:
            return item
        return replace(item, storage_index=replace(item.storage_index, fqn=other))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        for plan in global_plan:
            self.report.merge(plan.planner_data)
        if said := str(self.report):
            _logger.warning(f"Not all optimizer state comes from the checkpoint: {said}.")
        return super().create_global_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        # Not before: now every rank has accepted the checkpoint.
        begin(self.state_dict, self._decision)
        self._unread = sum(item.type == LoadItemType.TENSOR for item in new_plan.items)
        return super().finish_plan(new_plan)

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Load an entry that is no tensor: only values, and no code of a file is run.

        Raises:
            UnsafeCheckpoint: names what the file asks for.
        """
        key = read_item.dest_index.fqn
        loaded = self.value_of(key, value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:
            self.state_dict[key] = loaded

    def value_of(self, key: str, stream: BytesIO) -> Any:
        """What an entry that is no tensor becomes in the state dict."""
        return load_values(stream, key)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self._unread -= 1
        if not self._unread:
            convert(self.state_dict, self._decision)


def find_damage(folder: str | Path) -> str:
    """What is missing of a checkpoint, "" if nothing is; reads its metadata and the sizes of files.

    Args:
        folder: as `torch.distributed.checkpoint` has written it.
    """
    if Path(folder).is_file():
        return "it is a file; give the folder"
    try:
        reader = SafeFileSystemReader(folder)
        if not reader.fs.exists(folder):
            return "there is no such folder"
        if reader.size(".metadata") is None:
            return "it has no .metadata, which is written last: saving it has not finished"
        ends: dict[str, int] = {}
        for info in reader.read_metadata().storage_data.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
        for name, end in sorted(ends.items()):
            if (size := reader.size(name)) is None:
                return f"{name} is missing or no file"
            if size < end:
                return f"{name} has {size:,} bytes, of which there should be {end:,}"
    except Exception as error:  # whatever a remote file system raises
        return str(error) or repr(error)
    return ""
