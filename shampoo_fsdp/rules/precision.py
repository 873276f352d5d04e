"""Arithmetic of the step, whatever the program around it has chosen for its model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_precision", "torch_dtype"]

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
