"""Carries out a plan's transfers: gradient pieces to the owners, update pieces back."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_fsdp.plan.transfers import OwnedBlock, Part, Slices, Transfer
from shampoo_fsdp.runtime.parameters import Member
from shampoo_fsdp.runtime.ranks import RankSet

__all__ = ["Exchange", "Piece", "allocate", "release"]

Piece = tuple[Member, Slices]
"""A parameter, and slices of its shard's view."""

_Moves = list[tuple[Member, Transfer]]


class Exchange:
    """Moves pieces of some parameters between the shards and the blocks of their ranks.

    A piece that lies on its block's owner is copied; all others travel, packed, in one
    all-to-all per direction, during which the caller may compute. Both directions use the same two
    buffers: the one that gradients leave from is where updates arrive. Their memory is there only
    while something is in it.
    """

    def __init__(
        self,
        parts: Mapping[Member, Part],
        blocks: Mapping[OwnedBlock, Tensor],
        ranks: RankSet,
        dtype: torch.dtype,
        device: torch.device,
        *,
        travels: bool,
    ) -> None:
        """
        Args:
            parts: what this rank has to do for each parameter.
            blocks: for each block that it owns the tensor that holds its gradient, then its
                update, in the shape of its rectangle.
            ranks: those of the plan.
            dtype: in which pieces travel; those that stay are copied as they are.
            travels: whether any rank sends anything: all of them take part then, or none.
        """

        def moves(kind: str) -> _Moves:
            # The sort is stable: sender and receiver list the pieces of a pair, of which there is
            # one for each block, in the same order.
            found = [(member, t) for member, part in parts.items() for t in getattr(part, kind)]
            return sorted(found, key=lambda move: move[1].peer)

        def in_blocks(found: _Moves) -> list[Tensor]:
            return [blocks[t.block][t.in_block] for _, t in found if t.block is not None]

        self._ranks = ranks
        self._travels = travels
        local = moves("local")
        gather_out, gather_in = moves("gather_out"), moves("gather_in")
        scatter_out, scatter_in = moves("scatter_out"), moves("scatter_in")
        shard_side = max(_numel(gather_out), _numel(scatter_in))
        block_side = max(_numel(gather_in), _numel(scatter_out))
        self._shard_buffer = torch.empty(shard_side, dtype=dtype, device=device)
        self._block_buffer = torch.empty(block_side, dtype=dtype, device=device)
        self._packed_gradients = _pieces(self._shard_buffer, gather_out)
        self._arrived_gradients = _pieces(self._block_buffer, gather_in)
        self._packed_updates = _pieces(self._block_buffer, scatter_out)
        self._arrived_updates = _pieces(self._shard_buffer, scatter_in)
        self._gather_splits = self._splits(gather_in), self._splits(gather_out)
        self._scatter_splits = self._splits(scatter_in), self._splits(scatter_out)
        self._own_blocks = in_blocks(local)
        self._gather_in = in_blocks(gather_in)
        self._scatter_out = in_blocks(scatter_out)
        self._gather_out: list[Piece] = [(member, t.in_shard) for member, t in gather_out]
        self.own: list[Piece] = [(member, t.in_shard) for member, t in local]
        """Where the pieces of this rank's shards are that it owns itself."""
        self.arriving: list[Piece] = [(member, t.in_shard) for member, t in scatter_in]
        """Where those are whose updates come from other ranks."""
        self._work: dist.Work | None = None
        for buffer in (self._shard_buffer, self._block_buffer):
            release(buffer)

    def send_gradients(self, gradients: Mapping[Member, Tensor | None]) -> None:
        """Let the pieces set out for their blocks' owners.

        Args:
            gradients: for each parameter this rank's shard of its gradient, in the shape of the
                parameter's view; None sends NaN, which the stacks take for 'no usable gradient'.
                (Every piece travels on every step, so that ranks never disagree about what is
                sent.)
        """
        if self._travels:
            # An interrupted step may have left something in flight, from and into this memory.
            self._finish()
            allocate(self._shard_buffer)
            allocate(self._block_buffer)
            _fill(self._packed_gradients, self._gather_out, gradients)
            self._start(self._block_buffer, self._shard_buffer, self._gather_splits)

    def receive_gradients(self, gradients: Mapping[Member, Tensor | None]) -> None:
        """Fill the blocks with their gradients: those that travelled and those that did not."""
        if self._travels:
            self._finish()
            release(self._shard_buffer)
            _copy(self._gather_in, self._arrived_gradients)
            release(self._block_buffer)
        _fill(self._own_blocks, self.own, gradients)

    def send_updates(self) -> None:
        """Let the updates, which have replaced the gradients in the blocks, set out."""
        if self._travels:
            allocate(self._block_buffer)
            allocate(self._shard_buffer)
            _copy(self._packed_updates, self._scatter_out)
            self._start(self._shard_buffer, self._block_buffer, self._scatter_splits)

    def own_updates(self) -> list[Tensor]:
        """The updates of `own`: parts of the blocks."""
        return self._own_blocks

    def receive_updates(self) -> list[Tensor]:
        """The updates of `arriving`, until :meth:`forget_updates`."""
        if self._travels:
            self._finish()
            release(self._block_buffer)
        return self._arrived_updates

    def forget_updates(self) -> None:
        release(self._shard_buffer)

    def _start(self, output: Tensor, source: Tensor, splits: tuple[list[int], list[int]]) -> None:
        receive, send = splits
        self._work = dist.all_to_all_single(
            output[: sum(receive)],
            source[: sum(send)],
            receive,
            send,
            group=self._ranks.group,
            async_op=True,
        )

    def _finish(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _splits(self, moves: _Moves) -> list[int]:
        splits = [0] * len(self._ranks.ranks)
        for _, transfer in moves:
            splits[transfer.peer] += transfer.numel
        return splits


def allocate(buffer: Tensor) -> None:
    """Give a tensor its memory, and with it its views."""
    buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize)


def release(buffer: Tensor) -> None:
    """Take it away again, until the next :func:`allocate`."""
    buffer.untyped_storage().resize_(0)


def _fill(
    targets: Sequence[Tensor], pieces: Sequence[Piece], shards: Mapping[Member, Tensor | None]
) -> None:
    filled, sources = [], []
    for target, (member, slices) in zip(targets, pieces, strict=True):
        shard = shards[member]
        if shard is None:
            target.fill_(torch.nan)
        else:
            filled.append(target)
            sources.append(shard[slices])
    _copy(filled, sources)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _pieces(buffer: Tensor, moves: _Moves) -> list[Tensor]:
    numels = [transfer.numel for _, transfer in moves]
    parts = torch.split(buffer[: sum(numels)], numels)
    return [part.view(t.shape) for part, (_, t) in zip(parts, moves, strict=True)]


def _numel(moves: _Moves) -> int:
    return sum(transfer.numel for _, transfer in moves)
