"""Roots put in the place of the last ones, but for bad ones, and how much they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shampoo_fsdp.kernels.language import Cost, can_run, launch, size_of

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["keep", "keep_reference", "parts"]

_CHUNK = 4096
"""Entries that a program has."""


def keep(new: Tensor, kept: Tensor, bad: Tensor, changes: Tensor) -> None:
    """kept <- new where that is not bad; changes <- ||new - kept||^2 and ||kept||^2.

    For fp32 matrices that are kept in bf16 it reads 6 and writes 2 bytes per entry; in plain
    PyTorch these are 28.

    Args:
        new, kept: [B, n, n]; each matrix dense.
        bad: [B], bool.
        changes: of the parts of a matrix, see :func:`parts`, in fp32 [B, parts, 2].
    """
    tensors = new, kept, changes
    dense = all(t[0].is_contiguous() for t in (new, kept)) and changes.is_contiguous()
    if not dense or not can_run(*tensors):
        return keep_reference(*tensors[:2], bad, changes)
    count, n, _ = new.shape
    arguments = new, kept, bad, changes, new.stride(0), kept.stride(0), n * n
    cost = Cost(size_of(*tensors, kept))
    launch(_keep, (parts(n), count), arguments, cost, CHUNK=_CHUNK)


def keep_reference(new: Tensor, kept: Tensor, bad: Tensor, changes: Tensor) -> None:
    """The same in plain PyTorch, with all parts in the first."""
    new = torch.where(bad.view(-1, 1, 1), kept, new.to(kept.dtype))
    pair = new - kept, new
    norms = [torch.linalg.vector_norm(m, 2, (1, 2), dtype=torch.float32) for m in pair]
    changes.zero_()[:, 0] = torch.stack(norms, 1).square_()
    kept.copy_(new)


def parts(n: int) -> int:
    """Of a matrix of n x n."""
    return -(-n * n // _CHUNK)


def _keep(new, kept, bad, changes, stride, kept_stride, size, CHUNK: tl.constexpr):
    """Grid: programs of a matrix, blocks."""
    block = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = within < size
    good = tl.load(bad + block) == 0
    old = tl.load(kept + block * kept_stride + within, mask=inside, other=0.0)
    root = tl.load(new + block * stride + within, mask=inside & good, other=0.0)
    root = tl.where(good, root.to(kept.dtype.element_ty), old)
    tl.store(kept + block * kept_stride + within, root, mask=inside & good)
    root, change = root.to(tl.float32), root.to(tl.float32) - old.to(tl.float32)
    at = changes + (block * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(at, tl.sum(change * change, 0))
    tl.store(at + 1, tl.sum(root * root, 0))
