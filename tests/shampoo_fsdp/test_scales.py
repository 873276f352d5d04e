"""Gradients whose scale changes all at once: experts that see their first token late, and training
that goes on after a time of tiny gradients."""

import pytest
import torch
from torch import nn

from shampoo_fsdp import Shampoo

LR = 0.01


@pytest.mark.parametrize("idle", [25, 29])  # then with a refresh on the first step, and without one
@pytest.mark.parametrize("root_method", ["qr", "eigh"])
def test_the_first_update_of_a_late_expert_is_as_large_as_that_of_adam(root_method, idle):
    generator = torch.Generator().manual_seed(0)
    experts = nn.Parameter(torch.zeros(2, 32, 48))
    settings = {"lr_factor": 1, "preconditioner": "soap", "root_method": root_method}
    optimizer = Shampoo([("experts", experts)], lr=LR, weight_decay=0.0, **settings)
    for step in range(idle + 1):
        experts.grad = torch.randn(2, 32, 48, generator=generator)
        if step < idle:
            experts.grad[1] = 0.0
        else:  # one entry far above the others
            experts.grad[1, 3, 4] *= 1e6
        optimizer.step()
        assert experts.isfinite().all()
    assert 0.1 * LR < experts[1].detach().abs().max() < 1.1 * LR


def test_kl_shampoo_goes_on_after_a_time_of_tiny_gradients():
    """A regression that takes preconditioning. Without the pause the loss is 0.022 in the end."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 12, generator=generator) * torch.logspace(0.5, -1.0, 12)
    targets = inputs @ torch.randn(12, 8, generator=generator)
    targets += 0.1 * torch.randn(256, 8, generator=generator)
    weights = nn.Parameter(torch.zeros(12, 8))
    optimizer = Shampoo(
        [("weights", weights)], lr=4e-3, lr_factor=1, weight_decay=0.0, preconditioner="kl_shampoo"
    )
    for step in range(1200):
        start = weights.detach().clone()
        paused = 100 <= step < 700
        rows = torch.randint(256, (16,), generator=generator)
        loss = (inputs[rows] @ weights - targets[rows]).square().mean()
        (gradient,) = torch.autograd.grad(loss, weights)
        weights.grad = gradient * (1e-20 if paused else 1.0)
        optimizer.step()
        if paused:
            weights.data.copy_(start)
    assert (inputs @ weights - targets).square().mean() < 0.06  # it was 0.168
