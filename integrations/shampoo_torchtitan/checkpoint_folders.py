"""What is in a job's folder of checkpoints, on this machine or where fsspec reaches it."""

import fcntl
import logging
import os
import re
from pathlib import Path
from typing import IO

from shampoo_fsdp.checkpoint.safe_reader import SafeFileSystemReader

_WRITTEN_LAST = (".metadata", "model.safetensors.index.json")


def find_steps(folder: str | Path) -> dict[int, bool]:
    """Whether the checkpoint of a step was saved to its end, for each step that has one.

    Raises:
        ImportError, OSError, ...: Whatever a remote file system raises.
    """
    fs = SafeFileSystemReader(folder).fs
    try:
        names = [os.path.basename(path.rstrip("/")) for path in fs.ls(folder)]
    except FileNotFoundError:
        return {}
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name))]

    def is_complete(step: int) -> bool:
        reader = SafeFileSystemReader(os.path.join(folder, f"step-{step}"))
        return any(reader.size(name) is not None for name in _WRITTEN_LAST)

    return {step: is_complete(step) for step in steps}


def complete_checkpoints(folder: str | Path) -> list[str]:
    """The names of the checkpoints in a job's folder that were saved to the end, oldest first."""
    return [f"step-{step}" for step, complete in sorted(find_steps(folder).items()) if complete]


def lock_folder(folder: str) -> IO[bytes]:
    """A lock on a file beside a folder, which need not exist, until the file is closed or this
    process ends, however it does.

    Not in the folder: TorchTitan takes its existence for a run that goes on. Locks of this kind
    hold between the nodes of a shared file system too, where it knows them. Nothing is written.

    Raises:
        ValueError: Another process holds it, or the place cannot be written to.
    """
    path = Path(f"{folder}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(
            f"another job writes to {folder}; give this one another --job.dump_folder, or stop "
            "the other first"
        ) from None
    except OSError as error:
        logging.getLogger().warning(f"{path} cannot be locked ({error}): let no other job write")
    return file
