"""Pieces of shards and blocks as rows of flat memory, and the two orders in which they travel."""

import functools
import itertools
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

    def rows(self, width: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """The number of its first row, and how many rows, how far apart, follow along each
        dimension."""
        first, stride = self.start // width, math.prod(self.sizes) // width
        steps = []
        for size, part in zip(self.sizes[:-1], self.slices[:-1], strict=True):
            stride //= size
            first += part.start * stride
            steps.append((part.stop - part.start, stride))
        last = self.slices[-1]
        steps.append((last.stop // width - last.start // width, 1))
        return first + last.start // width, tuple(steps)


@dataclass(frozen=True, eq=False)
class Way:
    """From the memory of one side to that of the other, for one rank."""

    staying: Tensor
    """Numbers of the rows whose other side is on this rank as well; int32."""
    leaving: Tensor
    """Numbers of the others, in the order of the ranks that they go to; int32."""
    arrived: Tensor
    """For each row of the memory where they arrive its number among those that do, of which the
    ones that stayed on this rank are first; int32."""
    sent: list[int]
    """Rows that go to each rank, to this one none."""
    received: list[int]
    """Rows that come from each rank, from this one none."""


def find_way(
    sources: Sequence[Piece],
    targets: Sequence[Piece],
    width: int,
    ranks: int,
    me: int,
    device: torch.device,
) -> Way:
    """
    Args:
        sources, targets: pieces that leave and arrive. Of those between two ranks both must list
            the same in the same order. What arrives fills its memory.
        width: of a row, in elements.
        ranks: how many there are.
        me: position of this one.
        device: where the numbers are needed.
    """
    (stay, leave), (stayed, came) = (_apart(pieces, me) for pieces in (sources, targets))
    order = _rows([*stayed, *came], width)
    arrived = torch.empty_like(order)
    arrived[order.long()] = torch.arange(len(order), dtype=order.dtype, device="cpu")
    return Way(
        to_device(_rows(stay, width), device),
        to_device(_rows(leave, width), device),
        to_device(arrived, device),
        _numbers(leave, width, ranks),
        _numbers(came, width, ranks),
    )


def _apart(pieces: Sequence[Piece], me: int) -> tuple[list[Piece], list[Piece]]:
    """Those of this rank, and the others by rank."""
    own = [piece for piece in pieces if piece.peer == me]
    others = [piece for piece in pieces if piece.peer != me]
    return own, sorted(others, key=lambda piece: piece.peer)  # stable


def _rows(pieces: Sequence[Piece], width: int) -> Tensor:
    """Numbers of the pieces' rows, one piece after the other, int32, on the CPU."""
    # Neighbours are mostly alike: few operators, however many pieces.
    alike = itertools.groupby((piece.rows(width) for piece in pieces), key=lambda rows: rows[1])
    numbers = [torch.empty(0, dtype=torch.int32, device="cpu")]
    for steps, run in alike:
        first = torch.tensor([start for start, _ in run], dtype=torch.int32, device="cpu")
        numbers.append((first.unsqueeze(1) + _pattern(steps)).flatten())
    return torch.cat(numbers)


@functools.lru_cache(maxsize=256)
def _pattern(steps: tuple[tuple[int, int], ...]) -> Tensor:
    numbers = torch.zeros(1, dtype=torch.int32, device="cpu")
    for count, stride in steps:
        along = torch.arange(count, dtype=torch.int32, device="cpu") * stride
        numbers = (numbers.unsqueeze(-1) + along).flatten()
    return numbers


def _numbers(pieces: Sequence[Piece], width: int, ranks: int) -> list[int]:
    numbers = [0] * ranks
    for piece in pieces:
        numbers[piece.peer] += piece.numel // width
    return numbers
