"""A GPU that is not there: tensors on it have a shape and no values or memory."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from shampoo_fsdp.kernels.language import observed_by
from shampoo_fsdp.rules.precision import full_precision

CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
DEVICE = torch.ops.prim.device.default


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """A context in which tensors can be made on CUDA; reading a value of one on the host is an
    error. Those of the host are what they always are."""
    # Builds for CPUs have no memory that is pinned, and no events.
    pinned = mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor)
    events = mock.patch("torch.cuda.Event")
    hidden = mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="")  # what there is
    with ExitStack() as stack:
        for context in (hidden, _Indexing(), pinned, events, torch.no_grad()):
            stack.enter_context(context)
        stack.enter_context(_Factories())  # type: ignore[no-untyped-call]
        stack.enter_context(full_precision("cuda"))  # which sees no GPU
        stack.enter_context(observed_by(lambda moved, flops: None))  # kernels of our own do nothing
        yield


class PretendedTensor(Tensor):
    """A tensor of PyTorch's "meta" device, which has no memory, that says it is on the GPU.

    (PyTorch's own fake tensors find out what comes of any operator, which takes them milliseconds.)
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _on_meta = False
    """Whether an operator of that device is at work."""

    @staticmethod
    def __new__(cls, meta: Tensor) -> "PretendedTensor":
        return Tensor._make_subclass(cls, meta, dispatch_device=True, device_for_backend_keys=CUDA)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _META if PretendedTensor._on_meta else CUDA

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is DEVICE:
            return _META if cls._on_meta else CUDA
        if func is torch.ops.aten._fused_sgd_.default:
            return None  # the one operator of a step that the meta device does not know
        kwargs = kwargs or {}
        on_gpu = _is_gpu(kwargs.get("device") or CUDA)
        if on_gpu:
            kwargs = {k: _META if k == "device" else value for k, value in kwargs.items()}
        with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
            torch._C._set_meta_in_tls_dispatch_include(True)
            cls._on_meta = True
            try:
                result = func(*args, **kwargs)
            finally:
                cls._on_meta = False
        if not on_gpu:
            return result
        return (
            _pretended(result)
            if isinstance(result, Tensor)
            else tree_map_only(Tensor, _pretended, result)
        )


def _is_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def _pretended(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, PretendedTensor) else PretendedTensor(tensor)


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What makes tensors on the GPU makes pretended ones."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # no GPU is looked for

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would take as long as the rest

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is DEVICE:
            return args[0].device
        if kwargs and (device := kwargs.get("device")) and _is_gpu(device):
            return PretendedTensor.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs or {})


class _Indexing(TorchFunctionMode):
    """Indexing and copies, for which builds for CPUs do not take tensors of a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and isinstance(args[0], PretendedTensor):
            view, chosen = self._at(*args)
            return torch.ops.aten.index.Tensor(view, chosen) if chosen else view
        if func is torch.Tensor.__setitem__ and isinstance(args[0], PretendedTensor):
            (view, chosen), value = self._at(*args[:2]), args[2]
            if chosen:
                return torch.ops.aten.index_put_.default(view, chosen, value)
            copy = torch.ops.aten.copy_.default
            return copy(view, value) if isinstance(value, Tensor) else view.fill_(value)
        if func is torch.Tensor.copy_ and isinstance(args[0], PretendedTensor):
            return torch.ops.aten.copy_.default(*args[:2])
        if func is torch.Tensor.to and len(args) > 1 and args[1] == CUDA:
            tensor = args[0]
            if isinstance(tensor, PretendedTensor):
                return tensor
            moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
            return torch.ops.aten.copy_.default(moved, tensor)
        return func(*args, **kwargs)

    def _at(self, tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
        """A view, and by dimension which of its entries are chosen by tensors, if any are."""
        dim, chosen = 0, list[Tensor | None]()
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
                chosen += [None] * (dim - len(chosen)) + [one]
                dim += 1
        return tensor, chosen
