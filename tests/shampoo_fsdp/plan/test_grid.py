"""Blocks tile a parameter exactly, evenly, and by its shape alone."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.assignment import refresh_phase
from shampoo_fsdp.plan.grid import even_cuts, head_rows, make_grid

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def assert_tiled(grid) -> None:
    covered = torch.zeros(grid.view_shape, dtype=torch.int64)
    for coordinate in grid.coordinates():
        covered[tuple(slice(*interval) for interval in grid.rectangle(coordinate))] += 1
    assert covered.eq(1).all()


@given(shape=shapes, cap=st.integers(2, 11), merge_dims=st.sampled_from(["matrix", "small"]))
def test_blocks_tile_the_view_exactly(shape, cap, merge_dims):
    grid = make_grid(shape, ShampooConfig(max_preconditioner_dim=cap, merge_dims=merge_dims))
    assert_tiled(grid)
    assert max(map(max, grid.block_shapes)) <= cap
    assert math.prod(grid.view_shape) == math.prod(shape)


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


@given(
    heads=st.integers(1, 5),
    columns=st.integers(1, 12),
    batch=st.sampled_from([(), (3,)]),
    border=st.integers(0, 20),
    settings=st.fixed_dictionaries(
        {
            "head_dim": st.integers(1, 7),
            "max_preconditioner_dim": st.integers(1, 16),
            "merge_dims": st.sampled_from(["matrix", "small"]),
            "large_dim": st.sampled_from(["block", "one_sided", "diagonal"]),
        }
    ),
)
def test_no_block_has_rows_of_two_heads(heads, columns, batch, border, settings):
    head_dim, cap = settings["head_dim"], settings["max_preconditioner_dim"]
    shape = (*batch, heads * head_dim, columns)
    config = ShampooConfig(split_heads=["wqkv"], **settings)
    borders = [(0, size) for size in shape]
    borders[-2] = (0, min(border, shape[-2]), shape[-2])
    head = head_rows("layers.0.wqkv.weight", shape, config)
    for further in ((), borders):
        grid = make_grid(shape, config, further, head)
        assert grid.view_shape == shape and grid.batch_dims == len(batch)
        assert_tiled(grid)
        for start, stop in itertools.pairwise(grid.cuts[-2]):
            assert start // head_dim == (stop - 1) // head_dim
        assert config.large_dim != "block" or max(map(max, grid.block_shapes)) <= cap
        if not further and cap >= head_dim:  # none is cut for nothing
            assert grid.cuts[-2] == tuple(range(0, shape[-2] + 1, head_dim))


def test_names_decide_where_heads_are():
    config = ShampooConfig(split_heads=[r"\.w[qk]\.", "q_proj"], head_dim=4)
    assert head_rows("layers.0.attention.wq.weight", (8, 6), config) == 4
    assert head_rows("model.q_proj.weight", (8, 6), config) == 4
    assert head_rows("layers.0.attention.wo.weight", (7, 6), config) is None
    assert head_rows("layers.0.attention.wq.weight", (7, 6), ShampooConfig(head_dim=4)) is None
    with pytest.raises(ValueError, match=r"'a\.wq'.* 'head_dim' is None; allowed: an integer >= 1"):
        head_rows("a.wq", (8, 6), ShampooConfig(split_heads=["wq"]))


@pytest.mark.parametrize("shape", [(10, 6), (8, 10, 6), (10,), (2, 6, 4, 8)])
def test_rows_that_are_no_whole_heads_are_refused_by_name(shape):
    config = ShampooConfig(split_heads=["wqkv"], head_dim=4)
    rows = 2 if len(shape) == 4 else 10
    message = rf"'a\.wqkv' .*'split_heads'.* {rows} rows; allowed: a multiple of 'head_dim' = 4"
    with pytest.raises(ValueError, match=message):
        head_rows("a.wqkv", shape, config)


def test_phases_spread_like_parameters_evenly_over_a_period():
    for kind in ("attention.wq", "attention.wo", "feed_forward.w1"):
        blocks = itertools.product([f"layers.{i}.{kind}.weight" for i in range(6)], range(5))
        phases = Counter(refresh_phase(name, index, 5, 10) for name, index in blocks)
        assert set(phases.values()) == {3} and len(phases) == 10
