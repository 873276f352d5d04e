"""One job at a time writes to a folder of checkpoints."""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import re
import socket
import stat
from pathlib import Path
from typing import IO

__all__ = ["FolderLock"]

_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
_HOLDER = re.compile(r"process \d+ on \S+ since [-\d: ]+\n?")
_LONGEST = 1_000
_NO_LOCK = "no lock of a job, and is left as it is; delete it, or give another --job.dump_folder"


class FolderLock:
    """A lock beside a folder, which the system gives back when this process ends, however it does.

    Not in the folder: TorchTitan takes its existence for a run that goes on. Locks of this kind
    hold between the nodes of a shared file system too, where it knows them.

    Args:
        folder: Need not exist.

    Raises:
        ValueError: Another process holds it, the place cannot be written to, or what is there is no
            lock of a job: a link, no file, or a file that says something else.
    """

    def __init__(self, folder: str) -> None:
        path = Path(f"{folder}.lock")
        self._file: IO[str] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A link would be followed to a file of somebody else; opening a pipe would wait.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file = os.fdopen(os.open(path, flags, 0o666), "r+", errors="replace")
        except OSError as error:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError(f"{path} is {_NO_LOCK}") from None
            raise ValueError(f"{folder} cannot be written to: {error}") from None
        known = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        holder = self._file.read(_LONGEST) if known else ""
        if not known or (holder and not _HOLDER.fullmatch(holder)):
            self.release()
            raise ValueError(f"{path} is {_NO_LOCK}")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD_BY_ANOTHER:
                logging.getLogger().warning(
                    f"{path} cannot be locked ({error}): let no other job write there"
                )
                return
            self.release()
            raise ValueError(
                f"another job writes to {folder} ({holder.strip()}); give this one another "
                "--job.dump_folder, or stop the other first"
            ) from None
        now = datetime.datetime.now().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # a full disk; the lock itself holds
            self._file.seek(0)
            self._file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()} since {now}", file=self._file)
            self._file.flush()

    def release(self) -> None:
        """Let others have it; calling it again changes nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
