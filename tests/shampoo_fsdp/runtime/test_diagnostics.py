"""The figures that go to the metrics are those of the step."""

import math

import pytest
import torch
from torch import nn

from shampoo_fsdp import Shampoo
from shampoo_fsdp.runtime.diagnostics import Diagnostics, merged
from tests.shampoo_fsdp.rules.matrices import trained

SETTINGS = {"name": "layers.3.attention.wq.weight", "weight_decay": 0.0}
AT_ONCE = {"refresh_schedule": "together", "refresh_warmup_steps": 0}


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
def test_the_size_of_the_update_and_the_factors(preconditioner):
    settings = {"preconditioner": preconditioner, "max_preconditioner_dim": 16, **SETTINGS}
    before, _ = trained(range(8), **settings)
    after, optimizer = trained(range(9), **settings)
    update = (before - after) / 1e-2  # over lr
    figures = merged([optimizer.diagnostics()])
    size = update.square().mean().sqrt().item()
    assert figures["update_rms/attention.wq"] == pytest.approx(size, rel=1e-4)
    assert figures["condition_number"] > 1.0
    assert 0.0 < figures["root_residual"] < 1.0
    stacks = [stack for bucket in optimizer._parameters.buckets for stack in bucket.stacks]
    kept = sum(tensor.nbytes for stack in stacks for tensor in stack.saved.values())
    assert figures["state_mib"] == pytest.approx(kept / 2**20)
    parts = {"exchange", "excluded", "factors", "roots", "direction", "apply"}
    assert {name[3:] for name in figures if name.startswith("ms/")} == parts
    assert figures["direction_over_graft"] > 0.0


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
def test_the_residual_is_at_most_one_where_gradients_turn(preconditioner):
    """In directions that the factors lack an old root is thousands of times too large."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 16, generator=generator))
    settings = {"preconditioner": preconditioner, "precondition_frequency": 4, **AT_ONCE}
    optimizer = Shampoo([("wq.weight", weight)], **settings)
    residuals = []
    for step in range(12):
        low, high = (0, 8) if step < 9 else (8, 16)
        weight.grad = torch.zeros(16, 16)
        weight.grad[low:high, low:high] = torch.randn(8, 8, generator=generator)
        optimizer.step()
        residuals.append(merged([optimizer.diagnostics()])["root_residual"])
    assert 0.3 < max(residuals) <= 1.0


def test_the_residual_is_how_far_the_last_refresh_moved_the_root():
    roots = {}
    for steps in (8, 9, 10, 11):
        _, optimizer = trained(range(steps), **AT_ONCE, **SETTINGS)
        (bucket,) = optimizer._parameters.buckets
        roots[steps] = [s.rule.roots[i].read() for s in bucket.stacks for i in (0, 1)]
    changes = [
        (new - old).norm(dim=(1, 2)) / new.norm(dim=(1, 2))
        for old, new in zip(roots[9], roots[10], strict=True)
    ]
    moved = max(change.max().item() for change in changes)
    assert moved > 0.01 and torch.equal(roots[10][0], roots[11][0])
    assert merged([optimizer.diagnostics()])["root_residual"] == pytest.approx(moved, rel=1e-4)


def test_ranks_are_put_together():
    ratio = "direction_over_graft"
    one = Diagnostics({"ms/roots": 1.0}, {"update_rms/wq": [4.0, 1.0], ratio: [math.log(2.0), 1.0]})
    two = Diagnostics({"ms/roots": 3.0}, {"update_rms/wq": [0.0, 1.0], ratio: [math.log(8.0), 1.0]})
    assert merged([one, two]) == pytest.approx(
        {"ms/roots": 3.0, ratio: 4.0, "update_rms/wq": math.sqrt(2.0)}
    )
