"""Checkpoints that are damaged, unfinished or cannot be written: said in a sentence, and older ones
stay as they are."""

import contextlib
import io
import os
import pickle
import queue
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader
from shampoo_torchtitan import checkpoint
from shampoo_torchtitan.checkpoint_folders import lock_folder
from shampoo_torchtitan.container import JobError
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.hostile import PICKLES, Calls, put_entry
from tests.ranks import ranks, run_ranks
from tests.shampoo_torchtitan import jobs
from tests.shampoo_torchtitan.jobs import run

pytestmark = jobs.on_cpu

AsyncMode = checkpoint.titan_checkpoints.AsyncMode

SETTINGS = [
    "--checkpoint.enable",
    "--checkpoint.interval=1",
    "--checkpoint.keep_latest_k=0",
    "--checkpoint.async_mode=async",
]


def error_of(call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(JobError) as error:
        call(*arguments, **keywords)
    return str(error.value)


def on_rank_0(call: Any, *arguments: Any) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        call(*arguments)
    dist.barrier()


def everything_that_goes_wrong(job: Path) -> dict[str, str]:
    """What is said to each trouble, by a trainer that lives on."""
    trainer = jobs.make_trainer(job, *SETTINGS)
    checkpoints, said = trainer.checkpointer, {}
    folder = Path(checkpoints.folder)

    def save(step: int, mode: AsyncMode = AsyncMode.DISABLED) -> None:
        trainer.step = step
        checkpoints.async_mode = mode
        checkpoints.save(step)

    def save_and_wait(step: int, mode: AsyncMode) -> None:
        save(step, mode)
        wait = "maybe_wait_for_saving" if JOBS_ARE_FUNCTIONS else "_async_wait"
        getattr(checkpoints, wait)()

    def newest() -> int:
        """The step that is loaded if none is asked for."""
        checkpoints.load()
        return trainer.step

    def load(step: int) -> str:
        return error_of(checkpoints.load, step=step)

    save(1)
    save(2)
    whole = folder / "whole"
    on_rank_0(shutil.copytree, folder / "step-2", whole)
    file = folder / "step-2" / "__1_0.distcp"
    on_rank_0(os.truncate, file, 1000)
    said["torn"] = load(2)
    on_rank_0(shutil.copy, whole / file.name, file)
    on_rank_0((folder / "step-2" / ".metadata").unlink)
    said["unfinished"] = load(2)
    assert newest() == 1
    said["not there"] = load(7)
    marker = folder / "ran"
    for trouble, change in (("hostile", hostile_metadata), ("hostile data", hostile_data_loader)):
        on_rank_0(change, whole, folder / "step-2", f"touch {marker}")
        said[trouble] = load(2)
        assert not marker.exists()
    for file in whole.iterdir():
        on_rank_0(shutil.copy, file, folder / "step-2" / file.name)
    assert newest() == 2

    # Saving the same step once more fails half-way.
    with mock.patch.object(FileSystemWriter, "write_data", side_effect=OSError("it broke")):
        said["cannot be written"] = error_of(save, 2)
    assert newest() == 1

    # The very first checkpoint of a run was not finished: it starts from where it first did.
    checkpoints.folder, checkpoints.initial_load_path = str(folder / "new"), str(folder / "step-1")
    checkpoints.initial_load_model_only = False
    # TorchTitan 0.2 looks for load_step only where the folder is there.
    assert JOBS_ARE_FUNCTIONS or checkpoints.load(step=7)
    on_rank_0(os.makedirs, folder / "new" / "step-2")
    trainer.step = 0
    assert newest() == 1
    checkpoints.initial_load_path = None

    # Of two to be kept, unfinished ones are none.
    checkpoints.folder, checkpoints.keep_latest_k = str(folder / "kept"), 2
    checkpoints.purge_queue = queue.Queue()
    for step in (1, 2):
        on_rank_0(os.makedirs, folder / "kept" / f"step-{step + 5}")
        save(step)
    assert checkpoints.purge_queue.empty()
    save(3)
    if dist.get_rank() == 0:
        assert checkpoints.purge_queue.get_nowait() == str(folder / "kept" / "step-1")
    assert checkpoints.purge_queue.empty()
    checkpoints.keep_latest_k = 0

    checkpoints.folder = str(folder / "full")
    save(1)
    for mode in (AsyncMode.DISABLED, AsyncMode.ASYNC):
        with full():
            said[f"full disk, {mode.value}"] = error_of(save_and_wait, 2, mode)
        assert newest() == 1
        checkpoints.save_future = None
    save_and_wait(2, AsyncMode.ASYNC)
    assert newest() == 2
    trainer.close()
    return said


def hostile_metadata(whole: Path, folder: Path, command: str) -> None:
    metadata = FileSystemReader(whole).read_metadata()
    metadata.planner_data = Calls(os.system, command)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def hostile_data_loader(whole: Path, folder: Path, command: str) -> None:
    """Its state is a pickle in an entry of bytes."""
    shutil.copy(whole / ".metadata", folder)
    entry = io.BytesIO()
    torch.save(pickle.dumps(Calls(os.system, command)), entry)
    put_entry(folder, "dataloader.dp_rank_", entry.getvalue())


@contextlib.contextmanager
def full() -> Iterator[None]:
    """As on a full disk no file can grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What was said, by trouble; the same on both ranks."""
    folder = tmp_path_factory.mktemp("trouble")
    job = jobs.write_job(folder)
    first, second = run_ranks(2, everything_that_goes_wrong, init=False, timeout=300, job=job)
    assert first == second
    return {k: text.replace(str(folder), "F") for k, text in first.items()}


DAMAGED = "F/checkpoint/step-2 is damaged or incomplete: "
NEWEST_BEFORE = "--checkpoint.load_step; there are: step-1."
FULL = "Cannot save a checkpoint in F/checkpoint/full: "
# (What else can be wrong with files: test_safe_reader.)
SAID = {
    "torn": [f"{DAMAGED}__1_0.distcp has 1,000 bytes, of", NEWEST_BEFORE],
    "unfinished": ["it has no .metadata, which is written last: saving it has", NEWEST_BEFORE],
    "not there": ["no step-7 in F/checkpoint (checkpoint.load_step); there are: step-1."],
    "cannot be written": ["Cannot save a checkpoint in F/checkpoint: rank 0 found OSError: it b"],
    "hostile": [f"{DAMAGED}.metadata is damaged, or"],
    "hostile data": ["nothing was run (it asks for 'posix.system')"],
    "full disk, disabled": [FULL, "File too large", "Complete ones there: step-1."],
    "full disk, async": [FULL, "File too large", "Complete ones there: step-1."],
}


@pytest.mark.parametrize("trouble", SAID)
def test_it_is_said_what_is_wrong_and_what_there_is(said, trouble):
    for words in SAID[trouble]:
        assert words in said[trouble]


def resumed(folder: Path, value: Any) -> Any:
    """What the data loader of a job is given."""
    dcp.save({"dataloader": {"dp_rank_0": value}}, checkpoint_id=folder, no_dist=True)
    state = {"dataloader": {"dp_rank_0": None}}
    reader, planner = SafeFileSystemReader(folder), checkpoint._JobPlanner("refuse")
    dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
    return state["dataloader"]["dp_rank_0"]


def test_no_code_of_a_data_loader_is_run(tmp_path):
    """By any of the places where it may be; by which pickles, test_safe_reader asks."""
    ran = tmp_path / "ran"
    data = PICKLES["a command"](ran)
    for held in (data, bytearray(data), [[data]], {"a": (bytearray(data),)}, random.Random(0)):
        with pytest.raises(dcp.api.CheckpointException, match=r"dataloader\.dp_rank_0"):
            pickle.loads(resumed(tmp_path / "saved", held))
    assert not ran.exists()


def test_the_state_of_a_data_loader_is_read_as_it_was_saved(tmp_path):
    inside = {"a": [1, 2.0, None, {3}], "b": torch.ones(2), "c": bytearray(b"x"), "d": (True, "y")}
    for value in (4, "x", [1, None]):
        assert resumed(tmp_path, value) == value
    assert str(pickle.loads(resumed(tmp_path, pickle.dumps(inside)))) == str(inside)


@ranks(2)
def test_where_one_rank_cannot_reach_a_folder_no_rank_waits():
    rank = dist.get_rank()
    manager = object.__new__(checkpoint.ShampooCheckpoints)
    manager.folder = "far://job"

    def unreachable(*_: Any) -> None:
        if rank == 0:
            raise OSError("no credentials")

    # Saving is left to PyTorch, which tells all ranks.
    with (
        mock.patch.object(checkpoint, "SafeFileSystemReader", unreachable),
        mock.patch.object(checkpoint.CheckpointManager, "dcp_save", return_value="saved"),
    ):
        assert manager.dcp_save({}, "far://job/step-1") == "saved"
    with mock.patch.object(manager, "_reader", unreachable):
        said = error_of(manager.dcp_load, {}, "far://job/step-1", False, False)
    assert said == "far://job/step-1: no credentials"


def test_two_jobs_cannot_write_to_one_folder(tmp_path):
    job, folder = jobs.write_job(tmp_path), f"{tmp_path}/checkpoint"
    with lock_folder(folder):  # of this process; it falls with it
        for outcome in run(2, job, "--checkpoint.enable", "--training.steps=2"):
            assert outcome.exit_code == 2 and outcome.losses == []
            assert f"another job writes to {folder};" in outcome.logged


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    if os.geteuid() == 0:
        folder = "/sys/checkpoint"  # where not even root can
    else:
        tmp_path.chmod(0o555)
        folder = str(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=f"{folder} cannot be written to"):
        lock_folder(folder)
