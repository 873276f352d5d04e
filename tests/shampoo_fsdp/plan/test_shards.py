"""Rectangles of shards against torch's own arithmetic, and what is refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from shampoo_fsdp.plan import shards
from shampoo_fsdp.plan.shards import placement_of, view_rectangle

LAYOUTS = {
    "fsdp": ((4,), (Shard(0),)),
    "hsdp": ((2, 4), (Replicate(), Shard(0))),
    "column-wise": ((4, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "row-wise": ((4, 2), (Shard(0), Shard(1))),
    "norm": ((4, 2), (Shard(0), Replicate())),
    "hsdp, column-wise": ((2, 2, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
    "two shards of one dimension": ((2, 3), (Shard(0), Shard(0))),
    "experts": ((2, 4), (Shard(1), Shard(0))),
}


def shard_rectangle(shape, mesh_shape, placements, coordinate):
    ours = tuple(map(placement_of, placements))
    return shards.shard_rectangle(shape, mesh_shape, ours, coordinate)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(shape=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_rectangles_are_those_of_torch(layout, shape):
    mesh_shape, placements = LAYOUTS[layout]
    if "column-wise" in layout:
        # On uneven ones torch's arithmetic differs from what FSDP2 really holds.
        shape = (shape[0] * 8, shape[1])
    for coordinate in itertools.product(*map(range, mesh_shape)):
        rectangle = shard_rectangle(shape, mesh_shape, placements, coordinate)
        local, offset = _compute_local_shape_and_global_offset(
            shape, mesh_shape, list(coordinate), placements
        )
        assert tuple(stop - start for start, stop in rectangle) == tuple(local)
        if all(local):  # torch leaves the offset of an empty shard open
            assert tuple(start for start, _ in rectangle) == tuple(offset)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_cover_the_tensor_once_per_replica(layout):
    mesh_shape, placements = LAYOUTS[layout]
    held = [
        shard_rectangle((13, 7), mesh_shape, placements, coordinate)
        for coordinate in itertools.product(*map(range, mesh_shape))
    ]
    of_mesh = zip(mesh_shape, placements, strict=True)
    replicas = math.prod(size for size, placed in of_mesh if isinstance(placed, Replicate))
    count = torch.zeros(13, 7)
    for rectangle in held:
        count[tuple(slice(*interval) for interval in rectangle)] += 1
    assert count.eq(replicas).all()


def test_a_view_may_not_split_merged_dimensions():
    dims = ((0,), (1, 2, 3))
    whole = ((2, 4), (0, 3), (0, 5), (0, 5))
    assert view_rectangle(whole, (8, 3, 5, 5), dims) == ((2, 4), (0, 75))
    row = ((0, 8), (1, 2), (0, 5), (0, 5))
    assert view_rectangle(row, (8, 3, 5, 5), dims) == ((0, 8), (25, 50))
    with pytest.raises(ValueError, match="dimension 1"):
        view_rectangle(((0, 8), (0, 3), (0, 2), (0, 5)), (8, 3, 5, 5), dims)
