"""Blocks tile a parameter exactly, evenly, and by its shape alone."""

import itertools
from collections import Counter

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.assignment import refresh_phase
from shampoo_fsdp.plan.grid import even_cuts, make_grid

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(shape=shapes, cap=st.integers(2, 11), merge_dims=st.sampled_from(["matrix", "small"]))
def test_blocks_tile_the_view_exactly(shape, cap, merge_dims):
    grid = make_grid(shape, ShampooConfig(max_preconditioner_dim=cap, merge_dims=merge_dims))
    covered = torch.zeros(grid.view_shape, dtype=torch.int64)
    for coordinate in grid.coordinates():
        covered[tuple(slice(*interval) for interval in grid.rectangle(coordinate))] += 1
        assert max(grid.block_shape(coordinate)) <= cap
    assert covered.eq(1).all()
    assert covered.numel() == torch.Size(shape).numel()


@given(size=st.integers(1, 1250), cap=st.integers(1, 128), times=st.sampled_from([1, 8]))
@example(size=88, cap=32, times=8)
def test_tiles_are_the_fewest_and_nearly_equal(size, cap, times):
    size, cap = size * times, cap * times
    cuts = even_cuts(0, size, cap)
    sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
    assert len(sizes) == -(-size // cap)
    in_eights = size % 8 == cap % 8 == 0 and size // len(sizes) >= 64
    assert max(sizes) - min(sizes) <= (8 if in_eights else 1)
    assert not in_eights or all(tile % 8 == 0 for tile in sizes)
    assert sum(sizes) == size


def test_experts_are_separate_matrices_and_convolutions_one():
    config = ShampooConfig(max_preconditioner_dim=64)
    experts = make_grid((8, 100, 32), config)
    assert experts.tiles == (8, 2, 1)
    assert {experts.block_shape(c) for c in experts.coordinates()} == {(50, 32)}
    convolution = make_grid((10, 4, 3, 3), config)
    assert convolution.view_shape == (10, 36)
    assert len(convolution) == 1


def test_no_block_crosses_a_given_border():
    grid = make_grid((10, 6), ShampooConfig(max_preconditioner_dim=4), [(0, 7, 10), (0, 6)])
    assert grid.cuts == ((0, 4, 7, 10), (0, 3, 6))


def test_phases_spread_like_parameters_evenly_over_a_period():
    kinds = ["attention.wq", "attention.wo", "feed_forward.w1"]
    for kind in kinds:
        phases = Counter(
            refresh_phase(f"layers.{layer}.{kind}.weight", index, 5, 10)
            for layer in range(6)
            for index in range(5)
        )
        assert set(phases.values()) == {3} and len(phases) == 10


def test_a_phase_does_not_depend_on_other_parameters():
    alone = refresh_phase("layers.3.attention.wq.weight", 2, 5, 10)
    assert alone == refresh_phase("layers.3.attention.wq.weight", 2, 5, 10)
    assert 0 <= alone < 10
    assert refresh_phase("layers.4.attention.wq.weight", 2, 5, 10) == (alone + 5) % 10
