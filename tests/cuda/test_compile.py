"""`compile = true` on a GPU is other kernels, and the same update."""

import pytest
import torch

from tests.cuda.training import difference, trained

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(("precision", "most"), [("highest", 1e-3), ("medium", 0.02)])
@pytest.mark.parametrize("rule", ["shampoo", "kl_shampoo", "soap"])
def test_compiled_steps_are_the_eager_ones(device, rule, precision, most):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = {"preconditioner": rule, "matmul_precision": precision}
    eager = trained(device, **settings)
    compiled = trained(device, **settings, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert difference(compiled, eager) < most
