"""Counts what a pretended GPU has to do: kernels, FLOPs, bytes, transfers, memory, and what waits
for what."""

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shampoo_fsdp.kernels.language import observed_by
from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.pretended_gpu import DEVICE, PretendedTensor


@dataclass
class TimedTransfer:
    """A transfer between ranks; times in ms since the step began, by the machine's rates."""

    name: str
    near: int
    """Bytes to other ranks of the node."""
    far: int
    """Bytes to other nodes."""
    begins: float
    ends: float
    waited: float = 0.0
    """How long the GPU has nothing to do but wait for it."""


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts what the GPU does, within :func:`pretended_gpu`."""

    def __init__(self, machine: Machine | None = None, *, by_line: bool = False) -> None:
        """
        Args:
            by_line: whether `lines` are wanted.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        """For each part (see `part`) the numbers of "launches"; FLOPs of matrix products in "bf16"
        (or fp16), "tf32" and "fp32"; "decompositions", and for each of n x n n^1.5 in "eigh" or
        "qr"; "bytes" of device memory that operators read and write: each tensor once, and of one
        that rows are taken of these rows; of them "operands", sums and results of PyTorch's matrix
        products."""
        self.lines: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
        """The same, and "ms", by file and number of the line of ours that asks for it."""
        self.part = ""
        """To which part of the work what follows belongs."""
        self.now = 0.0
        """Milliseconds since the start, by the machine's rates."""
        self.busy: dict[str, float] = defaultdict(float)
        """Milliseconds of each part's kernels."""
        self.transfers: list[TimedTransfer] = []
        self.memory = 0
        """Bytes that were allocated within, and still are."""
        self.peaks: Counter[str] = Counter()
        """The most that they were, in each part."""
        self._machine = machine or Machine()
        self._by_line = by_line
        self._sizes: dict[int, int] = {}
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._holds(storage)
            return result

        self._resizing = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self._patches = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @property
    def peak(self) -> int:
        """The most bytes of any part."""
        return max(self.peaks.values(), default=0)

    @property
    def total(self) -> Counter[str]:
        """The counts of all parts together."""
        return sum(self.counts.values(), Counter())

    def belongs(self, part: str) -> None:
        """What has been counted without a part, is of this one."""
        self.counts[part].update(self.counts.pop("", {}))
        self.busy[part] += self.busy.pop("", 0.0)
        self.peaks[part] = max(self.peaks[part], self.peaks.pop("", 0))

    def __enter__(self) -> "Work":
        self._patches.enter_context(self._resizing)
        self._patches.enter_context(observed_by(self._launched))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        given, made = _storages((args, kwargs)), _storages(result)
        if not given and not made:
            return result  # of the host alone
        for storage in made:
            if all(storage._cdata != other._cdata for other in given):
                self._holds(storage)
        if launches := _launches(func, args, kwargs):
            self._add(Counter({"launches": launches}) + _work(func, args, kwargs, result))
        return result

    def _launched(self, moved: int, flops: int) -> None:
        """A kernel of our own."""
        self._add(Counter({"launches": 1, "bytes": moved, "bf16": flops}))

    def _add(self, done: Counter[str]) -> None:
        took = self._machine.milliseconds(done)
        self.counts[self.part].update(done)
        self.busy[self.part] += took
        self.now += took
        if self._by_line:
            self.lines[_line()].update({**done, "ms": took})

    def send(self, name: str, near: int, far: int) -> TimedTransfer:
        """A transfer sets out; the network carries one after the other."""
        free = max([self.now, *(transfer.ends for transfer in self.transfers)])
        took = self._machine.transfer(near, far)
        self.transfers.append(TimedTransfer(name, near, far, free, free + took))
        self.counts[self.part]["launches"] += 1
        return self.transfers[-1]

    def wait(self, transfer: TimedTransfer) -> None:
        """What follows needs what it brings."""
        transfer.waited = max(0.0, transfer.ends - self.now)
        self.now += transfer.waited

    def _holds(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._release, key)
        self.memory += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peaks[self.part] = max(self.peaks[self.part], self.memory)

    def _release(self, key: int) -> None:
        self.memory -= self._sizes.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """The storages on the GPU."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, PretendedTensor)]
    return [t.untyped_storage() for t in tensors]


_PACKAGE = str(Path(__file__).parents[1])
_NOT_LINES = (str(Path(__file__).parent), str(Path(_PACKAGE, "kernels")))
"""Those of who counts; and of kernels, whose callers tell more."""


def _line() -> tuple[str, int]:
    """The innermost line of this package, outside of these rooms, that is at work."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and not file.startswith(_NOT_LINES):
            return file, frame.f_lineno
    return "elsewhere", 0


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "baddbmm_")
_DECOMPOSITIONS = {"_linalg_eigh": "eigh", "linalg_qr": "qr"}
_GATHERS = ("embedding", "gather", "index", "index_select", "take")
_SCATTERS = {"index_add_": 3, "index_copy_": 2, "index_put_": 2, "scatter_": 2, "scatter_add_": 3}
"""How often they pass over what they write, which they read elsewhere."""
_WRITERS = (
    *("_foreach_copy_", "_foreach_zero_", "copy_", "fill_", "full_like", "new_full", "new_ones"),
    *("new_zeros", "ones_like", "zero_", "zeros_like"),
)
"""They do not read their first argument."""


def _work(func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> Counter[str]:
    name = func.overloadpacket.__name__
    if name in _DECOMPOSITIONS:
        count, n = args[0].shape[:-2].numel(), args[0].shape[-1]
        kind = _DECOMPOSITIONS[name]
        return Counter({"decompositions": count, kind: count * round(n**1.5)})
    given = {key: value for key, value in kwargs.items() if key != "out"}
    if name in _GATHERS:
        return Counter({"bytes": 2 * _bytes(result) + _bytes((args[1:], given))})
    if name in _SCATTERS:
        source = next(t for t in reversed(args) if isinstance(t, Tensor))
        return Counter({"bytes": (_SCATTERS[name] - 1) * _bytes(source) + _bytes(args[1:])})
    written = _bytes(_changed(func, args) if result in (None, ()) else result)
    moved = _bytes((args[name in _WRITERS :], given)) + written
    if name not in _PRODUCTS:
        return Counter({"bytes": moved})
    a, b = args[:2] if name in ("mm", "bmm") else args[1:3]
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    kind = "bf16" if a.dtype.itemsize == 2 else "tf32" if tf32 else "fp32"
    return Counter({kind: 2 * a.numel() * b.shape[-1], "bytes": moved, "operands": moved})


def _changed(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """What an operator changes that returns nothing. (Fused AdamW changes gradients if they are
    scaled, which they are not.)"""
    return [
        value
        for value, argument in zip(args, func._schema.arguments, strict=False)
        if argument.is_write and argument.name != "grads"
    ]


def _bytes(values: Any) -> int:
    """Of tensors; what one of them has in another order is the same memory."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor) and 0 not in t.stride()]
    places = {(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in places.values())


_NO_KERNEL = (
    *("_reshape_alias", "_unsafe_view", "alias", "detach", "device", "empty", "empty_like"),
    *("empty_strided", "lift_fresh", "new_empty", "new_empty_strided"),
    "scalar_tensor",  # of a number in Python, which goes with the kernel that reads it
)
"""Operators that do nothing on the device: memory is only named or taken."""


def _launches(func: Any, args: Sequence[Any], kwargs: Any) -> int:
    """One, or none of what only makes views. A `_foreach` operator is one if it is fused, else one
    for each tensor.

    It is fused if its tensors are dense, those of a list are of one type, and its lists agree in
    sizes and strides; and in types, unless it copies. (The kernels of one that is fused are more
    where tensors are many or very large: 64 tensors or 2^24 elements, about, make one.)
    """
    name = func.overloadpacket.__name__
    if name in _NO_KERNEL:
        return 0
    if not name.startswith("_foreach_"):
        return 1
    values = (*args, *kwargs.values())
    lists = [v for v in values if isinstance(v, list | tuple) and v and isinstance(v[0], Tensor)]
    types = [{t.dtype for t in tensors} for tensors in lists]
    converts = name.startswith("_foreach_copy")
    fused = all(len(of) == 1 for of in types) and (converts or len(set.union(*types)) == 1)
    fused = fused and all(
        _is_dense(first) and all((t.shape, t.stride()) == (first.shape, first.stride()) for t in of)
        for first, *of in zip(*lists, strict=True)
    )
    return 1 if fused else len(lists[0])


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements are all of some part of memory, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
