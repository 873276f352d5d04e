"""Rounding, other on each mesh, decides nothing: `python -m benchmarks.noise` measures it.

Tests of meshes turn bf16 off or give all meshes the same gradients.
"""

import pytest

from benchmarks.noise import maker, moved_apart, range_kept


@pytest.mark.parametrize(
    ("rule", "precision", "rows", "most"),
    [
        ("kl_shampoo", "highest", 8, 2e-3),
        ("shampoo", "highest", 8, 1e-3),
        ("kl_shampoo", "medium", 512, 0.01),
        ("kl_shampoo, polynomial, ridge", "medium", 8, 0.08),
    ],
)
def test_one_ulp_of_noise_moves_weights_by_little_of_their_way(rule, precision, rows, most):
    """In 20 steps."""
    assert moved_apart(maker(rule, precision), rows) < most


@pytest.mark.parametrize(
    ("rule", "precision", "least"),
    [
        ("kl_shampoo", "highest", 0.999),
        ("shampoo", "highest", 0.999),
        ("kl_shampoo, polynomial, ridge", "medium", 0.98),
    ],
)
def test_updates_stay_in_the_range_of_the_gradients(rule, precision, least):
    assert range_kept(maker(rule, precision)) > least
