"""The operators of a step: none reads a value back. (How many a GPU launches: test_dry_run.py.)

(`torch.linalg.eigh` reads its error codes back on CUDA; that is inside the operator.)
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp import Shampoo
from shampoo_fsdp.rules.matrices import to_device
from tests.models import SMALL, TinyLlama, deterministic_gradients, set_gradients, with_shampoo

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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"root_method": "coupled_newton", "buckets": 3, "momentum": 0.9},
        {"root_method": "polynomial", "grafting": "rmsprop", "weight_decay_type": "l2"},
        {"root_method": "qr", "symmetric_packing": True, "root_dtype": "bfloat16"},
        {"preconditioner": "shampoo", "root_method": "eigh_pseudo_inverse", "grafting": "sgd"},
        {"preconditioner": "shampoo", "large_dim": "diagonal"},
        {"preconditioner": "soap"},
        {"preconditioner": "kl_shampoo", "large_dim": "one_sided"},
    ],
)
def test_no_step_reads_a_value_back(settings):
    few = {"max_preconditioner_dim": 8, "precondition_frequency": 3}
    (model, _), optimizer = with_shampoo("single", SMALL, **few, **settings)
    for step in range(8):  # before, at and after the start; refreshes due and not
        gradients = dict(deterministic_gradients(model, step))
        if step == 5:
            gradients["layers.0.attention.wq.weight"] = None
        set_gradients(model, gradients)
        with NoReadBack():
            optimizer.step()
    with pytest.raises(AssertionError, match="reads"), NoReadBack():
        bool(model.output.weight[0, 0] > 0.0)


@pytest.mark.parametrize("grafting", ["adam", "rmsprop"])
def test_a_transposed_parameter_that_is_not_preconditioned_reads_nothing_back(grafting):
    weight = torch.nn.Parameter(torch.randn(6, 4).t())
    optimizer = Shampoo([("w", weight)], exclude=["w"], grafting=grafting)
    for _ in range(2):
        weight.grad = torch.randn(4, 6)
        with NoReadBack():
            optimizer.step()


def test_what_goes_to_an_accelerator_is_pinned_first(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    values = torch.tensor([3, 1])
    assert to_device(values, torch.device("meta")).is_meta
    assert len(pinned) == 1 and pinned[0] is values
    assert to_device(values, torch.device("cpu")) is values
    assert len(pinned) == 1


def test_a_default_device_of_the_program_is_no_business_of_ours():
    model = TinyLlama(**SMALL)
    with torch.device("meta"):
        optimizer = Shampoo(model.named_parameters(), max_preconditioner_dim=8)
    for step in range(3):
        set_gradients(model, deterministic_gradients(model, step))
        with torch.device("meta"):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
