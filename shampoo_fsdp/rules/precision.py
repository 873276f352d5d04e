"""Arithmetic of the step, whatever the program around it has chosen for its model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "add_gram",
    "full_precision",
    "has_fast_bfloat16",
    "multiply",
    "products_in",
    "torch_dtype",
]

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
    """Whether products of bf16 matrices are faster there than of fp32 ones; of a GPU that is not
    there, that it is none of before 2020."""
    if device_type == "cuda" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "cpu":
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, test, bool)() for test in tests)
    return True


@contextmanager
def products_in(precision: str | None, device_type: str) -> Iterator[None]:
    """Within it, within :func:`full_precision`, products of fp32 matrices are of this
    `matmul_precision`; sums, and what comes out, are fp32."""
    matmul, chosen = torch.backends.cuda.matmul, "tf32"
    if device_type == "cpu":
        matmul, chosen = torch.backends.mkldnn.matmul, "bf16"  # type: ignore[attr-defined]
    if precision not in (("medium",) if device_type == "cpu" else ("medium", "high")):
        yield
        return
    matmul.fp32_precision = chosen
    try:
        yield
    finally:
        matmul.fp32_precision = "ieee"


def add_gram(factors: Tensor, blocks: Tensor, weight: float) -> Tensor:
    """factors [B, n, n] + weight U U^T, in place, summed in fp32; blocks U [B, n, m], fp32 or bf16.

    A sum that is rounded to bf16 would make the factors indefinite.
    """
    if blocks.dtype == torch.bfloat16:
        if factors.device.type == "cuda" and not torch.version.hip:
            product = torch.bmm(blocks, blocks.mT, out_dtype=torch.float32)
            return factors.add_(product, alpha=weight)
        blocks = blocks.float()  # in their precision by `products_in`
    elif factors.device.type == "cpu" and factors.shape[1] >= _IN_STRIPS:
        return _add_gram_in_strips(factors, blocks, weight)
    return factors.baddbmm_(blocks, blocks.mT, alpha=weight)


# Sides from which on a symmetric product is cheaper in strips, on CPUs in fp32: 0.7 of the time.
# (In bf16, and by oneDNN, strips are slower; on GPUs the copy would cost what the products save.)
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


def multiply(
    a: Tensor,
    b: Tensor,
    precision: str,
    added: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """beta * added + alpha * a @ b of stacks of fp32 matrices [B, n, k] and [B, k, m], with sums in
    fp32, by the units that the device has.

    Precisions are "high", inputs rounded to the 10 bits of TF32; and "split", 16 bits, by three
    products of bf16 (each input as a bf16 number and the rest of it). Devices without such units
    multiply in fp32, fp64 stays what it is.
    """
    if a.device.type != "cuda" or a.dtype != torch.float32:
        return _multiply(a, b, added, beta, alpha)
    if precision == "high":
        matmul = torch.backends.cuda.matmul
        matmul.fp32_precision = "tf32"
        try:
            return _multiply(a, b, added, beta, alpha)
        finally:
            matmul.fp32_precision = "ieee"
    if torch.version.hip:  # it has no `out_dtype`
        return _multiply(a, b, added, beta, alpha)
    a_high, b_high = a.bfloat16(), b.bfloat16()
    a_low, b_low = (a - a_high).bfloat16(), (b - b_high).bfloat16()
    # All three as one, the small ones first.
    left = torch.cat((a_high, a_low, a_high), 2)
    right = torch.cat((b_low, b_high, b_high), 1)
    product = torch.bmm(left, right, out_dtype=torch.float32)
    return product if added is None else product.mul_(alpha).add_(added, alpha=beta)


def _multiply(a: Tensor, b: Tensor, added: Tensor | None, beta: float, alpha: float) -> Tensor:
    if added is None:
        return torch.bmm(a, b)
    return torch.baddbmm(added, a, b, beta=beta, alpha=alpha)
