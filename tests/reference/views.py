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

from tests.reference.rule import Settings


def tiles(size: int, cap: int) -> list[slice]:
    """Cut a dimension in ceil(size / cap) tiles; the first ones are one longer, if it does not come
    out even. (Sides of 64 and more, which are cut in eights, are not compared.)"""
    count = math.ceil(size / cap)
    ends = [i * (size // count) + min(i, size % count) for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


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


def view_shape(shape: tuple[int, ...], merge_dims: str, cap: int) -> tuple[tuple[int, ...], int]:
    """The shape that is cut, and how many of its leading dimensions number separate tensors."""
    if len(shape) == 3:
        return shape, 1
    if merge_dims == "small":
        return merge_small(shape, cap), 0
    return (shape[0], math.prod(shape[1:])) if len(shape) >= 4 else shape, 0


def blocks_of(
    view: tuple[int, ...], batches: int, settings: Settings
) -> list[tuple[tuple[int | slice, ...], tuple[str, ...]]]:
    """Cut a view in blocks: where each lies, and for each of its dimensions the kind of its factor,
    "full", "diagonal" or "none". How dimensions above the cap are treated is `large_dim`'s choice.
    """
    sizes, cap = view[batches:], settings.max_preconditioner_dim
    uncut = {"block": "full", "one_sided": "none", "diagonal": "diagonal"}[settings.large_dim]
    if uncut == "none" and min(sizes) > cap:
        uncut = "full"  # nothing would be preconditioned, so that all is cut
    kinds = tuple(uncut if size > cap else "full" for size in sizes)
    cuts = [tiles(size, cap if uncut == "full" else max(size, cap)) for size in sizes]
    return [
        ((*batch, *slices), _in_proportion(slices, kinds, settings))
        for batch in itertools.product(*map(range, view[:batches]))
        for slices in itertools.product(*cuts)
    ]


def _in_proportion(
    slices: tuple[slice, ...], kinds: tuple[str, ...], settings: Settings
) -> tuple[str, ...]:
    """A matrix of more than max_factor_ratio times the block's elements is no factor, but for the
    shortest side's, and for those of vectors, if these are preconditioned."""
    sizes = [s.stop - s.start for s in slices]
    if settings.precondition_1d and sum(size > 1 for size in sizes) < 2:
        return kinds
    most, shortest = settings.max_factor_ratio * math.prod(sizes), min(sizes)
    return tuple(
        "none" if kind == "full" and size > shortest and size**2 > most else kind
        for size, kind in zip(sizes, kinds, strict=True)
    )
