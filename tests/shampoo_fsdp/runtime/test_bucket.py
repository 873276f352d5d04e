"""How many gradients travel together."""

from unittest.mock import Mock

import pytest

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.runtime.bucket import fill_buckets


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
