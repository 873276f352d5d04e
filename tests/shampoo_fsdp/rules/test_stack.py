"""A stack of blocks: what it does in parts it does as a whole."""

import pytest
import torch

from shampoo_fsdp import Shampoo
from shampoo_fsdp.rules import stack
from tests.shampoo_fsdp.rules.matrices import trained


@pytest.mark.parametrize("preconditioner", ["shampoo", "kl_shampoo", "soap"])
def test_roots_are_the_same_in_however_many_parts_they_are_taken(preconditioner, monkeypatch):
    settings = {"preconditioner": preconditioner, "max_preconditioner_dim": 8}  # 6 blocks
    whole, optimizer = trained(range(8), **settings)
    counted = optimizer.counters().tolist()
    calls = []
    monkeypatch.setattr(stack, "_AT_ONCE", 2 * 2 * 8**2)
    original = stack.BlockStack._refresh
    monkeypatch.setattr(
        stack.BlockStack,
        "_refresh",
        lambda self, chosen, *rest: calls.append(chosen) or original(self, chosen, *rest),
    )
    in_parts, optimizer = trained(range(8), **settings)
    assert max(map(len, calls)) == 2
    assert optimizer.counters().tolist() == counted
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_block_does_not_depend_on_neighbours_that_have_had_no_gradient(precision):
    """Which blocks are in one stack depends on the mesh."""

    def of_two(names: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.nn.Parameter(torch.zeros(12, 8)) for name in names}
        optimizer = Shampoo(weights.items(), lr=1e-2, matmul_precision=precision)
        for _ in range(6):
            weights["a"].grad = torch.randn(12, 8, generator=generator)
            optimizer.step()
        return weights["a"].detach()

    torch.testing.assert_close(of_two("ab"), of_two("a"), rtol=1e-6, atol=1e-8)
