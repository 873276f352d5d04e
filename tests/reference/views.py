"""How a parameter is seen and cut: views, tiles, and which dimensions have a factor.

Sources:
    Anil et al. 2020, "Scalable Second Order Optimization for Deep Learning", arXiv 2002.09018
        (blocks).
    Shi et al. 2023, "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo
        Optimizer", arXiv 2309.06497, Section 3 (merging of small dimensions, blocks, large
        dimensions whose factor is the identity or a diagonal).
"""

import itertools
import math
from dataclasses import dataclass

__all__ = ["BlockView", "block_slices", "blocks_of", "merge_small", "tile_sizes", "view_shape"]


def tile_sizes(size: int, cap: int) -> list[int]:
    """Cut a dimension in ceil(size / cap) tiles; the first ones are one longer, if it does not come
    out even. If size and cap are multiples of 8, so are tiles of 64 and more."""
    count = math.ceil(size / cap)
    if size % 8 == 0 and cap % 8 == 0 and size // count >= 64:
        return [
            8 * (size // 8 // count + (1 if i < size // 8 % count else 0)) for i in range(count)
        ]
    return [size // count + (1 if i < size % count else 0) for i in range(count)]


def block_slices(
    shape: tuple[int, ...], caps: int | tuple[int, ...]
) -> dict[tuple[int, ...], tuple[slice, ...]]:
    """Map the coordinates of each block of the grid to the rectangle that it covers.

    caps: the largest tile, of all dimensions or of each.
    """
    if isinstance(caps, int):
        caps = (caps,) * len(shape)
    slices_per_dimension = []
    for size, cap in zip(shape, caps, strict=True):
        slices = []
        start = 0
        for length in tile_sizes(size, cap):
            slices.append(slice(start, start + length))
            start += length
        slices_per_dimension.append(slices)
    grid = itertools.product(*(range(len(slices)) for slices in slices_per_dimension))
    return {
        coordinates: tuple(slices_per_dimension[d][i] for d, i in enumerate(coordinates))
        for coordinates in grid
    }


def merge_small(shape: tuple[int, ...], cap: int) -> tuple[int, ...]:
    """Merge neighbouring dimensions, from the left, while their product is at most the cap.

    Sizes of 1 vanish; a tensor of one element stays a vector of one.
    """
    merged: list[int] = []
    for size in shape:
        if size == 1:
            continue
        if merged and merged[-1] * size <= cap:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(merged) or (1,)


def view_shape(
    shape: tuple[int, ...], *, batched_3d: bool, merge_dims: str, cap: int
) -> tuple[tuple[int, ...], int]:
    """The shape that is cut, and how many of its leading dimensions number separate tensors."""
    if len(shape) == 0:
        raise ValueError("a parameter without dimensions must be excluded")
    if len(shape) == 3 and batched_3d:
        return shape, 1
    if merge_dims == "small":
        return merge_small(shape, cap), 0
    if merge_dims == "matrix" and len(shape) >= 4:
        return (shape[0], math.prod(shape[1:])), 0
    return shape, 0


@dataclass(frozen=True)
class BlockView:
    """One block of a parameter."""

    coordinates: tuple[int, ...]
    """In the grid of blocks, after the number of the matrix for a batch of them."""
    index: tuple[int | slice, ...]
    """Where the block lies in the view."""
    kinds: tuple[str, ...]
    """For each dimension of the block the kind of its factor: "full", "diagonal" or "none"."""


def blocks_of(
    view: tuple[int, ...],
    batches: int,
    *,
    cap: int,
    large_dim: str,
    max_factor_ratio: float,
    precondition_1d: bool,
) -> list[BlockView]:
    """Cut a view in blocks; how dimensions above the cap are treated is `large_dim`'s choice.

    A matrix of more than max_factor_ratio times the block's elements is no factor, but for the
    shortest side's, and for those of vectors, if these are preconditioned.
    """
    sizes = view[batches:]
    uncut_kind = {"block": "full", "one_sided": "none", "diagonal": "diagonal"}[large_dim]
    if large_dim == "one_sided" and min(sizes) > cap:
        uncut_kind = "full"  # nothing would be preconditioned, so that all is cut
    if uncut_kind == "full":
        caps, kinds = (cap,) * len(sizes), ("full",) * len(sizes)
    else:
        caps = tuple(max(size, cap) for size in sizes)
        kinds = tuple(uncut_kind if size > cap else "full" for size in sizes)
    return [
        BlockView(
            (*batch, *coordinates),
            (*batch, *slices),
            _in_proportion(
                tuple(s.stop - s.start for s in slices), kinds, max_factor_ratio, precondition_1d
            ),
        )
        for batch in itertools.product(*map(range, view[:batches]))
        for coordinates, slices in block_slices(sizes, caps).items()
    ]


def _in_proportion(
    sizes: tuple[int, ...], kinds: tuple[str, ...], ratio: float, precondition_1d: bool
) -> tuple[str, ...]:
    if precondition_1d and sum(size > 1 for size in sizes) < 2:
        return kinds
    elements, shortest = math.prod(sizes), min(sizes)
    return tuple(
        "none" if kind == "full" and size > shortest and size**2 > ratio * elements else kind
        for size, kind in zip(sizes, kinds, strict=True)
    )
