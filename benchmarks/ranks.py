"""Runs a function on several forked ranks: gloo, CPU, one process and one thread per rank."""

import ctypes
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first use of an optimizer imports it: here, not in every rank
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_on_ranks(
    n: int, function: Callable[..., Any], /, *arguments: Any, init: bool = True
) -> Any:
    """Call function(*arguments) on n ranks; return what rank 0 returned, which is pickled.

    Forked: the function and its arguments may be anything, and modules are imported already. The
    caller must not have used threads of PyTorch before.

    Args:
        init: initialise the default process group before the call; otherwise the function does
            (RANK and so on are set either way).

    Raises:
        torch.multiprocessing.ProcessException: what a rank raised, with its traceback.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = (n, port, Path(folder), init, function, arguments)
        start_processes(_rank_main, call, n, start_method="fork")
        return pickle.loads(Path(folder, "value").read_bytes())


def _rank_main(
    rank: int, n: int, port: int, folder: Path, init: bool, function: Any, arguments: Any
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", n), ("MASTER_PORT", port)):
        os.environ[name] = str(value)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    _keep_freed_memory()
    if init:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=n
        )
    value = function(*arguments)
    if rank == 0:
        (folder / "value").write_bytes(pickle.dumps(value))
    if dist.is_initialized():
        dist.barrier()  # a rank that left earlier would fail the others


def _keep_freed_memory() -> None:
    """As CUDA's allocator does. By glibc's own rules, in which chance has a part, memory would be
    given back and fetched anew on each step, or not."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
