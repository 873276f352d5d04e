"""Nothing in the step makes the host wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp import Shampoo
from tests.models import TinyLlama, deterministic_gradients, set_gradients

# Operators that hand a value of a tensor, or a shape that depends on values, to Python.
READS_BACK = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.unique_dim.default,
}


class NoReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS_BACK:
            raise AssertionError(f"{func} reads a value back to the host")
        return func(*args, **(kwargs or {}))


def test_no_step_reads_a_value_back():
    model = TinyLlama(dim=12, hidden=20, vocab=16, n_layers=2)
    optimizer = Shampoo(
        model.named_parameters(), max_preconditioner_dim=8, precondition_frequency=3
    )
    for step in range(8):  # before, at and after the start; refreshes due and not
        gradients = dict(deterministic_gradients(model, step))
        if step == 5:
            gradients["layers.0.attention.wq.weight"] = None
        set_gradients(model, gradients)
        with NoReadBack():
            optimizer.step()


def test_the_check_notices_a_read_back():
    try:
        with NoReadBack():
            float(torch.ones(1))
    except AssertionError:
        return
    raise RuntimeError("reading a value back went unnoticed")
