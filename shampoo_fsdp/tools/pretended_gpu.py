"""A GPU that is not there: tensors on it have a shape and no values or memory."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp.kernels.language import observed_by
from shampoo_fsdp.rules.precision import full_precision

CUDA = torch.device("cuda")


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """A context in which tensors can be made on CUDA; reading a value of one on the host is an
    error. Those of the host are what they always are."""
    # Builds for CPUs have no memory that is pinned, and no events.
    pinned = mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor)
    events = mock.patch("torch.cuda.Event")
    pretended = FakeTensorMode(allow_non_fake_inputs=True), _OnHost(), _Indexing()  # type: ignore[no-untyped-call]
    hidden = mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="")  # what there is
    with ExitStack() as stack:
        stack.enter_context(hidden)
        for context in (*pretended, pinned, events, full_precision("cuda"), torch.no_grad()):
            stack.enter_context(context)
        stack.enter_context(observed_by(lambda moved, flops: None))  # kernels of our own do nothing
        yield


class _OnHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators on tensors of the host alone are carried out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would take as long as the rest

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._fused_sgd_.default:
            return None  # the one operator of a step that fake tensors do not know
        device = kwargs.get("device")
        if FakeTensor in types or (device is not None and torch.device(device).type == "cuda"):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


class _Indexing(TorchFunctionMode):
    """Indexing and copies, for which builds for CPUs do not take tensors of a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            view, chosen = self._at(*args)
            return torch.ops.aten.index.Tensor(view, chosen) if chosen else view
        if func is torch.Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            (view, chosen), value = self._at(*args[:2]), args[2]
            if chosen:
                return torch.ops.aten.index_put_.default(view, chosen, value)
            copy = torch.ops.aten.copy_.default
            return copy(view, value) if isinstance(value, Tensor) else view.fill_(value)
        if func is torch.Tensor.copy_ and isinstance(args[0], FakeTensor):
            return torch.ops.aten.copy_.default(*args[:2])
        if func is torch.Tensor.to and len(args) > 1 and args[1] == CUDA:
            tensor = args[0]
            if isinstance(tensor, FakeTensor):
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
