"""Arithmetic of the step, whatever the program around it has chosen for its model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from shampoo_fsdp.kernels.language import sums_in_fp32

__all__ = ["full_precision", "has_fast_bfloat16", "products_in"]

MatmulPrecision = Literal["highest", "high", "medium"]
"""Values of the setting `matmul_precision`."""

_MATMULS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
)

_SUMS_OF_FP16 = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within it, matrix products are in fp32: no autocast, and no TF32, whose 10 bits are too few
    for factors whose eigenvalues span many orders of magnitude; sums of fp16 are in fp32.

    torch has an older interface for the same choice, and refuses to read it where the two differ:
    both are set."""
    chosen = [matmul.fp32_precision for matmul in _MATMULS]
    for matmul in _MATMULS:
        matmul.fp32_precision = "ieee"
    cuda = torch.backends.cuda.matmul
    halves = [name for name in _SUMS_OF_FP16 if getattr(cuda, name, False)]
    for name in halves:
        setattr(cuda, name, False)
    chosen_before = torch.get_float32_matmul_precision()  # can be read only now
    if chosen_before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for name in halves:
            setattr(cuda, name, True)
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


def gram(blocks: Tensor) -> Tensor:
    """U U^T of blocks U [B, n, m], as fp32 [B, n, n].

    Sums that are rounded to bf16 would make factors indefinite.
    """
    if blocks.dtype == torch.bfloat16 and sums_in_fp32(blocks.device.type):
        return torch.bmm(blocks, blocks.mT, out_dtype=torch.float32)
    blocks = blocks.float()
    return torch.bmm(blocks, blocks.mT)


def add_gram(factors: Tensor, blocks: Tensor, weight: float) -> Tensor:
    """factors [B, n, n] + weight U U^T, in place, summed in fp32; blocks U [B, n, m], fp32 or
    bf16."""
    if factors.device.type != "cpu":
        if blocks.dtype == torch.bfloat16:
            return factors.add_(gram(blocks), alpha=weight)
        return factors.baddbmm_(blocks, blocks.mT, alpha=weight)
    blocks, n = blocks.float(), factors.shape[1]
    if n < _IN_STRIPS:
        return factors.baddbmm_(blocks, blocks.mT, alpha=weight)
    # The lower triangle in four strips of rows, and the upper one from it.
    for start in range(0, n, -(-n // 4)):
        rows = slice(start, min(start - (-n // 4), n))
        strip = factors[:, rows, : rows.stop]
        strip.baddbmm_(blocks[:, rows], blocks[:, : rows.stop].mT, alpha=weight)
        factors[:, :start, rows].copy_(strip[:, :, :start].mT)
    return factors


# Sides from which on a symmetric product is cheaper in strips, on CPUs: 0.7 of the time. (On GPUs
# the copy would cost what the products save.)
_IN_STRIPS = 128
