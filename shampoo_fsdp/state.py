"""State entries whose pieces are spread over ranks by block, for distributed checkpoints.

The state of a parameter's blocks is saved under the parameter's name as a few tensors, of which
each rank holds the pieces of the blocks that it owns:

    exp_avg, exp_avg_sq, ...     in the shape of the parameter (its view, if dimensions are merged)
    factors, inverse_roots, ...  flat: block after block, in each dimension after dimension

`torch.distributed.checkpoint` knows the pieces by their offsets, never by rank, so that it saves
on any mesh and loads on any other, and `exp_avg` and `exp_avg_sq` are those of AdamW.
"""

import math
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

__all__ = ["CAP", "Piece", "ShardedBlocks"]

CAP = "max_preconditioner_dim"
"""Name of the entry whose shape tells the settings that the state was saved with: first this one,
then those of `state_layout.settings_marker`."""

Piece = tuple[tuple[int, ...], Tensor]
"""Offsets in the whole tensor, and the values there."""


class ShardedBlocks(torch.Tensor):
    """A tensor of which this rank holds some rectangles, as views of its stacks.

    It carries no data of its own and takes part in no computation; it implements what distributed
    checkpointing asks of a sharded tensor. Loading writes through to the stacks.
    """

    pieces: list[Piece]
    _at: dict[tuple[int, ...], Tensor]
    """The values by their offsets, made when first needed."""
    alone: bool
    """Whether one rank holds all pieces because no other shares the blocks."""

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        dtype: torch.dtype = torch.float32,
        alone: bool = False,
    ) -> "ShardedBlocks":
        self: ShardedBlocks = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu")
        )
        self.pieces = list(pieces)
        self._at = {}
        self.alone = alone
        return self

    def __init__(
        self,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        dtype: torch.dtype = torch.float32,
        alone: bool = False,
    ) -> None:
        pass

    def whole(self) -> Tensor:
        """A plain tensor of all pieces, for a rank that holds them all."""
        device = self.pieces[0][1].device
        result = torch.empty(self.shape, dtype=self.dtype, device=device)
        for offsets, values in self.pieces:
            result[_slices(offsets, values)].copy_(values)
        return result

    def check_pieces(self, saved: "ShardedBlocks", name: str) -> None:
        """Raise a ValueError if `saved`, of the same shape, lacks a piece that is here."""
        shapes = {offsets: values.shape for offsets, values in saved.pieces}
        for offsets, mine in self.pieces:
            if shapes.get(offsets) != mine.shape:
                raise ValueError(
                    f"{name} lacks the block at {offsets}, which this rank owns; to change the "
                    "mesh, save and load with torch.distributed.checkpoint."
                )

    def load(self, saved: Tensor) -> None:
        """Copy the pieces of `saved`, or the parts of a whole tensor, to the pieces here."""
        if isinstance(saved, ShardedBlocks):
            values = dict(saved.pieces)
            for offsets, mine in self.pieces:
                mine.copy_(values[offsets])
        else:
            for offsets, mine in self.pieces:
                mine.copy_(saved[_slices(offsets, mine)])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].shape, args[0].pieces, args[0].dtype)
        if func is torch.ops.aten.clone.default:
            copies = [(offsets, values.clone()) for offsets, values in args[0].pieces]
            return cls(args[0].shape, copies, args[0].dtype)
        if func is torch.ops.aten.new_empty.default:
            # Asynchronous saving makes an empty twin, then copies the attributes.
            return cls(args[1], [], args[0].dtype)
        raise NotImplementedError(
            f"{func} on the state of Shampoo, whose blocks are spread over the ranks; read it "
            "through torch.distributed.checkpoint, or `dcp_to_torch` for whole tensors"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "the state of Shampoo is spread over ranks by block; a rank that pickles its part "
            "would lose the others': save it with torch.distributed.checkpoint (whole tensors "
            "come out of `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`)"
        )

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=values.shape)
            for offsets, values in self.pieces
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if len(self._at) != len(self.pieces):  # searching a list would take the square of it
            self._at = dict(self.pieces)
        if index.offset is not None and tuple(index.offset) in self._at:
            return self._at[tuple(index.offset)]
        raise ValueError(f"no block of '{index.fqn}' at {index.offset} on this rank")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = sum(math.prod(values.shape) for _, values in self.pieces)
        return f"ShardedBlocks(shape={tuple(self.shape)}, pieces={len(self.pieces)}, held={held})"


def _slices(offsets: tuple[int, ...], values: Tensor) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))


def _reduce(blocks: ShardedBlocks) -> Any:
    return ShardedBlocks, (tuple(blocks.shape), blocks.pieces, blocks.dtype, blocks.alone)


# Asynchronous saving may hand a rank's own part to a process of its own, which loses nothing.
ForkingPickler.register(ShardedBlocks, _reduce)
