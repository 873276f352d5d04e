"""What kernels share: Triton itself, where it can be used, and functions in its language."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # `_names` imports it for all others
    import triton.language as tl

__all__ = ["kernels", "observed_by"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


_observer: Callable[[int, int], None] | None = None
"""Is told the bytes that a launch reads and writes, each tensor once, and the FLOPs of its matrix
products, in 16 bits."""
_wanted = True


@contextmanager
def kernels(setting: str) -> Iterator[None]:
    """Within it kernels of our own are launched where they can be, or, for "off", nowhere."""
    global _wanted
    before, _wanted = _wanted, setting != "off"
    try:
        yield
    finally:
        _wanted = before


@contextmanager
def observed_by(observer: Callable[[int, int], None]) -> Iterator[None]:
    """Within it launches with fake tensors on a GPU that is not there are counted, as on an H100;
    nothing is launched."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def launch(
    kernel: Callable[..., Any],
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    moved: int,
    flops: int = 0,
    **cut: Any,
) -> None:
    """Launch a kernel, or tell the observer what it would cost."""
    if _observer is not None:
        _observer(moved, flops)
    else:
        jit(kernel)[grid](*arguments, **cut)


def size_of(*tensors: Tensor | None) -> int:
    """Their bytes."""
    return sum(0 if t is None else t.numel() * t.element_size() for t in tensors)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPUs, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_run(*tensors: Tensor | None) -> bool:
    """Whether kernels may be launched with these tensors: on an NVIDIA GPU from 2020 on, of types
    of at most 32 bits, and with memory behind them."""

    def fits(t: Tensor) -> bool:
        if _observer is not None:
            return t.device.type == "cuda"
        return type(t) in (Tensor, torch.nn.Parameter) and not missing(t.device)

    return _wanted and all(t is None or (t.dtype in _TYPES and fits(t)) for t in tensors)


def large_tiles(device: torch.device) -> bool:
    """Whether tensor cores read their operands from where tiles are copied to: else large tiles
    have no room in the registers."""
    return interpreted() or _observer is not None or 90 <= _generation(device) < 110


def tiles(n: int, itemsize: int, large: bool) -> dict[str, int]:
    """How products of n x n matrices are cut, such that registers do, for operands of this size."""
    large = large and n > 64
    return {
        "TILE": 128 if large else 64,
        "DEPTH": (128 if large else 64) // itemsize,
        "num_warps": 8 if large else 4,
        "num_stages": 3,
    }


@functools.cache
def missing(device: torch.device) -> str:
    """What kernels lack on a device; "" if it is nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "" if interpreted() or _generation(device) >= 80 else "no NVIDIA GPU from 2020 on"


@functools.cache
def _generation(device: torch.device) -> int:
    """Of an NVIDIA GPU, 80 for that of 2020; else 0."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def sums_in_fp32(device_type: str) -> bool:
    """Whether it multiplies bf16 and fp16 matrices, fast, with fp32 as what comes out; ROCm cannot.

    Of a GPU that this process has not used so far it is assumed: to ask it would be to use it."""
    if device_type != "cuda" or torch.version.hip:
        return False
    # (Not kept: the answer may change when the GPU is used for the first time.)
    known = torch.cuda.is_initialized()
    return not known or bool(torch.cuda.is_bf16_supported(including_emulation=False))


@functools.cache
def jit(kernel: Callable[..., Any]) -> Any:
    """A function in Triton's language, compiled when it is launched."""
    import triton

    kernel.__globals__.update(_names())  # in place of what is imported for readers alone
    return triton.jit(kernel)


@functools.cache
def _names() -> dict[str, Any]:
    import triton

    globals()["tl"] = triton.language
    helpers = {helper.__name__: triton.jit(helper) for helper in (lerp, of_block, triangle)}
    return {"tl": triton.language} | helpers


def describable(matrices: Tensor) -> bool:
    """Whether the units that copy tiles can find those of these matrices [B, n, m]; GPUs from 2022
    on have such units, on others they are slow programs."""
    if not large_tiles(matrices.device) and _generation(matrices.device) < 90:
        return False
    size = matrices.element_size()
    rows = all(stride * size % 16 == 0 for stride in matrices.stride()[:-1])
    start = matrices.data_ptr() if _observer is None else matrices.storage_offset() * size
    return matrices.stride(-1) == 1 and rows and start % 16 == 0 and matrices.numel() > 0


def described(matrices: Tensor, rows: int, columns: int) -> Any:
    """What these units know them by, in tiles of this many rows and columns."""
    if _observer is not None:
        return matrices
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape, stride = list(matrices.shape), list(matrices.stride())
    return TensorDescriptor(matrices, shape, stride, [1, rows, columns])


def number(value: float | Tensor, blocks: int) -> float | Tensor:
    """A hyperparameter as a kernel takes it, see `of_block`: a number, or fp32 [blocks]."""
    if not isinstance(value, Tensor):
        return float(value)
    return value.float().reshape(-1).expand(blocks).contiguous()


def of_block(value, block):
    """A number for all blocks as it is; of numbers for each the one of this block."""
    value = tl.to_tensor(value)
    if value.dtype.is_ptr():
        value = tl.load(value + block)
    return value


def lerp(start, end, weight):
    """As torch.lerp rounds it."""
    return tl.where(
        weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight)
    )


def triangle(number):
    """Row and column, row <= column, of a tile of an upper triangle, column after column."""
    column = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > number, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= number, column + 1, column)
    return number - column * (column + 1) // 2, column
