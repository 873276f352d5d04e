"""Carries out a plan's transfers: gradients to the blocks' owners, updates back to the shards.

Pieces of shards and blocks are rows of flat memory; a route says in which order rows travel.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_fsdp.plan.transfers import OwnedBlock, Part, Slices
from shampoo_fsdp.rules.matrices import to_device
from shampoo_fsdp.runtime.parameters import Member
from shampoo_fsdp.runtime.ranks import RankSet

__all__ = ["Exchange", "allocate", "release"]


@dataclass(frozen=True)
class _Piece:
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
class _Route:
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


class Exchange:
    """Moves some parameters' gradients and updates between the shards and the blocks of ranks.

    In memory the shards of a rank, one after the other, are rows of one width that no piece cuts,
    and so are its blocks. Rows are picked in the order of the ranks that they go to, travel in one
    all-to-all, during which the caller may compute, and are picked again in the order of the memory
    where they arrive, together with those that stayed on their rank. So the kernels of a GPU are as
    few as that, whatever the number of pieces.
    """

    def __init__(
        self,
        parts: Mapping[Member, Part],
        blocks: Mapping[OwnedBlock, int],
        ranks: RankSet,
        dtype: torch.dtype,
        device: torch.device,
        *,
        travels: bool,
    ) -> None:
        """
        Args:
            parts: what this rank has to do for each parameter.
            blocks: for each block that it owns where it starts in the memory of all of them.
            ranks: those of the plan.
            dtype: in which everything travels, and what does not is rounded to.
            travels: whether any rank sends anything: all of them take part then, or none.
        """
        self._ranks = ranks
        self._travels = travels
        self._dtype = dtype
        self._device = device
        self._shapes = [part.shard_shape for part in parts.values()]
        self._width = math.gcd(*(part.row_width for part in parts.values()))
        starts = itertools.accumulate(map(math.prod, self._shapes), initial=0)
        placed = list(zip(starts, parts.values(), strict=False))

        def in_shards(kind: str) -> list[_Piece]:
            return [
                _Piece(start, part.shard_shape, transfer.in_shard, transfer.peer)
                for start, part in placed
                for transfer in getattr(part, kind)
            ]

        def in_blocks(kind: str) -> list[_Piece]:
            return [
                _Piece(blocks[block], block.sizes, transfer.in_block, transfer.peer)
                for part in parts.values()
                for transfer in getattr(part, kind)
                if (block := transfer.block) is not None
            ]

        route = functools.partial(_find_route, width=self._width, ranks=ranks, device=device)
        self._gather = route(in_shards("gather_out"), in_blocks("gather_in"))
        self._scatter = route(in_blocks("scatter_out"), in_shards("scatter_in"))
        self._wait: Callable[[], object] | None = None
        self._leaving = self._arriving = torch.empty(0, device="cpu")
        """What travels, and the rows that stay with memory for those that come after them."""

    def send_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Let gradients set out for the owners of their blocks.

        Args:
            gradients: for each parameter this rank's shard of it, in the shape of the parameter's
                view; None sends NaN, which the stacks take for 'no usable gradient'. (Every piece
                travels on every step, so that ranks never disagree about what is sent.)
        """
        # An interrupted step may have left something in flight.
        self._finish()
        self._pack(self._staged(gradients), self._gather)
        self._set_out(self._gather, "gradients")

    def receive_gradients(self, blocks: Tensor) -> None:
        """Fill the memory of all blocks with their gradients."""
        arrived, order = self._arrived(), self._gather.arrived
        if blocks.dtype == arrived.dtype:
            torch.index_select(arrived, 0, order, out=blocks.view(-1, self._width))
        else:
            blocks.copy_(self._pick(arrived, order))

    def pack_updates(self, blocks: Tensor) -> None:
        """Take the updates, which have replaced the gradients, out of the memory of all blocks."""
        self._pack(blocks.to(self._dtype), self._scatter)

    def send_updates(self) -> None:
        """Let them set out for the shards."""
        self._set_out(self._scatter, "updates")

    def receive_updates(self) -> list[Tensor]:
        """The update of each parameter's shard, in the shape of the view."""
        updates = self._pick(self._arrived(), self._scatter.arrived)
        return self._shards_in(updates)

    def _staged(self, gradients: Sequence[Tensor | None]) -> Tensor:
        memory = torch.empty(
            sum(map(math.prod, self._shapes)), dtype=self._dtype, device=self._device
        )
        targets, sources = [], []
        for target, gradient in zip(self._shards_in(memory), gradients, strict=True):
            if gradient is None:
                target.fill_(torch.nan)
            else:
                targets.append(target)
                sources.append(gradient)
        if targets:
            torch._foreach_copy_(targets, sources)
        return memory

    def _shards_in(self, memory: Tensor) -> list[Tensor]:
        parts = torch.split(memory, [math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _pick(self, memory: Tensor, rows: Tensor) -> Tensor:
        return memory.view(-1, self._width).index_select(0, rows).view(-1)

    def _pack(self, memory: Tensor, route: _Route) -> None:
        rows = memory.view(-1, self._width)
        stay = len(route.staying)
        self._leaving = rows.index_select(0, route.leaving)
        self._arriving = rows.new_empty(len(route.arrived), self._width)
        torch.index_select(rows, 0, route.staying, out=self._arriving[:stay])

    def _set_out(self, route: _Route, what: str) -> None:
        if self._travels:
            arriving = self._arriving[len(route.staying) :]
            self._wait = self._ranks.all_to_all(
                arriving, self._leaving, route.received, route.sent, what
            )

    def _arrived(self) -> Tensor:
        self._finish()
        arrived = self._arriving
        self._leaving = self._arriving = torch.empty(0, device="cpu")
        return arrived

    def _finish(self) -> None:
        # What is in flight is kept until here. Its memory may then be freed, since all that uses it
        # again does so after the stream of the step, which waits for the transfer here.
        if self._wait is not None:
            self._wait()
            self._wait = None


def _find_route(
    sources: Sequence[_Piece],
    targets: Sequence[_Piece],
    width: int,
    ranks: RankSet,
    device: torch.device,
) -> _Route:
    """The route of this rank's pieces.

    Args:
        sources, targets: pieces that leave and arrive. Of those between two ranks both must list
            the same in the same order. What arrives fills its memory.
        width: of a row, in elements.
        ranks: those that the pieces go to and come from.
        device: where the numbers are needed.
    """
    (stay, leave), (stayed, came) = (
        _apart(pieces, ranks.position) for pieces in (sources, targets)
    )
    order = _rows([*stayed, *came], width)
    arrived = torch.empty_like(order)
    arrived[order.long()] = torch.arange(len(order), dtype=order.dtype, device="cpu")
    return _Route(
        to_device(_rows(stay, width), device),
        to_device(_rows(leave, width), device),
        to_device(arrived, device),
        _numbers(leave, width, len(ranks.ranks)),
        _numbers(came, width, len(ranks.ranks)),
    )


def _apart(pieces: Sequence[_Piece], me: int) -> tuple[list[_Piece], list[_Piece]]:
    """Those of this rank, and the others by rank."""
    own = [piece for piece in pieces if piece.peer == me]
    others = [piece for piece in pieces if piece.peer != me]
    return own, sorted(others, key=lambda piece: piece.peer)  # stable


def _rows(pieces: Sequence[_Piece], width: int) -> Tensor:
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


def _numbers(pieces: Sequence[_Piece], width: int, ranks: int) -> list[int]:
    numbers = [0] * ranks
    for piece in pieces:
        numbers[piece.peer] += piece.numel // width
    return numbers


def allocate(buffer: Tensor) -> None:
    """Give a tensor its memory, and with it its views."""
    buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize)


def release(buffer: Tensor) -> None:
    """Take it away again, until the next :func:`allocate`."""
    buffer.untyped_storage().resize_(0)
