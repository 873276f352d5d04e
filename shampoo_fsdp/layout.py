"""Which rectangle of a parameter each rank of its mesh holds, from DTensor placements alone."""

import math
from collections.abc import Sequence

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shampoo_fsdp.blocks import Rectangle

__all__ = ["UnsupportedPlacement", "shard_rectangle", "view_rectangle"]


class UnsupportedPlacement(ValueError):
    """A placement for which a rank does not hold one rectangle of the parameter."""


def shard_rectangle(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
) -> Rectangle:
    """The rectangle of a tensor that the rank at a mesh coordinate holds; it may be empty.

    As `torch.chunk` does, each sharding cuts pieces of ceil(size / ranks), so that the last ranks
    may hold less or nothing.

    Raises:
        UnsupportedPlacement: for anything but Replicate, Shard and FSDP's _StridedShard.
    """
    rectangle = [(0, size) for size in shape]
    for dim in range(len(shape)):
        for mesh_dim in _sharding_order(dim, mesh_shape, placements):
            start, stop = rectangle[dim]
            piece = -(-(stop - start) // mesh_shape[mesh_dim])
            first = min(start + coordinate[mesh_dim] * piece, stop)
            rectangle[dim] = (first, min(first + piece, stop))
    return tuple(rectangle)


def _sharding_order(
    dim: int, mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> list[int]:
    """The mesh dimensions that shard a tensor dimension, in the order in which they cut it.

    Shard cuts in the order of the mesh dimensions. _StridedShard(split_factor=s) says that later
    mesh dimensions have cut the dimension into s pieces before: FSDP over tensor parallelism.
    """
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if isinstance(placement, Replicate):
            continue
        position: int | None = None
        if isinstance(placement, _StridedShard):
            if placement.dim != dim:
                continue
            position = _position_after(int(placement.split_factor), order, mesh_shape)
        elif isinstance(placement, Shard):
            if placement.dim != dim:
                continue
            position = 0
        if position is None:
            raise UnsupportedPlacement(
                f"placement {placement} in {tuple(placements)}; supported: Replicate, Shard, and "
                "_StridedShard whose split_factor is the size of the mesh dimensions after it"
            )
        order.insert(position, mesh_dim)
    return order


def _position_after(split: int, order: Sequence[int], mesh_shape: Sequence[int]) -> int | None:
    for position in range(len(order) + 1):
        if math.prod(mesh_shape[d] for d in order[:position]) == split:
            return position
    return None


def view_rectangle(
    rectangle: Rectangle, shape: Sequence[int], dims: Sequence[Sequence[int]]
) -> Rectangle:
    """A rectangle of a tensor seen through a view that merges neighbouring dimensions.

    Args:
        rectangle: intervals along the dimensions of the tensor.
        shape: the tensor's shape.
        dims: for each dimension of the view the tensor dimensions that it merges.

    Raises:
        UnsupportedPlacement: if the rectangle is not one in the view, because a dimension is
            sharded that follows another one in its group.
    """
    result = []
    for group in dims:
        inner = math.prod(shape[d] for d in group[1:])
        if any(rectangle[d] != (0, shape[d]) for d in group[1:]):
            raise UnsupportedPlacement(
                f"dimension {group[0]} of {tuple(shape)} is merged with those after it, one of "
                "which is sharded; shard the first dimension or exclude the parameter"
            )
        start, stop = rectangle[group[0]]
        result.append((start * inner, stop * inner))
    return tuple(result)
