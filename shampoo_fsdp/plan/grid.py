"""The grid of blocks of one parameter: pure geometry on its logical shape.

A parameter is seen through a *view* of its shape in which small dimensions may be merged. Each
dimension of the view is cut into tiles of nearly equal size; a block is one tile per dimension.
The grid depends on the name, the shape and the settings alone (with block_alignment = "shard" on
the shards as well).
"""

import itertools
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shampoo_fsdp.config import ShampooConfig

__all__ = ["BlockGrid", "cut_view"]

_UNIT = 8

Rectangle = tuple[tuple[int, int], ...]
"""A half-open interval (start, stop) for each dimension."""


@dataclass(frozen=True)
class BlockGrid:
    """How a parameter is cut into blocks.

    The view's leading `batch_dims` dimensions index independent tensors (experts); their tiles
    have size one and they get no factor.
    """

    view_shape: tuple[int, ...]
    batch_dims: int
    cuts: tuple[tuple[int, ...], ...]
    """For each dimension of the view the borders 0 = c[0] < c[1] < ... < c[-1] = size."""

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles along each dimension of the view."""
        return tuple(len(borders) - 1 for borders in self.cuts)

    @property
    def fingerprint(self) -> int:
        """A number of 31 bits that differs between grids."""
        return zlib.crc32(repr((self.view_shape, self.batch_dims, self.cuts)).encode()) >> 1

    def __len__(self) -> int:
        return math.prod(self.tiles)

    def coordinates(self) -> Iterator[tuple[int, ...]]:
        """Coordinates of all blocks, in row-major order."""
        return itertools.product(*map(range, self.tiles))

    @property
    def block_shapes(self) -> set[tuple[int, ...]]:
        """The shapes of blocks, without batch dimensions."""
        sizes = [
            {stop - start for start, stop in itertools.pairwise(cuts)}
            for cuts in self.cuts[self.batch_dims :]
        ]
        return set(itertools.product(*sizes))

    def rectangle(self, coordinate: Sequence[int]) -> Rectangle:
        """Where the block at a coordinate lies in the view."""
        return tuple(
            (borders[i], borders[i + 1]) for borders, i in zip(self.cuts, coordinate, strict=True)
        )

    def block_shape(self, coordinate: Sequence[int]) -> tuple[int, ...]:
        """Shape of a block without its batch dimensions: one entry for each of its factors."""
        return tuple(stop - start for start, stop in self.rectangle(coordinate)[self.batch_dims :])


def head_rows(name: str, shape: Sequence[int], config: ShampooConfig) -> int | None:
    """Rows of a head if the parameter is cut between heads (see `split_heads`), else None.

    Raises:
        ValueError: names the parameter whose rows they do not divide, or if they are not known.
    """
    if not any(re.search(pattern, name) for pattern in config.split_heads):
        return None
    if config.head_dim is None:
        raise ValueError(
            f"setting 'split_heads' matches parameter '{name}', and 'head_dim' is None; allowed: "
            "an integer >= 1, the rows of a head."
        )
    _, batch_dims = view_dims(shape, config, config.head_dim)
    if shape[batch_dims] % config.head_dim:
        raise ValueError(
            f"parameter '{name}' of {tuple(shape)}, which setting 'split_heads' matches, has "
            f"{shape[batch_dims]:,} rows; allowed: a multiple of 'head_dim' = {config.head_dim}."
        )
    return config.head_dim


def lr_scale(shape: Sequence[int], config: ShampooConfig) -> float:
    """What lr of a preconditioned parameter is multiplied by (see `base_width`): that of vectors,
    also of matrices of one row or column, by 1; convolutions [out, in, ...] and experts
    [E, out, in] have the width of their matrices.

    An update of entries of one size grows, as a matrix, with the roots of its sides, and what it
    does to activations with the root of the columns; for widths of 64 to 512 (docs/tuning.md) the
    best lr then stays.
    """
    if config.base_width is None or sum(side > 1 for side in shape) < 2:
        return 1.0
    columns = shape[2] if len(shape) == 3 else math.prod(shape[1:])
    return math.sqrt(config.base_width / columns)


def view_dims(
    shape: Sequence[int], config: ShampooConfig, head: int | None = None
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Which dimensions of a parameter make each dimension of its view, and how many are batches.

    Experts [E, m, n] are E matrices; for the rest see `merge_dims`. Where there are heads, rows are
    merged with nothing.
    """
    order = len(shape)
    matrix = config.merge_dims == "matrix" or head is not None
    if order == 3:
        return ((0,), (1,), (2,)), 1
    if matrix and order > 3:
        return ((0,), tuple(range(1, order))), 0
    if matrix:
        return tuple((d,) for d in range(order)), 0
    # Shi et al. 2023 (arXiv 2309.06497), section 3.3.
    groups: list[list[int]] = []
    sizes: list[int] = []
    for d, size in enumerate(shape):
        if groups and (1 in (size, sizes[-1]) or sizes[-1] * size <= config.max_preconditioner_dim):
            groups[-1].append(d)
            sizes[-1] *= size
        else:
            groups.append([d])
            sizes.append(size)
    return tuple(map(tuple, groups)), 0


def make_grid(
    shape: Sequence[int],
    config: ShampooConfig,
    borders: Sequence[Sequence[int]] = (),
    head: int | None = None,
) -> BlockGrid:
    """The grid of a parameter of at least one dimension and one element.

    `borders` are further borders along each dimension of the view that no block may cross (those
    of the shards, with `block_alignment = "shard"`); `head` is what `head_rows` says.
    """
    dims, batch_dims = view_dims(shape, config, head)
    view_shape = tuple(math.prod(shape[d] for d in group) for group in dims)
    return cut_view(view_shape, batch_dims, config, borders, head)


def cut_view(
    view_shape: tuple[int, ...],
    batch_dims: int,
    config: ShampooConfig,
    borders: Sequence[Sequence[int]] = (),
    head: int | None = None,
) -> BlockGrid:
    """The grid of a view, of which the first dimensions count batches and the next one rows."""
    whole = config.large_dim == "diagonal" or (
        config.large_dim == "one_sided"
        and any(size <= config.max_preconditioner_dim for size in view_shape[batch_dims:])
    )
    cuts = []
    for d, size in enumerate(view_shape):
        cap = 1 if d < batch_dims else size if whole else config.max_preconditioner_dim
        between_heads = range(0, size, head) if head and d == batch_dims else ()
        fixed = sorted({0, size, *(borders[d] if borders else ()), *between_heads})
        pieces = [even_cuts(start, stop, cap) for start, stop in itertools.pairwise(fixed)]
        cuts.append((0, *itertools.chain.from_iterable(piece[1:] for piece in pieces)))
    return BlockGrid(view_shape, batch_dims, tuple(cuts))


def even_cuts(start: int, stop: int, cap: int) -> tuple[int, ...]:
    """Borders that cut [start, stop) into the fewest tiles <= cap; sizes differ by one unit
    at most, the larger ones first, so that few different block shapes arise.

    A unit is 8, which matrix products like, where length and cap are multiples of it and tiles are
    of 64 and more; else it is 1.
    """
    length = stop - start
    tiles = -(-length // cap)
    unit = _UNIT if length % _UNIT == cap % _UNIT == 0 and length // tiles >= _UNIT**2 else 1
    size, longer = divmod(length // unit, tiles)
    return tuple(start + unit * (i * size + min(i, longer)) for i in range(tiles + 1))
