"""Run a test on several real ranks: gloo, CPU, one process per rank.

    @ranks(4)
    def test_sum(tmp_path):
        t = torch.ones(1)
        dist.all_reduce(t)
        assert t.item() == 4

    per_rank = run_ranks(2, module_level_function, step=3)  # return values, by rank

The ranks are forked from a server process that has imported the heavy modules once per
session and has done nothing else, so that a rank starts in milliseconds and still begins from
a clean state.

The functions and their arguments travel to the ranks: functions must be at module level
(tests in classes cannot run on ranks), arguments and return values picklable.
"""

import dataclasses
import faulthandler
import functools
import importlib
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tests.arithmetic  # noqa: F401

_ROOT = Path(__file__).resolve().parent.parent
_PROCESS_GROUP_TIMEOUT_S = 60.0
# After the first failure, how long the other ranks may take to report theirs.
_GRACE_S = 3.0
_EXIT_S = 10.0

_preloaded = [
    "pytest",
    "torch",
    # torch.optim and fully_shard import it on their first call.
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "shampoo_fsdp",
]


def preload(*modules: str) -> None:
    """Add modules that the ranks import before they fork.

    Call it at the top of a test module: pytest imports all of them before the first test runs.
    Calls after the first use of ranks change nothing but the time that an import takes.
    """
    _preloaded.extend(name for name in modules if name not in _preloaded)


class RanksError(Exception):
    """Some ranks failed, died or did not finish."""


def ranks(
    n: int, *, timeout: float = 120.0, init: bool = True
) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """Decorate a test function to run on n ranks; the test fails if any rank does.

    Args:
        n: number of ranks.
        timeout: seconds for all ranks together; the stacks of ranks that have not finished by
            then are the test's error message.
        init: initialise the default process group before the call. Otherwise the function does
            (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set either way).
    """

    def decorate(function: Callable[..., object]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(**kwargs: Any) -> None:
            try:
                run_ranks(n, function, timeout=timeout, init=init, **kwargs)
            except RanksError as error:
                pytest.fail(str(error), pytrace=False)

        test.function_on_ranks = function  # type: ignore[attr-defined]
        return test

    return decorate


def run_ranks(
    n: int,
    function: Callable[..., Any],
    /,
    *,
    timeout: float = 120.0,
    init: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Call function(**kwargs) on n ranks and return what it returned, by rank.

    Args:
        n, timeout, init: as for `ranks`.
        function: a function at the top level of an importable module.
        kwargs: its arguments; picklable.

    Raises:
        RanksError: a rank raised an exception, died, or did not finish in time.
    """
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = _Call(
            module=function.__module__,
            qualname=function.__qualname__,
            arguments=pickle.dumps(kwargs),  # multiprocessing's own shares tensors' memory
            world_size=n,
            init=init,
            timeout=timeout,
            end=time.time() + timeout,
            folder=folder,
            port=_free_port(),
            environment=dict(os.environ),
        )
        with _started(n, call) as workers:
            return _collect(workers, timeout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What every rank needs to know."""

    module: str
    qualname: str
    arguments: bytes
    world_size: int
    init: bool
    timeout: float
    end: float
    folder: str
    port: int
    environment: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Report:
    """What a rank says at the end: kind is "returned" or "raised"."""

    kind: str
    time: float
    text: str = ""
    value: bytes = b""


@dataclasses.dataclass(kw_only=True)
class _Worker:
    """The test session's side of one rank."""

    rank: int
    process: BaseProcess
    pipe: "connection.Connection[Any, Any]"
    stacks: Path
    """Where faulthandler writes the rank's stacks."""
    report: _Report | None = None


# ------------------------------------------------------------------ in the test session


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """Start the server that the ranks fork from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_preloaded)
    # The server takes its import path from the environment that it starts in (Python 3.11 ignores
    # the one it is handed), and its number of threads: OpenMP's would not survive the fork.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(_ROOT), *filter(None, sys.path)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


@contextmanager
def _started(n: int, call: _Call) -> Iterator[list[_Worker]]:
    """Start the ranks, and leave none behind."""
    context = _context()
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))  # the ranks get a copy of this process's path
    workers: list[_Worker] = []
    try:
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(rank, call, theirs))
            stacks = Path(call.folder) / f"stacks_{rank}"
            stacks.touch()
            process.start()
            theirs.close()  # or the end of the rank would not end the pipe
            workers.append(_Worker(rank=rank, process=process, pipe=ours, stacks=stacks))
        yield workers
        for worker in workers:
            worker.pipe.send("all ranks have finished")
        deadline = time.monotonic() + _EXIT_S
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.process.close()
            worker.pipe.close()


def _collect(workers: list[_Worker], timeout: float) -> list[Any]:
    """Wait for all ranks' reports and return their values, or raise what they amount to."""
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout + 1.0  # by then those that hang have written their stacks
    failed = False
    while any(worker.report is None for worker in workers):
        pipes = {worker.pipe: worker for worker in workers if worker.report is None}
        ready = connection.wait(list(pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            worker = pipes[pipe]  # type: ignore[index]
            worker.report = _receive(worker)
            if worker.report.kind != "returned" and not failed:
                failed = True
                deadline = min(deadline, time.monotonic() + _GRACE_S)

    reports = [(worker.rank, worker.report) for worker in workers if worker.report is not None]
    raised = [(rank, report) for rank, report in reports if report.kind == "raised"]
    unfinished = [worker for worker in workers if worker.report is None]
    if raised:
        numbers = [rank for rank, _ in raised]
        first, report = min(raised, key=lambda item: item[1].time)
        message = f"{_name(numbers)} of {len(workers)} failed"
        if unfinished:
            message += f" ({_name([w.rank for w in unfinished])} had not finished)"
        raise RanksError(f"{message}; rank {first} was the first:\n\n{report.text}")
    if unfinished:
        numbers = [worker.rank for worker in unfinished]
        message = f"{_name(numbers)} of {len(workers)} did not finish within {timeout:g} s"
        stacks = "\n\n".join(f"rank {w.rank}:\n{w.stacks.read_text()}" for w in unfinished)
        raise RanksError(f"{message}; where they are:\n\n{stacks}")
    return [pickle.loads(report.value) for _, report in reports]


def _receive(worker: _Worker) -> _Report:
    try:
        report = worker.pipe.recv()
        assert isinstance(report, _Report)
        return report
    except (EOFError, ConnectionResetError):
        worker.process.join(_EXIT_S)
        text = f"the process died with exit code {worker.process.exitcode}"
        with suppress(FileNotFoundError):
            text += "\n" + worker.stacks.read_text()
        # A death comes first: what other ranks report at that time are its consequences.
        return _Report(kind="raised", time=0.0, text=text)


def _name(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))}"


# --------------------------------------------------------------------------- in a rank


def _rank_main(rank: int, call: _Call, pipe: "connection.Connection[Any, Any]") -> None:
    """Report what the function did, then wait: for the others' success, or for the end.

    A rank that left while others still communicate would fail them with secondary errors.
    """
    _open_stacks_file(Path(call.folder), rank, call.end)
    try:
        _set_environment(rank, call)
        value = _call_function(rank, call)
        report = _Report(kind="returned", time=time.time(), value=pickle.dumps(value))
    except BaseException:
        report = _Report(kind="raised", time=time.time(), text=traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(report)
    with suppress(EOFError):  # the session itself has ended
        pipe.recv()
    if dist.is_initialized():
        dist.destroy_process_group()


def _open_stacks_file(folder: Path, rank: int, end: float) -> None:
    # Left open for the life of the rank.
    file = (folder / f"stacks_{rank}").open("w")
    faulthandler.enable(file)
    faulthandler.dump_traceback_later(max(0.1, end - time.time()), file=file)
    # torchelastic's `record`, around TorchTitan's trainer, would send a crash's stacks to stderr.
    faulthandler.enable = lambda *args, **kwargs: None  # type: ignore[assignment]


def _set_environment(rank: int, call: _Call) -> None:
    # The server's environment is that of the first test.
    os.environ.clear()
    os.environ.update(call.environment)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(call.world_size),
        "LOCAL_WORLD_SIZE": str(call.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(call.port),
    }
    if sys.platform == "linux":
        # Gloo looks the host's own name up otherwise, which not every machine can answer.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)


def _call_function(rank: int, call: _Call) -> object:
    if call.init:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{call.folder}/rendezvous",
            rank=rank,
            world_size=call.world_size,
            timeout=timedelta(seconds=min(_PROCESS_GROUP_TIMEOUT_S, call.timeout)),
        )
    _rewrite_assertions()
    function: Any = importlib.import_module(call.module)
    for name in call.qualname.split("."):
        function = getattr(function, name)
    # The module's name for a decorated test is the decorated one.
    function = getattr(function, "function_on_ranks", function)
    return function(**pickle.loads(call.arguments))


def _rewrite_assertions() -> None:
    """Let asserts of test modules show their values, as they do in the test session."""
    # No public way exists; without it an assertion says only that it failed.
    with suppress(Exception):
        from _pytest.assertion import install_importhook
        from _pytest.config import get_config

        install_importhook(get_config([]))
