"""`memory = "low"`: AdamW's 8 bytes of state per parameter, and a direction that is not far off."""

import pytest
import torch
from torch import Tensor, nn

from shampoo_fsdp import Shampoo


def _updates(rule: str, method: str, steps: int = 40, **settings) -> tuple[Tensor, Shampoo]:
    """The last update of a matrix whose gradients lack most directions; those of its rows have very
    different sizes, as with inputs that are seldom there."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 64))
    settings |= {"lr": 0.01, "lr_factor": 1, "preconditioner": rule, "root_method": method}
    settings |= {"precondition_frequency": 5, "matmul_precision": "medium"}
    optimizer = Shampoo([("w", weight)], **settings)
    basis = torch.linalg.qr(torch.randn(64, 64))[0] * torch.arange(1, 65) ** -0.5
    sizes = torch.logspace(0, -3, 64).unsqueeze(1)
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = sizes * (basis @ torch.randn(64, 64) @ basis.T)
        optimizer.step()
    return weight.detach() - before, optimizer


@pytest.mark.parametrize("rule", ["kl_shampoo", "shampoo"])
@pytest.mark.parametrize("method", ["polynomial", "eigh"])
def test_eight_bytes_per_parameter_and_nearly_the_same_direction(rule, method):
    usual, _ = _updates(rule, method)
    low, optimizer = _updates(rule, method, memory="low")
    (state,) = optimizer.state.values()
    kept = {name: value.dtype for name, value in state.items() if value.numel() > 1}
    assert set(kept.values()) == {torch.bfloat16}
    assert optimizer.summary()["state_mib_max"] * 2**20 <= 8.1 * 64 * 64
    assert optimizer.counters()[1] == 0  # no root has failed
    assert torch.cosine_similarity(usual.flatten(), low.flatten(), dim=0) > 0.92
