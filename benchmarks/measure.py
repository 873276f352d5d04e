"""Exact counts of what a step does: operators, read-backs, bytes sent and kept, matrix products."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.autograd import ProfilerActivity, _disable_profiler, _enable_profiler, _prepare_profiler
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp.checkpoint.sharded import local_parts

__all__ = ["Counts", "Products", "memory", "state_bytes"]

_aten = torch.ops.aten
_READ_BACKS = {
    _aten._local_scalar_dense.default,
    _aten.item.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
}
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"}
_DECOMPOSITIONS = {"_linalg_eigh", "linalg_qr", "_linalg_svd"}


class _Dispatched(TorchDispatchMode):
    """Sees the operators on local tensors; DTensor's own are taken apart first."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class Counts(_Dispatched):
    """Within it, counts what the calling rank does.

    operators: dispatched ones that are not views (collectives are among them).
    read_backs: values of tensors, or shapes that depend on them, given to Python.
    bytes_sent: to other ranks, by the least that each collective has to send.
    """

    def __init__(self, on_host: Iterable[Tensor] = ()) -> None:
        """
        Args:
            on_host: tensors that are on the CPU on every machine, which nobody waits for.
        """
        super().__init__()
        self.operators = self.read_backs = self.bytes_sent = 0
        self._conversions = _Conversions(on_host)

    def __enter__(self) -> "Counts":
        self._conversions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._conversions.__exit__(*error)
        self.read_backs += self._conversions.number

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.operators += not func.is_view
        # Indexing with a mask has a result whose shape depends on values.
        by_mask = func is _aten.index.Tensor and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        self.read_backs += func in _READ_BACKS or by_mask
        if func.namespace in ("c10d", "_c10d_functional"):
            self.bytes_sent += _bytes_sent(func, args)
        return func(*args, **kwargs)


class _Conversions(TorchFunctionMode):
    """Counts tensors that become lists or arrays, which is not dispatched on CPUs."""

    def __init__(self, on_host: Iterable[Tensor]) -> None:
        super().__init__()
        self.number = 0
        self._on_host = {id(tensor) for tensor in on_host}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        converts = func in (Tensor.tolist, Tensor.numpy, Tensor.__array__)
        self.number += converts and id(args[0]) not in self._on_host
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


class Products(_Dispatched):
    """Within it, the time of matrix products and of decompositions, and the products' FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = self.decomposition_seconds = self.flops = 0.0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in _PRODUCTS | _DECOMPOSITIONS:
            return func(*args, **kwargs)
        start = time.perf_counter()
        result = func(*args, **kwargs)
        took = time.perf_counter() - start
        if name in _DECOMPOSITIONS:
            self.decomposition_seconds += took
            return result
        self.seconds += took
        left, right = [a for a in args if isinstance(a, Tensor)][-2:]
        self.flops += 2.0 * right.shape[-1] * left.numel()
        return result


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
