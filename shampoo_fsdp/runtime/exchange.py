"""Carries out a plan's transfers: gradients to the blocks' owners, updates back to the shards.

Pieces of shards and blocks are rows of flat memory; a route says in which order rows travel.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.assignment import OwnedBlock, Part, Slices, Transfer
from shampoo_fsdp.rules.matrices import to_device, torch_dtype
from shampoo_fsdp.runtime.parameters import Member
from shampoo_fsdp.runtime.ranks import RankSet

_Rows = tuple[int, tuple[tuple[int, int], ...]]
"""The number of the first row, and how many rows, how far apart, follow along each dimension."""

_Piece = tuple[int, _Rows]
"""The position of the rank that a piece goes to or comes from, and where it lies in flat memory."""


@dataclass(frozen=True, eq=False)
class _Route:
    """From the memory of one side to that of the other, for one rank."""

    leaving: Tensor
    """Numbers of the rows that go to other ranks, in the order of these; int32."""
    staying: Tensor | None
    """Numbers of the rows that stay and are picked beforehand; int32. None: all are kept, as they
    lie, until the others arrive."""
    order: Tensor | None
    """For each row of the memory where they arrive its number among those that are kept and, behind
    them, those from other ranks in the order of these; int32. None: it is that order."""
    sent: list[int]
    """Rows that go to each rank, to this one none."""
    received: list[int]
    """Rows that come from each rank, from this one none."""


class Exchange:
    """Moves some parameters' gradients and updates between the shards and the blocks of ranks.

    In memory the shards of a rank, one after the other, are rows of one width that no piece cuts,
    and so are its blocks. Rows that leave are picked in the order of the ranks that they go to, and
    travel in one all-to-all, during which the caller may compute. What arrives is picked in the
    order of its memory, together with what stays, which was picked before only where its memory
    is wanted in between. So the kernels of a GPU are as few as that, whatever the number of pieces.
    """

    def __init__(
        self,
        parts: Mapping[Member, Part],
        blocks: Mapping[OwnedBlock, int],
        ranks: RankSet,
        config: ShampooConfig,
        device: torch.device,
        travels: bool,
        name: str,
    ) -> None:
        """
        Args:
            parts: what this rank has to do for each parameter.
            blocks: for each block that it owns where it starts in the memory of all of them.
            ranks: those of the plan.
            config: says in which type everything travels, and what does not is rounded to.
            travels: whether any rank sends anything: all of them take part then, or none.
            name: for warnings.
        """
        self._members, self._name = list(parts), name
        self._ranks = ranks
        self._travels = travels
        self._dtype = torch_dtype(config.communication_dtype)
        self._device = device
        self._shapes = [part.shard_shape for part in parts.values()]
        self._width = math.gcd(*(part.row_width for part in parts.values()))
        starts = itertools.accumulate(map(math.prod, self._shapes), initial=0)
        placed = list(zip(starts, parts.values(), strict=False))

        in_shards = {
            t: (t.peer, _rows_of(start, part.shard_shape, t.in_shard, self._width))
            for start, part in placed
            for t in {*part.gather_out, *part.scatter_in}
        }
        in_blocks = {
            t: (t.peer, _rows_of(blocks[block], block.sizes, t.in_block, self._width))
            for part in parts.values()
            for t in {*part.gather_in, *part.scatter_out}
            if (block := t.block) is not None
        }

        def pieces(found: Mapping[Transfer, _Piece], kind: str) -> list[_Piece]:
            return [found[t] for part in parts.values() for t in getattr(part, kind)]

        self._rows = sum(map(math.prod, self._shapes)) // self._width
        """Of all shards."""
        leaving, arriving = pieces(in_shards, "gather_out"), pieces(in_blocks, "gather_in")
        self._gather = _find_route(leaving, arriving, ranks, device, self._rows)
        leaving, arriving = pieces(in_blocks, "scatter_out"), pieces(in_shards, "scatter_in")
        self._scatter = _find_route(leaving, arriving, ranks, device)
        self._wait: Callable[[], object] | None = None
        self._leaving = self._arriving = torch.empty(0, device="cpu")
        """What travels, and the rows that are kept with memory for those that come after them."""
        for route in (self._gather, self._scatter) if travels else ():
            ranks.connect(device, route.received, route.sent)

    def send_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Let gradients set out for the owners of their blocks.

        Args:
            gradients: for each parameter this rank's shard of it, in the shape of the parameter's
                view; None sends NaN, which the stacks take for 'no usable gradient'. (Every piece
                travels on every step, so that ranks never disagree about what is sent.)
        """
        # An interrupted step may have left something in flight.
        self._finish()
        route = self._gather
        room = sum(route.received) if route.staying is None else 0
        rows = self._make_rows(self._rows + room)
        shards = self._shards_in(rows[: self._rows].view(-1))
        targets, sources = [], []
        for target, gradient in zip(shards, gradients, strict=True):
            if gradient is None:
                target.fill_(torch.nan)
            else:
                targets.append(target)
                sources.append(gradient)
        if targets:
            torch._foreach_copy_(targets, sources)
        self._pack(rows, route)
        self._set_out(route, "gradients")

    def receive_gradients(self, blocks: Tensor) -> None:
        """Fill the memory of all blocks with their gradients."""
        arrived, order = self._arrived(), self._gather.order
        if order is not None and blocks.dtype == arrived.dtype:
            torch.index_select(arrived, 0, order, out=blocks.view(-1, self._width))
        else:
            blocks.copy_(_pick(arrived, order).view(-1))

    def pack_updates(self, blocks: Tensor) -> None:
        """Take the updates, which have replaced the gradients, out of the memory of all blocks."""
        self._pack(blocks.to(self._dtype).view(-1, self._width), self._scatter)

    def send_updates(self) -> None:
        """Let them set out for the shards."""
        self._set_out(self._scatter, "updates")

    def receive_updates(self, dtype: torch.dtype) -> list[Tensor]:
        """The update of each parameter's shard, in the shape of the view, in a type that has all
        that this one and that of what travels have."""
        updates = _pick(self._arrived(), self._scatter.order).view(-1)
        return self._shards_in(updates.to(torch.promote_types(updates.dtype, dtype)))

    def _shards_in(self, memory: Tensor) -> list[Tensor]:
        parts = torch.split(memory, [math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _make_rows(self, number: int) -> Tensor:
        return torch.empty(number, self._width, dtype=self._dtype, device=self._device)

    def _pack(self, rows: Tensor, route: _Route) -> None:
        if self._travels:
            self._leaving = rows.index_select(0, route.leaving)
        if route.staying is None:
            self._arriving = rows
        else:
            stay = len(route.staying)
            self._arriving = self._make_rows(stay + sum(route.received))
            torch.index_select(rows, 0, route.staying, out=self._arriving[:stay])

    def _set_out(self, route: _Route, what: str) -> None:
        if self._travels:
            arriving = self._arriving[len(self._arriving) - sum(route.received) :]
            active = (member for member in self._members if member.gradient is not None)
            step = next(active, self._members[0]).step
            where = f"of {self._name} on step {step}"
            self._wait = self._ranks.all_to_all(
                arriving, self._leaving, route.received, route.sent, what, where
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


def _rows_of(start: int, sizes: Sequence[int], slices: Slices, width: int) -> _Rows:
    """The rows of a piece of a dense tensor.

    Args:
        start: of the tensor in the memory.
        sizes, slices: of the tensor, and of the piece in it.
        width: of a row, in elements.
    """
    first, stride = start // width, math.prod(sizes) // width
    steps = []
    for size, part in zip(sizes[:-1], slices[:-1], strict=True):
        stride //= size
        first += part.start * stride
        steps.append((part.stop - part.start, stride))
    last = slices[-1]
    steps.append((last.stop // width - last.start // width, 1))
    return first + last.start // width, tuple(steps)


def _find_route(
    sources: Sequence[_Piece],
    targets: Sequence[_Piece],
    ranks: RankSet,
    device: torch.device,
    rows: int = 0,
) -> _Route:
    """The route of this rank's pieces.

    Args:
        sources, targets: pieces that leave and arrive. Of those between two ranks both must list
            the same in the same order. What arrives fills its memory.
        ranks: those that the pieces go to and come from.
        device: where the numbers are needed.
        rows: of the sources' memory, if all of it may be kept until the others arrive. (It is if
            at least half of it stays: what leaves takes memory twice until then.)
    """
    numbers, sent = _in_order(sources, ranks)
    places, received = _in_order(targets, ranks)
    stay, come = len(numbers) - sum(sent), sum(received)
    whole = 0 < rows <= 2 * stay
    kept, behind = (numbers[:stay], rows) if whole else (_count(stay), stay)
    order = torch.empty_like(places)
    order[places.long()] = torch.cat([kept, behind + _count(come)])
    staying, in_order = numbers[:stay], not whole and not come
    if in_order:
        staying = staying[order.long()]
    return _Route(
        to_device(numbers[stay:], device),
        None if whole else to_device(staying, device),
        None if in_order else to_device(order, device),
        sent,
        received,
    )


def _count(number: int) -> Tensor:
    return torch.arange(number, dtype=torch.int32, device="cpu")


def _pick(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows.index_select(0, order)


def _in_order(pieces: Sequence[_Piece], ranks: RankSet) -> tuple[Tensor, list[int]]:
    """Numbers of the rows of pieces, int32, on the CPU, those of this rank first, then by rank; and
    how many are of each other rank."""
    me, of_others = ranks.position, [0] * len(ranks.ranks)
    # Most pieces are like others: few operators, however many there are.
    alike: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = defaultdict(list)
    place = 0
    for peer, (first, steps) in sorted(pieces, key=lambda piece: (piece[0] != me, piece[0])):
        alike[steps].append((place, first))
        count = math.prod(count for count, _ in steps)
        place += count
        if peer != me:
            of_others[peer] += count
    numbers = torch.empty(place, dtype=torch.int32, device="cpu")
    for steps, found in alike.items():
        pattern = _pattern(steps)
        places, firsts = torch.tensor(found, device="cpu").unsqueeze(-1).unbind(1)
        numbers[places + _count(len(pattern))] = firsts.int() + pattern
    return numbers, of_others


def _pattern(steps: tuple[tuple[int, int], ...]) -> Tensor:
    numbers = torch.zeros(1, dtype=torch.int32, device="cpu")
    for count, stride in steps:
        along = torch.arange(count, dtype=torch.int32, device="cpu") * stride
        numbers = (numbers.unsqueeze(-1) + along).flatten()
    return numbers
