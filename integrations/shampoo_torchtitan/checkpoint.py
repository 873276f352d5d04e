"""TorchTitan's checkpoints: what loads in spite of other settings, and errors in a sentence.

TorchTitan's CheckpointManager has no hooks, so that :func:`register` puts functions of this module
in the place of its methods; each calls the one that was there.
"""

import contextlib
import functools
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    CheckpointManager,
)
from torchtitan.tools.logging import logger

from shampoo_fsdp.checkpoint import CheckpointMismatch, ShampooLoadPlanner, find_damage
from shampoo_fsdp.checkpoint.fits import OnMismatch
from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader, UnsafeCheckpoint, without_code
from shampoo_torchtitan.checkpoint_lock import FolderLock

__all__ = ["CheckpointError", "complete_checkpoints", "explain", "register"]


_LITTLE_SPACE = 2**20  # bytes; what could not be written is still there


class CheckpointError(CheckpointException):
    """Why a checkpoint cannot be loaded or saved, in a sentence; raised on every rank."""

    def __str__(self) -> str:
        return str(self.args[0])


def complete_checkpoints(folder: str | Path) -> list[str]:
    """The names of the checkpoints in a job's folder that were saved to the end, oldest first."""
    found = _steps(folder)
    return [found[step].name for step in sorted(found) if _is_complete(found[step])]


def explain(error: CheckpointException, folder: str) -> str:
    """Why a checkpoint cannot be loaded, and what to do.

    Args:
        error: What loading it raised; every rank has the failures of all.
        folder: The checkpoint.
    """
    if isinstance(error, CheckpointError):
        return str(error)
    for failure, _ in error.failures.values():
        if isinstance(failure, CheckpointMismatch):
            return (
                f"{folder} does not fit this job: {failure} (Settings are those of the table "
                "[optimizer.shampoo]. Another --job.dump_folder starts anew.)"
            )
        if isinstance(failure, UnsafeCheckpoint):
            return f"{folder} is refused: {failure}."
    damage = find_damage(Path(folder)) or _first_failure(error)
    others = [n for n in complete_checkpoints(Path(folder).parent) if n != Path(folder).name]
    return (
        f"{folder} is damaged or incomplete: {damage}. Another one is loaded with "
        f"--checkpoint.load_step; there are: {', '.join(others) or 'none'}."
    )


def _steps(folder: str | Path) -> dict[int, Path]:
    return {
        int(match[1]): path
        for path in Path(folder).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }


def _is_complete(path: Path) -> bool:
    # These are written last.
    return any((path / name).is_file() for name in (".metadata", "model.safetensors.index.json"))


def _first_failure(error: CheckpointException) -> str:
    rank, (failure, _) = min(error.failures.items())
    said = str(failure).splitlines() or [""]
    return f"rank {rank} found {type(failure).__name__}: {said[0]}"


def _cannot_save(error: CheckpointException, folder: str) -> CheckpointError:
    complete = ", ".join(complete_checkpoints(folder)) or "none"
    return CheckpointError(
        f"Cannot save a checkpoint in {folder}: {_disk_is_full(folder)}{_first_failure(error)}. "
        f"Complete ones there: {complete}.",
        error.failures,
    )


def _disk_is_full(folder: str) -> str:
    """Says so, as what PyTorch says of it may not."""
    with contextlib.suppress(OSError):  # a remote folder, or one that is gone
        free = shutil.disk_usage(folder).free
        if free < _LITTLE_SPACE:
            return f"the disk is full there ({free / 2**20:.1f} MiB are free); "
    return ""


# ------------------------------------------------------------- in the place of TorchTitan's methods


_titan_init = CheckpointManager.__init__
_titan_close = CheckpointManager.close
_titan_load = CheckpointManager.load
_titan_dcp_load = CheckpointManager.dcp_load
_titan_dcp_save = CheckpointManager.dcp_save
_titan_async_wait = CheckpointManager._async_wait
_titan_purge = CheckpointManager._purge_stale_checkpoints


@functools.wraps(_titan_init)
def _init(self: CheckpointManager, *args: Any, **kwargs: Any) -> None:
    _titan_init(self, *args, **kwargs)
    if not self.enable or self.load_only or "://" in self.folder:
        return
    problem = [""]
    if dist.get_rank() == 0:
        try:
            self.folder_lock = FolderLock(self.folder)
        except ValueError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(f"Cannot save checkpoints: {problem[0]}.", {})


def _close(self: CheckpointManager) -> None:
    _titan_close(self)
    if lock := vars(self).get("folder_lock"):
        lock.release()


def _load(self: CheckpointManager, step: int = -1) -> bool:
    if not self.enable:
        return bool(_titan_load(self, step))
    folder = self.folder
    try:
        if step == -1:
            steps = _steps(folder)
            complete = [number for number, path in steps.items() if _is_complete(path)]
            for number in sorted(steps):
                if number > max(complete, default=-1):
                    logger.warning(f"{steps[number]} is passed over: saving it has not finished")
            if not complete and self.initial_load_path:
                # TorchTitan would start from nothing, only because a folder is there.
                self.folder = f"{folder}/none"
        return bool(_titan_load(self, step))
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no step-{step} in {folder} (checkpoint.load_step); there are: "
            f"{', '.join(complete_checkpoints(folder)) or 'none'}.",
            {},
        ) from None
    finally:
        self.folder = folder


def _dcp_load(
    self: CheckpointManager,
    state_dict: dict[str, Any],
    checkpoint_id: str,
    from_hf: bool,
    from_quantized: bool,
) -> None:
    if from_hf:
        _titan_dcp_load(self, state_dict, checkpoint_id, from_hf, from_quantized)
        return
    if Path(checkpoint_id).is_dir() and not Path(checkpoint_id, ".metadata").exists():
        raise CheckpointError(explain(CheckpointException("", {}), checkpoint_id), {})
    before = _hyperparameters(self)
    config = getattr(next(iter(self.states[OPTIMIZER])), "config", None)
    planner = _JobPlanner(getattr(config, "on_mismatch", "refuse"), trusting=config is None)
    safely = config is not None and "://" not in checkpoint_id
    try:
        load(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_reader=SafeFileSystemReader(checkpoint_id) if safely else None,
            planner=planner,
        )
    except CheckpointException as error:
        raise CheckpointError(explain(error, checkpoint_id), error.failures) from None
    if MODEL in self.states:
        self.states[MODEL].load_state_dict(state_dict)
    for name, now in _hyperparameters(self).items():
        if now != before[name]:
            logger.info(f"The checkpoint's {name} = {now} wins over the job's {before[name]}")


class _JobPlanner(ShampooLoadPlanner):
    """TorchTitan's data loader unpickles its state, which is a pickle inside of the checkpoint.

    Args:
        trusting: Whether values may be of any class, as in TorchTitan: for other optimizers' jobs.
    """

    def __init__(self, on_mismatch: OnMismatch, *, trusting: bool) -> None:
        super().__init__(on_mismatch)
        self._trusting = trusting

    def value_of(self, key: str, stream: BytesIO) -> Any:
        if self._trusting:
            return torch.load(stream, weights_only=False)
        value = super().value_of(key, stream)
        if key.startswith(f"{DATALOADER}.") and isinstance(value, bytes):
            return without_code(value, key)
        return value


def _hyperparameters(manager: CheckpointManager) -> dict[str, str]:
    """What each of them is, in all parameter groups."""
    groups = [g for optimizer in manager.states[OPTIMIZER] for g in optimizer.param_groups]
    schedulers = manager.states[LR_SCHEDULER].schedulers
    values = {name: [g[name] for g in groups] for name in ("betas", "eps", "weight_decay")}
    # Warm-up and decay change the groups' lr; the schedule is a multiple of this one.
    values["lr"] = [lr for scheduler in schedulers for lr in scheduler.base_lrs]
    return {name: " or ".join(dict.fromkeys(map(str, found))) for name, found in values.items()}


def _dcp_save(
    self: CheckpointManager, state_dict: Any, checkpoint_id: str, *args: Any, **kwargs: Any
) -> Any:
    # A checkpoint of this step may be there, if an older one was loaded. A crash while it is
    # overwritten must not leave one that looks complete. No rank writes before rank 0 saves.
    if dist.get_rank() == 0 and "://" not in checkpoint_id:
        # Where it cannot be deleted saving fails as well, and that on every rank.
        with contextlib.suppress(OSError):
            Path(checkpoint_id, ".metadata").unlink(missing_ok=True)
    try:
        return _titan_dcp_save(self, state_dict, checkpoint_id, *args, **kwargs)
    except CheckpointException as error:
        raise _cannot_save(error, self.folder) from None


def _async_wait(self: CheckpointManager) -> None:
    try:
        _titan_async_wait(self)
    except CheckpointException as error:
        raise _cannot_save(error, self.folder) from None


def _purge(self: CheckpointManager) -> None:
    """Deletes what is older than the newest keep_latest_k complete checkpoints.

    TorchTitan counts unfinished ones as well, so that a few crashes could cost the complete ones.
    """
    if self.keep_latest_k <= 0 or self.ft_manager or dist.get_rank() != 0:
        _titan_purge(self)
        return
    steps = _steps(self.folder)
    kept = sorted(step for step, path in steps.items() if _is_complete(path))[-self.keep_latest_k :]
    if len(kept) == self.keep_latest_k:
        for step in sorted(steps):
            if step < kept[0]:
                self.purge_queue.put(str(steps[step]))


def register() -> None:
    """Makes TorchTitan's CheckpointManager use this module; calling it again changes nothing."""
    CheckpointManager.__init__ = _init
    CheckpointManager.close = _close
    CheckpointManager.load = _load
    CheckpointManager.dcp_load = _dcp_load
    CheckpointManager.dcp_save = _dcp_save
    CheckpointManager._async_wait = _async_wait
    CheckpointManager._purge_stale_checkpoints = _purge
