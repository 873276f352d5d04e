"""Carries out a plan's transfers: gradient pieces to the owners, update pieces back."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_fsdp.planner import Plan, Slices, Transfer

__all__ = ["Exchange", "Update"]

Update = tuple[int, Slices, Tensor]
"""Index of a parameter, slices of its shard's view, and what to subtract there times lr."""


class Exchange:
    """Moves pieces between the shards and the blocks of the ranks of one plan.

    A piece that lies on its block's owner is copied; all others travel, packed, in one
    all-to-all per direction. Both directions use the same two buffers: the one that gradients
    leave from is where updates arrive.
    """

    def __init__(
        self,
        plan: Plan,
        blocks: Sequence[Tensor],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            plan: of this rank.
            blocks: for each block that this rank owns the tensor that holds its gradient, then
                its update, in the shape of its rectangle; always the same memory.
            group: of the plan's ranks; needed if there are several.
            dtype: in which pieces travel.
        """
        self._plan = plan
        self._group = group
        # Known to every rank, so that all of them skip the collectives or none does.
        self._anything_travels = any(plan.elements_sent)
        shard_side = max(_numel(plan.gather_out), _numel(plan.scatter_in))
        block_side = max(_numel(plan.gather_in), _numel(plan.scatter_out))
        self._shard_buffer = torch.empty(shard_side, dtype=dtype, device=device)
        self._block_buffer = torch.empty(block_side, dtype=dtype, device=device)
        self._packed_gradients = _pieces(self._shard_buffer, plan.gather_out)
        self._arrived_gradients = _pieces(self._block_buffer, plan.gather_in)
        self._packed_updates = _pieces(self._block_buffer, plan.scatter_out)
        self._arrived_updates = _pieces(self._shard_buffer, plan.scatter_in)
        self._gather_splits = self._splits(plan.gather_in), self._splits(plan.gather_out)
        self._scatter_splits = self._splits(plan.scatter_in), self._splits(plan.scatter_out)
        self._local = [blocks[t.block][t.block_slices] for t in plan.local]
        self._gather_in = [blocks[t.block][t.block_slices] for t in plan.gather_in]
        self._scatter_out = [blocks[t.block][t.block_slices] for t in plan.scatter_out]

    def gather(self, gradients: Sequence[Tensor | None]) -> None:
        """Fill the blocks with their gradients.

        Args:
            gradients: for each parameter of the plan this rank's shard of its gradient, in the
                shape of the parameter's view; None fills the shard's pieces with NaN, which the
                stacks take for 'no usable gradient'. (Every piece travels on every step, so that
                ranks never disagree about what is sent.)
        """
        plan = self._plan
        if self._anything_travels:
            _fill(self._packed_gradients, plan.gather_out, gradients)
            self._all_to_all(self._block_buffer, self._shard_buffer, self._gather_splits)
            _copy(self._gather_in, self._arrived_gradients)
        _fill(self._local, plan.local, gradients)

    def scatter(self) -> list[Update]:
        """Bring the updates, which have replaced the gradients in the blocks, to the shards.

        The tensors returned are views of buffers that the next :meth:`gather` overwrites.
        """
        plan = self._plan
        transfers, pieces = list(plan.local), list(self._local)
        if self._anything_travels:
            _copy(self._packed_updates, self._scatter_out)
            self._all_to_all(self._shard_buffer, self._block_buffer, self._scatter_splits)
            transfers += plan.scatter_in
            pieces += self._arrived_updates
        return [
            (t.parameter, t.shard_slices, piece) for t, piece in zip(transfers, pieces, strict=True)
        ]

    def _all_to_all(
        self, output: Tensor, source: Tensor, splits: tuple[list[int], list[int]]
    ) -> None:
        receive, send = splits
        dist.all_to_all_single(
            output[: sum(receive)], source[: sum(send)], receive, send, group=self._group
        )

    def _splits(self, transfers: Sequence[Transfer]) -> list[int]:
        splits = [0] * len(self._plan.ranks)
        for transfer in transfers:
            splits[transfer.peer] += transfer.numel
        return splits


def _fill(
    targets: Sequence[Tensor], transfers: Sequence[Transfer], shards: Sequence[Tensor | None]
) -> None:
    filled, sources = [], []
    for target, transfer in zip(targets, transfers, strict=True):
        shard = shards[transfer.parameter]
        if shard is None:
            target.fill_(torch.nan)
        else:
            filled.append(target)
            sources.append(shard[transfer.shard_slices])
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
