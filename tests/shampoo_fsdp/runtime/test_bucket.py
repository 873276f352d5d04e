"""How many gradients travel together; how updates are applied."""

from unittest.mock import Mock

import pytest
import torch

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.runtime.bucket import descend, fill_buckets


@pytest.mark.parametrize(
    ("ranks", "settings", "expected"),
    [((0,), {}, 2), ((0, 1), {}, 4), ((0,), {"buckets": 8}, 8), ((0, 1), {"buckets": 1}, 1)],
)
def test_a_rank_alone_has_larger_buckets(ranks, settings, expected):
    """As nothing travels beside its work, and each stack of each bucket has kernels of its own."""
    members = [Mock(**{"spec.shape": (2**13, 2**13)}) for _ in range(8)]  # 2^29 elements
    parts = {member: Mock(row_width=64) for member in members}
    filled = fill_buckets(parts, Mock(ranks=ranks), ShampooConfig(**settings))
    assert len(filled) == expected
    assert [member for bucket in filled for member in bucket] == members


@pytest.mark.parametrize("one_pass_on", ["cpu", "cuda"])
@pytest.mark.parametrize(("lr", "lost"), [(0.01, 0.001), (0.01, 0.0), (0.0, 0.001)])
@pytest.mark.parametrize("other", [torch.zeros(0), torch.ones(3, 2).t(), torch.ones(3).bfloat16()])
def test_weights_decay_and_are_updated(one_pass_on, lr, lost, other):
    """In one pass or in two, of any type, and of any strides."""
    weights = [torch.linspace(-1, 1, 35).view(5, 7), other.clone()]
    updates = [torch.full(w.shape, 0.3) for w in weights]
    expected = [(1 - lost) * w.double() - lr * 0.3 for w in weights]
    descend(weights[:1], updates[:1], lr, lost, one_pass_on)
    descend(weights[1:], updates[1:], lr, lost, one_pass_on)
    for w, e in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=0, atol=1e-2 if w.itemsize == 2 else 1e-7)
