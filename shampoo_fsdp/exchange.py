"""Carries out a plan's transfers: gradient pieces to the owners, update pieces back."""

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_fsdp.planner import Plan, Slices, Transfer

__all__ = ["Exchange", "Piece", "allocate", "release"]

Piece = tuple[int, Slices]
"""Index of a parameter in the plan, and slices of its shard's view."""


class Exchange:
    """Moves pieces of some parameters of a plan between the shards and the blocks of its ranks.

    A piece that lies on its block's owner is copied; all others travel, packed, in one
    all-to-all per direction, during which the caller may compute. Both directions use the same two
    buffers: the one that gradients leave from is where updates arrive. Their memory is there only
    while something is in it.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Collection[int],
        blocks: dict[int, Tensor],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            plan: of this rank.
            parameters: the ones to exchange.
            blocks: for each of their blocks that this rank owns, by its index in the plan, the
                tensor that holds its gradient, then its update, in the shape of its rectangle.
            group: of the plan's ranks; needed if there are several.
            dtype: in which pieces travel; those that stay are copied as they are.
        """
        self._group = group
        self._ranks = len(plan.ranks)
        # Known to every rank, so that all of them take part in the collectives or none does.
        self._anything_travels = any(plan.elements_sent)
        local = [t for t in plan.local if t.parameter in parameters]
        gather_out = [t for t in plan.gather_out if t.parameter in parameters]
        gather_in = [t for t in plan.gather_in if t.block in blocks]
        scatter_out = [t for t in plan.scatter_out if t.block in blocks]
        scatter_in = [t for t in plan.scatter_in if t.parameter in parameters]
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
        self._own_blocks = [blocks[t.block][t.block_slices] for t in local]
        self._gather_in = [blocks[t.block][t.block_slices] for t in gather_in]
        self._scatter_out = [blocks[t.block][t.block_slices] for t in scatter_out]
        self._gather_out = [(t.parameter, t.shard_slices) for t in gather_out]
        self.own: list[Piece] = [(t.parameter, t.shard_slices) for t in local]
        """Where the pieces of this rank's shards are that it owns itself."""
        self.arriving: list[Piece] = [(t.parameter, t.shard_slices) for t in scatter_in]
        """Where those are whose updates come from other ranks."""
        self._work: dist.Work | None = None
        for buffer in (self._shard_buffer, self._block_buffer):
            release(buffer)

    def send_gradients(self, gradients: dict[int, Tensor | None]) -> None:
        """Let the pieces set out for their blocks' owners.

        Args:
            gradients: for each parameter this rank's shard of its gradient, in the shape of the
                parameter's view; None sends NaN, which the stacks take for 'no usable gradient'.
                (Every piece travels on every step, so that ranks never disagree about what is
                sent.)
        """
        if self._anything_travels:
            # An interrupted step may have left something in flight, from and into this memory.
            self._finish()
            allocate(self._shard_buffer)
            allocate(self._block_buffer)
            _fill(self._packed_gradients, self._gather_out, gradients)
            self._start(self._block_buffer, self._shard_buffer, self._gather_splits)

    def receive_gradients(self, gradients: dict[int, Tensor | None]) -> None:
        """Fill the blocks with their gradients: those that travelled and those that did not."""
        if self._anything_travels:
            self._finish()
            release(self._shard_buffer)
            _copy(self._gather_in, self._arrived_gradients)
            release(self._block_buffer)
        _fill(self._own_blocks, self.own, gradients)

    def send_updates(self) -> None:
        """Let the updates, which have replaced the gradients in the blocks, set out."""
        if self._anything_travels:
            allocate(self._block_buffer)
            allocate(self._shard_buffer)
            _copy(self._packed_updates, self._scatter_out)
            self._start(self._shard_buffer, self._block_buffer, self._scatter_splits)

    def own_updates(self) -> list[Tensor]:
        """The updates of `own`: parts of the blocks."""
        return self._own_blocks

    def receive_updates(self) -> list[Tensor]:
        """The updates of `arriving`, until :meth:`forget_updates`."""
        if self._anything_travels:
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
            group=self._group,
            async_op=True,
        )

    def _finish(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _splits(self, transfers: Sequence[Transfer]) -> list[int]:
        splits = [0] * self._ranks
        for transfer in transfers:
            splits[transfer.peer] += transfer.numel
        return splits


def allocate(buffer: Tensor) -> None:
    """Give a tensor its memory, and with it its views."""
    buffer.untyped_storage().resize_(buffer.numel() * buffer.itemsize)


def release(buffer: Tensor) -> None:
    """Take it away again, until the next :func:`allocate`."""
    buffer.untyped_storage().resize_(0)


def _fill(
    targets: Sequence[Tensor], pieces: Sequence[Piece], shards: dict[int, Tensor | None]
) -> None:
    filled, sources = [], []
    for target, (parameter, slices) in zip(targets, pieces, strict=True):
        shard = shards[parameter]
        if shard is None:
            target.fill_(torch.nan)
        else:
            filled.append(target)
            sources.append(shard[slices])
    _copy(filled, sources)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _pieces(buffer: Tensor, transfers: Sequence[Transfer]) -> list[Tensor]:
    numels = [transfer.numel for transfer in transfers]
    parts = torch.split(buffer[: sum(numels)], numels)
    return [part.view(t.shape) for part, t in zip(parts, transfers, strict=True)]


def _numel(transfers: Sequence[Transfer]) -> int:
    return sum(transfer.numel for transfer in transfers)
