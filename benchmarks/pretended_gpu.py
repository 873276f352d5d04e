"""What a GPU would do, counted without one: tensors have a shape and no values or memory."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shampoo_fsdp.rules.precision import full_precision

__all__ = ["CUDA", "Work", "pretended_gpu"]

CUDA = torch.device("cuda")


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within it tensors can be made on CUDA. Reading a value on the host is an error."""
    with FakeTensorMode(), _Indexing(), full_precision("cuda"), torch.no_grad():
        yield


class _Indexing(TorchFunctionMode):
    """Indexing and copies, for which builds for CPUs do not take tensors of a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            return self._at(*args)
        if func is torch.Tensor.__setitem__:
            at, value = self._at(*args[:2]), args[2]
            copy = torch.ops.aten.copy_.default
            return copy(at, value) if isinstance(value, Tensor) else at.fill_(value)
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_.default(*args[:2])
        return func(*args, **(kwargs or {}))

    def _at(self, tensor: Tensor, index: Any) -> Tensor:
        dim = 0
        for one in index if isinstance(index, tuple) else (index,):
            if one is Ellipsis:
                dim = tensor.ndim - 1  # one more index follows
            elif one is None:
                tensor, dim = tensor.unsqueeze(dim), dim + 1
            elif isinstance(one, int):
                tensor = tensor.select(dim, one)
            elif isinstance(one, slice):
                start, stop, _ = one.indices(tensor.shape[dim])
                tensor, dim = tensor.narrow(dim, start, stop - start), dim + 1
            else:
                tensor = torch.ops.aten.index.Tensor(tensor, [None] * dim + [one])
                dim += one.ndim
        return tensor


class Work(TorchDispatchMode):
    """Counts FLOPs of matrix products by precision, decompositions, and "bytes": what all other
    operators read and write of device memory, each tensor once for each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("bmm", "baddbmm", "baddbmm_"):
            a, b = args[:2] if name == "bmm" else args[1:3]
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            kind = "bf16" if a.dtype == torch.bfloat16 else "tf32" if tf32 else "fp32"
            self.counts[kind] += 2 * a.numel() * b.shape[-1]
        elif name in ("_linalg_eigh", "linalg_qr"):
            self.counts["decompositions"] += len(args[0])
        elif not _is_view(func) and name not in _FREE:
            # What is only written is no input: `out`, and the target of a copy.
            read = args[1:] if name in ("copy_", "fill_") else args
            given = {k: v for k, v in kwargs.items() if k != "out"}
            self.counts["bytes"] += _bytes((read, given)) + _bytes(result)
        return result


_FREE = ("device", "empty", "empty_like", "empty_strided", "new_empty", "detach")


def _is_view(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _bytes(values: Any) -> int:
    tensors = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values() if 0 not in t.stride())
