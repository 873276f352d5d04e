"""One job at a time writes to a folder of checkpoints."""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

__all__ = ["FolderLock"]

_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)


class FolderLock:
    """A lock beside a folder, which the system gives back when this process ends, however it does.

    Not in the folder: TorchTitan takes its existence for a run that goes on. Locks of this kind
    hold between the nodes of a shared file system too, where it knows them.

    Args:
        folder: Need not exist.

    Raises:
        ValueError: Another process holds it, or the place cannot be written to.
    """

    def __init__(self, folder: str) -> None:
        path = Path(f"{folder}.lock")
        self._file: IO[str] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            raise ValueError(f"{folder} cannot be written to: {error}") from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD_BY_ANOTHER:
                logging.getLogger().warning(
                    f"{path} cannot be locked ({error}): let no other job write there"
                )
                return
            self._file.seek(0)
            holder = self._file.read().strip()
            self.release()
            raise ValueError(
                f"another job writes to {folder} ({holder}); give this one another "
                "--job.dump_folder, or stop the other first"
            ) from None
        now = datetime.datetime.now().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # a full disk; the lock itself holds
            self._file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()} since {now}", file=self._file)
            self._file.flush()

    def release(self) -> None:
        """Let others have it; calling it again changes nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
