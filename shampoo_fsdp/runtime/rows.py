"""Pieces of shards and blocks as rows of flat memory, and the two orders in which they travel."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_fsdp.plan.transfers import Slices
from shampoo_fsdp.rules.matrices import to_device

__all__ = ["Piece", "Way", "find_way"]


@dataclass(frozen=True)
class Piece:
    """Where a piece lies in flat memory, and the rank that it goes to or comes from."""

    start: int
    """Of a dense tensor in that memory."""
    sizes: Sequence[int]
    """Of that tensor."""
    slices: Slices
    """Of that tensor."""
    peer: int
    """Position of the rank."""

    @property
    def numel(self) -> int:
        return math.prod(part.stop - part.start for part in self.slices)

    def rows(self, width: int) -> Tensor:
        """Numbers of its rows, [numel / width], int32, on the CPU."""
        numbers = torch.tensor(self.start // width, dtype=torch.int32)
        stride = math.prod(self.sizes) // width
        for size, part in zip(self.sizes[:-1], self.slices[:-1], strict=True):
            stride //= size
            steps = torch.arange(part.start, part.stop, dtype=torch.int32) * stride
            numbers = numbers.unsqueeze(-1) + steps
        last = self.slices[-1]
        return (
            numbers.unsqueeze(-1)
            + torch.arange(last.start // width, last.stop // width, dtype=torch.int32)
        ).flatten()


@dataclass(frozen=True, eq=False)
class Way:
    """From the memory of one side to that of the other, for one rank."""

    leaving: Tensor
    """Numbers of the rows that leave, in the order of the ranks that they go to; int32."""
    arrived: Tensor
    """For each row of the memory where they arrive, its number among those that do; int32."""
    sent: list[int]
    """Elements that go to each rank."""
    received: list[int]
    """Elements that come from each rank."""


def find_way(
    sources: Sequence[Piece],
    targets: Sequence[Piece],
    width: int,
    ranks: int,
    device: torch.device,
) -> Way:
    """
    Args:
        sources, targets: pieces that leave and arrive. Of those between two ranks both must list
            the same in the same order. What arrives fills its memory.
        width: of a row, in elements.
        ranks: how many there are.
        device: where the numbers are needed.
    """
    order = _rows(targets, width)
    arrived = torch.empty_like(order)
    arrived[order.long()] = torch.arange(len(order), dtype=order.dtype)
    return Way(
        to_device(_rows(sources, width), device),
        to_device(arrived, device),
        _elements(sources, ranks),
        _elements(targets, ranks),
    )


def _rows(pieces: Sequence[Piece], width: int) -> Tensor:
    by_peer = sorted(pieces, key=lambda piece: piece.peer)  # stable
    return torch.cat([torch.empty(0, dtype=torch.int32), *(p.rows(width) for p in by_peer)])


def _elements(pieces: Sequence[Piece], ranks: int) -> list[int]:
    elements = [0] * ranks
    for piece in pieces:
        elements[piece.peer] += piece.numel
    return elements
