"""Runs a function on several forked ranks: gloo, CPU, one process and one thread per rank."""

import ctypes
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from typing import Any

import torch
import torch._dynamo  # the first use of an optimizer imports it: here, not in every rank
import torch.distributed as dist

__all__ = ["run_on_ranks"]


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
        RuntimeError: what a rank raised, with its traceback.
    """
    context = get_context("fork")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, processes = [], []
        for rank in range(n):
            ours, theirs = context.Pipe()
            call = (rank, n, port, folder, init, theirs, function, arguments)
            process = context.Process(target=_rank_main, args=call, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _collect(pipes: list[Any]) -> Any:
    """Rank 0's value, once all ranks are done, or the first failure."""
    waiting, first = {pipe: rank for rank, pipe in enumerate(pipes)}, None
    while waiting:
        for pipe in connection.wait(list(waiting)):
            rank = waiting.pop(pipe)
            try:
                error, value = pipe.recv()
            except EOFError:
                error, value = "the process died", None
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            first = value if rank == 0 else first
    for pipe in pipes:
        pipe.send("all ranks are done")
    return first


def _rank_main(
    rank: int,
    n: int,
    port: int,
    folder: str,
    init: bool,
    pipe: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # The end of the parent, even by a signal, is this process's: prctl(PR_SET_PDEATHSIG).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        _keep_freed_memory()
    try:
        if init:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=n
            )
        value = function(*arguments)
        pipe.send((None, value if rank == 0 else None))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    pipe.recv()  # a rank that left earlier would fail the others


def _keep_freed_memory() -> None:
    """As CUDA's allocator does. By glibc's own rules, in which chance has a part, memory would be
    given back and fetched anew on each step, or not."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
