"""Checkpoints of TorchTitan jobs: what loads in spite of other settings, errors in a sentence."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.utils._pytree import tree_map_only
from torchtitan.tools.logging import logger

from shampoo_fsdp.checkpoint import CheckpointMismatch, ShampooLoadPlanner, find_damage
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader, without_code
from shampoo_fsdp.runtime.groups import plain_name
from shampoo_torchtitan.checkpoint_folders import complete_checkpoints, find_steps, lock_folder
from shampoo_torchtitan.container import JobError, alike_on_all_ranks, shampoos_of
from shampoo_torchtitan.generation import titan
from shampoo_torchtitan.names import ReaderOfOldNames

try:
    from torchtitan.components import checkpointer as titan_checkpoints
except ImportError:  # TorchTitan 0.2
    from torchtitan.components import checkpoint as titan_checkpoints
CheckpointManager = titan_checkpoints.CheckpointManager
DATALOADER, MODEL, OPTIMIZER = "dataloader", "model", "optimizer"


def explain(error: CheckpointException, folder: str) -> str:
    """Why a checkpoint cannot be loaded, and what to do.

    Args:
        error: What loading it raised; every rank has the failures of all.
        folder: The checkpoint.
    """
    for failure, _ in error.failures.values():
        if isinstance(failure, CheckpointMismatch):
            return (
                f"{folder} does not fit this job: {failure} (Settings without a table are those of "
                "[optimizer.shampoo]. Another --job.dump_folder starts anew.)"
            )
    parent, name = os.path.split(folder.rstrip("/"))
    return (
        f"{folder} is damaged or incomplete: {find_damage(folder) or _first_failure(error)}. "
        "Another one is loaded with --checkpoint.load_step; there are: "
        f"{_complete_ones(parent, but=name)}."
    )


def _complete_ones(folder: str, but: str = "") -> str:
    try:
        return ", ".join(name for name in complete_checkpoints(folder) if name != but) or "none"
    except Exception as error:  # whatever a remote file system raises
        return f"those that {folder} does not say just now ({error})"


def _first_failure(error: CheckpointException) -> str:
    rank, (failure, _) = min(error.failures.items())
    said = str(failure).splitlines() or [""]
    return f"rank {rank} found {type(failure).__name__}: {said[0]}"


class ShampooCheckpoints(CheckpointManager):
    """TorchTitan's CheckpointManager for jobs of Shampoo."""

    folder_lock: IO[bytes] | None = None

    def lock_folder(self) -> None:
        """Refuses a folder that cannot be used, or that another job saves its checkpoints in."""
        if "://" in self.folder:
            if not titan().loads_remote_folders:
                raise ValueError(
                    f"checkpoint.folder is {self.folder}, and TorchTitan 0.2 never loads from it; "
                    "allowed: folders without '://'"
                )
            find_steps(self.folder)
        elif not self.load_only:
            self.folder_lock = lock_folder(self.folder)

    def load(self, step: int = -1) -> bool:
        folder = self.folder
        steps = _asked_of_rank_0(lambda: find_steps(folder), f"Cannot look into {folder}: ")
        if step == -1:
            step = max((number for number in steps if steps[number]), default=-1)
        if step == -1:
            # TorchTitan 0.2 would start from nothing, only because a folder is there.
            self.folder = f"{folder}/none"
        try:
            return bool(super().load(step))
        except FileNotFoundError:
            raise JobError(
                f"There is no step-{step} in {folder} (checkpoint.load_step); there are: "
                f"{_complete_ones(folder)}."
            ) from None
        finally:
            self.folder = folder

    def dcp_load(
        self, state_dict: Any, checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        with alike_on_all_ranks(f"{checkpoint_id}: ", Exception):
            reader = self._reader(checkpoint_id)
        # "refuse" if one of them says so.
        on_mismatch = max(of.config.on_mismatch for of in shampoos_of(self.states[OPTIMIZER]))
        try:
            load(
                state_dict,
                checkpoint_id=checkpoint_id,
                storage_reader=reader,
                planner=_JobPlanner(on_mismatch),
            )
        except CheckpointException as error:
            raise JobError(explain(error, checkpoint_id)) from None
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _reader(self, folder: str) -> SafeFileSystemReader:
        model = self.states[MODEL]
        names = [name for part in model.model for name, _ in part.named_parameters()]
        return ReaderOfOldNames(folder, [*map(plain_name, names), *model.state_dict()])

    def dcp_save(self, state_dict: Any, checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        # A checkpoint of this step may be there, if an older one was loaded. A crash while it is
        # overwritten must not leave one that looks complete. No rank writes before rank 0 saves.
        if dist.get_rank() == 0:
            # Where it cannot be deleted saving fails as well, and that on every rank.
            with contextlib.suppress(Exception):
                reader = SafeFileSystemReader(checkpoint_id)
                reader.fs.rm_file(reader.fs.concat_path(checkpoint_id, ".metadata"))
        with self._saving():
            return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def _async_wait(self) -> None:  # in 0.2
        with self._saving():
            super()._async_wait()

    def _wait_for_saving(self) -> None:  # in 0.3
        with self._saving():
            super()._wait_for_saving()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:
            raise JobError(
                f"Cannot save a checkpoint in {self.folder}: {_first_failure(error)}. "
                f"Complete ones there: {_complete_ones(self.folder)}."
            ) from None

    def _purge_stale_checkpoints(self) -> None:
        """Deletes what is older than the newest keep_latest_k complete checkpoints.

        TorchTitan counts unfinished ones as well, so that a few crashes could cost the complete
        ones.
        """
        if self.keep_latest_k <= 0 or dist.get_rank() != 0:
            return
        try:
            steps = find_steps(self.folder)
        except Exception as error:  # whatever a remote file system raises
            logger.warning(f"No old checkpoint is deleted, as {self.folder} does not say: {error}")
            return
        complete = sorted(step for step in steps if steps[step])
        if len(complete) >= self.keep_latest_k:
            for step in sorted(steps):
                if step < complete[-self.keep_latest_k]:
                    self.purge_queue.put(self._create_checkpoint_id(step))


class _JobPlanner(ShampooLoadPlanner):
    """TorchTitan's data loader unpickles its state, which is a pickle inside of the checkpoint, and
    goes on with as many data-parallel ranks alone."""

    def create_local_plan(self) -> LoadPlan:
        here = self.state_dict.get(f"{DATALOADER}.world_size")
        keys = self.metadata.state_dict_metadata if self.metadata else ()
        there = sum(key.startswith(f"{DATALOADER}.dp_rank_") for key in keys)
        if here and there and here != there:
            raise CheckpointMismatch(
                f"its data loaders were those of {there} data-parallel ranks, and here are {here}: "
                f'set checkpoint.exclude_from_loading = ["{DATALOADER}"], and all else goes on, '
                "with the data from their beginning."
            )
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        key = read_item.dest_index.fqn
        if key.partition(".")[0] == DATALOADER:
            held = torch.load(value, weights_only=True)
            inert = tree_map_only((bytes, bytearray), lambda data: without_code(data, key), held)
            value = BytesIO()
            torch.save(inert, value)
            value.seek(0)
        super().load_bytes(read_item, value)


def _asked_of_rank_0(question: Callable[[], Any], failed: str) -> Any:
    """What rank 0 finds in a file system, on every rank.

    Raises:
        JobError: On every rank: `failed`, and what rank 0 could not do.
    """
    answer = [None]
    with alike_on_all_ranks(failed, Exception):  # whatever a remote file system raises
        if dist.get_rank() == 0:
            answer[0] = question()
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


_titan_init = CheckpointManager.__init__


@functools.wraps(_titan_init)
def _init(self: CheckpointManager, *args: Any, **kwargs: Any) -> None:
    optimizers = kwargs.get("optimizers")
    ours = shampoos_of(optimizers)
    if ours and any(".torchft." in kind.__module__ for kind in type(self).__mro__):
        raise JobError(
            f"the job's checkpoints are of {type(self).__qualname__}, TorchFT's, which Shampoo "
            "does not support; allowed: TorchTitan's own Trainer.Config and "
            "CheckpointManager.Config, or AdamW"
        )
    _titan_init(self, *args, **kwargs)
    if ours and self.enable:
        self.__class__ = _class_for(type(self))
        _asked_of_rank_0(self.lock_folder, "Cannot use the folder of checkpoints: ")


def _class_for(manager: type[CheckpointManager]) -> type[CheckpointManager]:
    """What a manager becomes; one of a user's own, as 0.3 allows, stays that as well."""
    return type(manager.__name__, (ShampooCheckpoints, manager), {})


def extend_checkpoints() -> None:
    """Makes TorchTitan's CheckpointManager a :class:`ShampooCheckpoints` where the job is one of
    Shampoo; calling it again changes nothing. (0.2 has no hook: a job cannot choose its class.)
    """
    CheckpointManager.__init__ = _init  # type: ignore[method-assign]
