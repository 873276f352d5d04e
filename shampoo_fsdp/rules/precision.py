"""Arithmetic of the step, whatever the program around it has chosen for its model."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "MatmulPrecision",
    "Precise",
    "add_gram",
    "full_precision",
    "gram",
    "has_fast_bfloat16",
    "products_in",
    "split_product",
    "tf32_product",
    "torch_dtype",
]

MatmulPrecision = Literal["highest", "high", "medium"]
"""Values of the setting `matmul_precision`."""

_MATMULS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)


def torch_dtype(name: str) -> torch.dtype:
    """The type that a setting names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within it, matrix products are in fp32: no autocast, and no TF32, whose 10 bits are too few
    for factors whose eigenvalues span many orders of magnitude.

    torch has an older interface for the same choice, and refuses to read it where the two differ:
    both are set."""
    chosen = [matmul.fp32_precision for matmul in _MATMULS]
    for matmul in _MATMULS:
        matmul.fp32_precision = "ieee"
    chosen_before = torch.get_float32_matmul_precision()  # can be read only now
    if chosen_before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if chosen_before != "highest":
            torch.set_float32_matmul_precision(chosen_before)
        for matmul, precision in zip(_MATMULS, chosen, strict=True):
            matmul.fp32_precision = "none"  # then it follows the choice for everything
            if matmul.fp32_precision != precision:
                matmul.fp32_precision = precision


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether products of bf16 matrices are faster there than of fp32 ones; of a GPU that this
    process has not used so far, that it is none of before 2020 (to ask it would be to use it)."""
    if device_type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "cpu":
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, test, bool)() for test in tests)
    return True


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Within it, within :func:`full_precision`, products of fp32 matrices are of this
    `matmul_precision` on GPUs, in TF32 for "high" and "medium"; on CPUs they stay in fp32.

    A CPU's library would take the lower precision for large products and fp32 for small ones: then
    what becomes of a block would depend on how many others are in its stack."""
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "high")
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@functools.cache
def _sums_in_fp32(device_type: str) -> bool:
    """Whether it multiplies bf16 matrices, fast, with fp32 as what comes out; ROCm cannot."""
    return device_type == "cuda" and not torch.version.hip and has_fast_bfloat16("cuda")


def gram(blocks: Tensor) -> Tensor:
    """U U^T of blocks U [B, n, m], as fp32 [B, n, n].

    Sums that are rounded to bf16 would make factors indefinite.
    """
    if blocks.dtype == torch.bfloat16 and _sums_in_fp32(blocks.device.type):
        return torch.bmm(blocks, blocks.mT, out_dtype=torch.float32)
    blocks = blocks.float()
    return torch.bmm(blocks, blocks.mT)


def add_gram(factors: Tensor, blocks: Tensor, weight: float) -> Tensor:
    """factors [B, n, n] + weight U U^T, in place, summed in fp32; blocks U [B, n, m], fp32 or
    bf16."""
    if factors.device.type == "cpu":
        blocks = blocks.float()
        if factors.shape[1] >= _IN_STRIPS:
            return _add_gram_in_strips(factors, blocks, weight)
    elif blocks.dtype == torch.bfloat16:
        return factors.add_(gram(blocks), alpha=weight)
    return factors.baddbmm_(blocks, blocks.mT, alpha=weight)


# Sides from which on a symmetric product is cheaper in strips, on CPUs: 0.7 of the time. (On GPUs
# the copy would cost what the products save.)
_IN_STRIPS = 128


def _add_gram_in_strips(factors: Tensor, blocks: Tensor, weight: float) -> Tensor:
    """The lower triangle in four strips of rows, and the upper one from it."""
    n = factors.shape[1]
    for start in range(0, n, -(-n // 4)):
        rows = slice(start, min(start - (-n // 4), n))
        strip = factors[:, rows, : rows.stop]
        strip.baddbmm_(blocks[:, rows], blocks[:, : rows.stop].mT, alpha=weight)
        factors[:, :start, rows].copy_(strip[:, :, :start].mT)
    return factors


def tf32_product(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha a @ b of stacks of square matrices, within :func:`full_precision`: inputs are rounded
    to the 10 bits of TF32 where the device has units for it."""
    with products_in("high"):
        return torch.bmm(a, b) if alpha == 1.0 else torch.baddbmm(a, a, b, beta=0.0, alpha=alpha)


def split_product(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """The same in 16 bits, where the device has units for it."""
    precise = Precise(a) @ Precise(b.mT)
    return precise if alpha == 1.0 else precise.mul_(alpha)


class Precise:
    """Stacks of square fp32 matrices [B, n, n], for products A B^T in 16 bits, sums in fp32. Where
    the device has no such product it is in fp32; fp64 stays what it is."""

    def __init__(self, matrices: Tensor) -> None:
        units = _sums_in_fp32(matrices.device.type)
        self._split = units and matrices.dtype == torch.float32
        self._left, self._right = split(matrices) if self._split else (matrices, matrices)

    def __matmul__(self, other: "Precise") -> Tensor:
        """A B^T."""
        if self._split:
            return torch.bmm(self._left, other._right.mT, out_dtype=torch.float32)
        return torch.bmm(self._left, other._right.mT)


def split(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 matrices A = h + l, h being A in bf16, as [h, l, h] and [l, h, h], bf16 [B, n, 3n]: the
    first of A times the other of B, transposed, is h l^T + l h^T + h h^T, the small ones first, and
    nearly A B^T."""
    n = matrices.shape[-1]
    parts = matrices.new_empty(*matrices.shape[:-1], 4 * n, dtype=torch.bfloat16)
    high, low, *_ = torch.split(parts, n, -1)
    high.copy_(matrices)
    torch.sub(matrices, high, out=low)
    parts[..., 2 * n :].view(*matrices.shape[:-1], 2, n).copy_(high.unsqueeze(-2))
    return parts[..., : 3 * n], parts[..., n:]
