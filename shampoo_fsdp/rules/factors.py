"""Which sides of a block have a factor, and of what kind."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig

__all__ = [
    "FactorKind",
    "condition_number",
    "factor_kinds",
    "is_matrix",
    "proportionate_sides",
    "resolution_of",
    "sides_without_factor",
]

FactorKind = Literal["full", "diagonal", "none"]


def factor_kinds(shape: Sequence[int], config: ShampooConfig) -> tuple[FactorKind, ...]:
    """For each dimension of a block what factor it has; see `large_dim` and `max_factor_ratio`."""
    large: FactorKind = "diagonal" if config.large_dim == "diagonal" else "none"
    # Vectors have a factor only where precondition_1d asks for it.
    vector = config.precondition_1d and not is_matrix(shape)
    kept = set(shape) if vector else proportionate_sides(shape, config.max_factor_ratio)
    return tuple(
        large if n > config.max_preconditioner_dim else "full" if n in kept else "none"
        for n in shape
    )


def sides_without_factor(shape: Sequence[int], config: ShampooConfig) -> list[int]:
    """Lengths of the dimensions of a block that have no factor at all."""
    kinds = factor_kinds(shape, config)
    return [n for n, kind in zip(shape, kinds, strict=True) if kind == "none"]


def is_matrix(sizes: Sequence[int]) -> bool:
    """Whether two or more dimensions are longer than one: otherwise there is one row or column."""
    return sum(n > 1 for n in sizes) > 1


def proportionate_sides(shape: Sequence[int], ratio: float) -> set[int]:
    """Sides n of a block with n x n <= `ratio` times its elements, and the shortest one."""
    return {n for n in shape if n == min(shape) or n * n <= ratio * math.prod(shape)}


def resolution_of(dtype: torch.dtype) -> float:
    """Eigenvalues of a factor that are kept in this type are rounding below this, relative to the
    largest."""
    # Rounding of bf16 entries, 2^-9 of each, adds up to less in the eigenvalues of a matrix:
    # measured, spectra are right down to about 2^-12 of the largest.
    return 2.0**-12 if dtype == torch.bfloat16 else torch.finfo(torch.float32).eps


def condition_number(largest: Tensor, smallest: Tensor, resolution: float) -> Tensor:
    """The largest eigenvalue of factors by the smallest, which counts as at least `resolution` of
    the largest, as it does when roots are taken; NaN where all are zero."""
    return largest / torch.maximum(smallest, largest * resolution)
