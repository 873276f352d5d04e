"""A tensor of which a rank holds some rectangles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from torch.utils._pytree import tree_map

OF_EACH_PIECE = (
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.zero_.default,
)
"""Operators that are applied to each piece by itself."""


@dataclass
class Reading:
    """Whether a checkpoint is read into the state of an optimizer, and has not been loaded."""

    counts: Sequence[Callable[[int], bool]] = ()
    """Each adds to the number of ranks, of some, where it has begun, and says whether it has on all
    of these."""
    _begun: bool = False

    def set(self, begun: bool) -> None:
        """This rank plans to read, or what was read has been loaded."""
        if begun != self._begun:
            self._begun = begun
            self._count(1 if begun else -1)

    def is_open(self) -> bool:
        """Whether values may have come, here or on another rank; all ranks find the same."""
        if self._begun and not self._count(0):
            self.set(False)  # no rank reads before all have planned to
        return self._begun

    def check(self) -> None:
        """Raise a RuntimeError, on all ranks alike, if the state may be of two checkpoints."""
        if self.is_open():
            raise RuntimeError(
                "a checkpoint was read into the state of this optimizer, or a part of it: call "
                "load_state_dict() with what was read, as set_optimizer_state_dict() does; if "
                "reading failed load another checkpoint, or build the optimizer again."
            )

    def _count(self, change: int) -> bool:
        return all([count(change) for count in self.counts])


class OwnedBlocks(torch.Tensor):
    """A tensor of which this rank holds some rectangles, as views of its stacks.

    It carries no data of its own. It takes part in computations as a plain copy, which has zeros
    where another rank holds the values; operations in place write back what is here, but views are
    copies. It implements what distributed checkpointing asks of a sharded tensor; loading writes
    through to the stacks.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    pieces: dict[tuple[int, ...], Tensor]
    """The values by their offsets in the whole."""
    unread: set[tuple[int, ...]]
    """While a checkpoint is read into it: the pieces of which nothing has come. (PyTorch's planner
    does not ask whether the checkpoint has them.)"""
    reading: Reading
    """Is told when that begins; copies have that of the optimizer as well."""

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        pieces: Mapping[tuple[int, ...], Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        reading: Reading | None = None,
    ) -> "OwnedBlocks":
        self: OwnedBlocks = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device(device)
        )
        self.pieces, self.unread, self.reading = dict(pieces), set(), reading or Reading()
        return self

    def __init__(self, *_: Any) -> None:
        pass

    @property
    def complete(self) -> bool:
        """Whether all of it is here."""
        return sum(values.numel() for values in self.pieces.values()) == self.numel()

    def whole(self) -> Tensor:
        """A plain tensor of all pieces, zero where there is none."""
        make = torch.empty if self.complete else torch.zeros
        result = make(self.shape, dtype=self.dtype, device=self.device)
        for offsets, values in self.pieces.items():
            result[_slices(offsets, values)].copy_(values)
        return result

    def has_pieces_of(self, other: "OwnedBlocks") -> bool:
        """Whether each piece of the other, which has the same shape, is here."""
        shapes = {offsets: values.shape for offsets, values in self.pieces.items()}
        return all(shapes.get(offsets) == v.shape for offsets, v in other.pieces.items())

    def check_read(self, name: str) -> None:
        """Raise a ValueError if a checkpoint was read into the pieces and did not fill them."""
        if self.unread and self.reading.is_open():
            raise ValueError(
                f"{name} was not read completely: the checkpoint lacks the block at "
                f"{min(self.unread)}, one of {len(self.unread)}. Save on all ranks, not no_dist, "
                "or with StateDictOptions(full_state_dict=True); here load another checkpoint."
            )

    def load(self, saved: Tensor) -> None:
        """Copy the pieces of `saved`, or the parts of a whole tensor, to the pieces here.

        Raises:
            ValueError: for another shape, on each rank that is given it, or if pieces are missing.
        """
        if saved.shape != self.shape:
            raise ValueError(
                f"state of shape {tuple(saved.shape)} does not fit {tuple(self.shape)}: it was "
                "saved with other settings (preconditioner, max_preconditioner_dim, ...), or of "
                "another model. The state here may be overwritten in part: build the optimizer "
                "again with the settings of then."
            )
        same = isinstance(saved, OwnedBlocks) and saved.has_pieces_of(self)
        if isinstance(saved, OwnedBlocks) and not same:
            if not saved.complete:
                raise ValueError("what is copied lacks blocks that belong here; use full_tensor().")
            saved = saved.whole()
        for offsets, mine in self.pieces.items():
            mine.copy_(saved.pieces[offsets] if same else saved[_slices(offsets, mine)])  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in OF_EACH_PIECE:
            self = args[0]
            pieces = {at: func(piece, *args[1:], **kwargs) for at, piece in self.pieces.items()}
            if func._schema.is_mutable:
                return self
            # Not from the pieces: there may be none.
            dtype = kwargs.get("dtype") or self.dtype
            device = torch.device(kwargs.get("device") or self.device)
            return cls(self.shape, pieces, dtype, device, self.reading)
        if func is torch.ops.aten.new_empty.default:
            # Asynchronous saving makes an empty twin, then copies the attributes.
            return cls(args[1], {}, args[0].dtype, kwargs.get("device") or args[0].device)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], OwnedBlocks):
            args[0].load(args[1])
            return args[0]
        copies: dict[int, tuple[OwnedBlocks, Tensor]] = {}

        def whole(value: Any) -> Any:
            if not isinstance(value, OwnedBlocks):
                return value
            return copies.setdefault(id(value), (value, value.whole()))[1]

        result = func(*tree_map(whole, args), **tree_map(whole, kwargs))
        if func._schema.is_mutable:
            for blocks, copied in copies.values():
                blocks.load(copied)
                if result is copied:
                    return blocks
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnedBlocks":
        return self.clone()  # type: ignore[return-value]

    def __setitem__(self, index: Any, value: Any) -> None:  # views are copies
        whole = self.whole()
        whole[index] = value
        self.load(whole)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.reading.check()
        if self.complete:
            return self.whole().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        raise TypeError(
            "the state of Shampoo is spread over ranks by block: call "
            "optimizer.consolidate_state_dict() on all ranks before rank 0 saves its state_dict(), "
            "or save with torch.distributed.checkpoint."
        )

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        self.reading.check()
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        # Only for reading.
        self.unread = {at for at, values in self.pieces.items() if values.numel()}
        self.reading.set(True)
        return self._chunks()

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=values.shape)
            for offsets, values in self.pieces.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        offsets = tuple(index.offset or ())
        self.unread.discard(offsets)
        return self.pieces[offsets]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.complete:
            return repr(self.whole())
        held = sum(values.numel() for values in self.pieces.values())
        return f"OwnedBlocks(shape={tuple(self.shape)}, pieces={len(self.pieces)}, held={held})"


def _slices(offsets: tuple[int, ...], values: Tensor) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))


def reduce_blocks(blocks: OwnedBlocks) -> Any:
    """What a process of its own is handed, which may save a rank's part: it loses nothing."""
    return OwnedBlocks, (tuple(blocks.shape), blocks.pieces, blocks.dtype, str(blocks.device))


ForkingPickler.register(OwnedBlocks, reduce_blocks)
