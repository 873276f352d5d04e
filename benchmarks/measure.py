"""Exact counts of what a step does: bytes that it sends, and that are kept."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.autograd import ProfilerActivity, _disable_profiler, _enable_profiler, _prepare_profiler
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp.checkpoint.sharded import local_parts


class Sent(TorchDispatchMode):
    """Within it, counts the bytes that the calling rank sends to others, by the least that each
    collective has to send."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own operators are taken apart first
        if func.namespace in ("c10d", "_c10d_functional"):
            self.bytes += _bytes_sent(func, args)
        return func(*args, **(kwargs or {}))


# Of collectives but all_to_all: which argument is sent, and how often, by the number of ranks.
_SENT: dict[str, tuple[int, Callable[[int], float]]] = {
    "allgather_base": (1, lambda n: n - 1),
    "all_gather_into_tensor": (0, lambda n: n - 1),
    "allreduce": (0, lambda n: 2 * (n - 1) / n),
    "all_reduce": (0, lambda n: 2 * (n - 1) / n),
    "reduce_scatter_base": (1, lambda n: (n - 1) / n),
    "reduce_scatter_tensor": (0, lambda n: (n - 1) / n),
    "wait_tensor": (0, lambda n: 0),
    "barrier": (0, lambda n: 0),
}


def _bytes_sent(func: Any, args: tuple[Any, ...]) -> int:
    """All groups are assumed to be all ranks.

    Raises:
        KeyError: a collective that is not known here.
    """
    n, rank = dist.get_world_size(), dist.get_rank()
    name = func._schema.name.split("::")[1].strip("_")
    if name in ("alltoall_base", "all_to_all_single"):
        source, rows = (args[1], args[4]) if name == "alltoall_base" else (args[0], args[2])
        rows = rows or [source.shape[0] // n] * n
        return _bytes(source) * (sum(rows) - rows[rank]) // max(sum(rows), 1)
    if name == "alltoall":  # of lists
        return sum(_bytes(tensor) for i, tensor in enumerate(args[1]) if i != rank)
    argument, times = _SENT[name]
    return int(sum(map(_bytes, _tensors(args[argument]))) * times(n))


def state_bytes(optimizers: Iterable[Any]) -> int:
    """Bytes of this rank's part of the optimizers' state."""
    seen: set[tuple[int, int, tuple[int, ...]]] = set()
    total = 0
    for tensor in _tensors([list(o.state.values()) for o in optimizers]):
        key = (tensor.data_ptr(), tensor.numel(), tensor.stride())
        if tensor.numel() and key not in seen:
            seen.add(key)
            total += _bytes(tensor)
    return total


def _tensors(value: Any, visited: set[int] | None = None) -> Iterator[Tensor]:
    """The plain tensors in a value: of containers, of objects, of sharded ones this rank's."""
    visited = set() if visited is None else visited
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        yield from local_parts(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, visited)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, visited)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), visited)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def memory(build: Callable[[], Callable[[], object]], warm_up: int, steps: int) -> tuple[int, int]:
    """Bytes that PyTorch has allocated for an optimizer: between its steps, and at their peak.

    From every allocation and release since before it was built, by PyTorch's profiler. (What
    LAPACK and BLAS allocate for themselves is not seen.)

    Args:
        build: makes the optimizer and returns its step.
        warm_up: steps before it has all of its state.
        steps: that the peak is taken over.
    """
    # torch.profiler itself takes ten times as long, to make Python objects of all events.
    settings = ProfilerConfig(
        ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig()
    )
    _prepare_profiler(settings, {ProfilerActivity.CPU})
    _enable_profiler(settings, {ProfilerActivity.CPU})
    with _frees_are_seen():
        step = build()
        for _ in range(warm_up):
            step()
        for _ in range(steps):
            with record_function(_MEASURED):
                step()
    events = _disable_profiler().events()
    begin = min(e.start_ns() for e in events if e.name() == _MEASURED)
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = sum(n for t, n in allocations if t < begin)
    during = itertools.accumulate((n for t, n in allocations if t >= begin), initial=alive)
    return alive, max(during)


_MEASURED = "benchmarks: a measured step"


@contextmanager
def _frees_are_seen() -> Iterator[None]:
    """The profiler sees what the calling thread frees. Gloo's keeps what travelled a little longer
    than it says: who waits, waits for that too."""
    wait = dist.Work.wait

    def waits(work: dist.Work, *arguments: Any) -> Any:
        result = wait(work, *arguments)
        time.sleep(0.01)
        return result

    with mock.patch.object(dist.Work, "wait", waits):
        yield
