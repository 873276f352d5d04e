"""State entries whose pieces are spread over ranks by block, for distributed checkpoints.

The state of a parameter's blocks is saved under the parameter's name as a few tensors, of which
each rank holds the pieces of the blocks that it owns:

    exp_avg, exp_avg_sq, ...     in the shape of the parameter (its view, if dimensions are merged)
    factors, inverse_roots, ...  flat: block after block, in each dimension after dimension

`torch.distributed.checkpoint` knows the pieces by their offsets, never by rank, so that it saves
on any mesh and loads on any other, and `exp_avg` and `exp_avg_sq` are those of AdamW.
"""

import math
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._pytree import tree_map

__all__ = ["CAP", "OwnedBlocks", "Piece", "ShardedBlocks", "local_parts", "state_tensor"]

CAP = "max_preconditioner_dim"
"""Name of the entry whose shape tells the settings that the state was saved with: first this one,
then those of `state_layout.settings_marker`."""

Piece = tuple[tuple[int, ...], Tensor]
"""Offsets in the whole tensor, and the values there."""

_OF_EACH_PIECE = (
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.zero_.default,
)


def state_tensor(
    shape: Sequence[int],
    pieces: Sequence[Piece],
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> Tensor:
    """An entry of the state: the values themselves where this rank has them in one piece, else a
    tensor that stands for its pieces.

    Args:
        shape: of the whole.
        pieces: the ones of this rank.
        mesh: of the ranks that share the pieces; None for one rank.
    """
    if mesh is not None:
        return ShardedBlocks(OwnedBlocks(shape, pieces, dtype, device), mesh)
    if len(pieces) == 1 and pieces[0][1].shape == torch.Size(shape):
        return pieces[0][1]
    return OwnedBlocks(shape, pieces, dtype, device)


def local_parts(entry: Tensor) -> list[Tensor]:
    """The memory that this rank has of an entry of the state."""
    if isinstance(entry, DTensor):
        entry = entry.to_local()
    return [part for _, part in entry.pieces] if isinstance(entry, OwnedBlocks) else [entry]


class OwnedBlocks(torch.Tensor):
    """A tensor of which this rank holds some rectangles, as views of its stacks.

    It carries no data of its own. It takes part in computations as a plain copy, which has zeros
    where another rank holds the values; operations in place write back what is here, but views are
    copies. It implements what distributed checkpointing asks of a sharded tensor; loading writes
    through to the stacks.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    pieces: list[Piece]
    _at: dict[tuple[int, ...], Tensor]
    """The values by their offsets, made when first needed."""
    _to_read: set[tuple[int, ...]]
    """Offsets of the pieces for which a checkpoint is being read, and of which nothing has come."""
    _reading: bool

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "OwnedBlocks":
        self: OwnedBlocks = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device(device)
        )
        self.pieces = list(pieces)
        self._at = {}
        self._to_read = set()
        self._reading = False
        return self

    def __init__(
        self,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        pass

    @property
    def complete(self) -> bool:
        """Whether all of it is here."""
        return sum(values.numel() for _, values in self.pieces) == self.numel()

    def whole(self) -> Tensor:
        """A plain tensor of all pieces, zero where there is none."""
        make = torch.empty if self.complete else torch.zeros
        result = make(self.shape, dtype=self.dtype, device=self.device)
        for offsets, values in self.pieces:
            result[_slices(offsets, values)].copy_(values)
        return result

    def has_pieces_of(self, other: "OwnedBlocks") -> bool:
        """Whether each piece of the other, which has the same shape, is here."""
        shapes = {offsets: values.shape for offsets, values in self.pieces}
        return all(shapes.get(offsets) == values.shape for offsets, values in other.pieces)

    def check_read(self, name: str) -> None:
        """Raise a ValueError if a checkpoint was read into the pieces and did not fill them."""
        missing = set(self._to_read)
        if self._reading:
            missing |= {at for at, values in self.pieces if bool(values.isnan().any())}
        self._reading, self._to_read = False, set()
        if missing:
            raise ValueError(
                f"{name} was not read completely: the checkpoint lacks all or a part of the block "
                f"at {min(missing)}"
                + (f" and of {len(missing) - 1} more" if len(missing) > 1 else "")
                + ". Was it saved by one of several ranks alone (no_dist)? Save on all ranks, or "
                "with StateDictOptions(full_state_dict=True). The state here is unusable now: load "
                "another checkpoint."
            )

    def forget_reading(self) -> None:
        """A checkpoint of which nothing has come was not read, but refused or unreadable."""
        if len(self._to_read) == sum(values.numel() > 0 for _, values in self.pieces):
            self._reading, self._to_read = False, set()

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
        if isinstance(saved, OwnedBlocks) and not saved.has_pieces_of(self):
            if not saved.complete:
                raise ValueError("what is copied lacks blocks that belong here; use full_tensor().")
            saved = saved.whole()
        if isinstance(saved, OwnedBlocks):
            theirs = dict(saved.pieces)
            for offsets, mine in self.pieces:
                mine.copy_(theirs[offsets])
        else:
            for offsets, mine in self.pieces:
                mine.copy_(saved[_slices(offsets, mine)])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "OwnedBlocks":
        pieces = [(offsets, function(values)) for offsets, values in self.pieces]
        like = function(torch.empty(0, dtype=self.dtype, device=self.device))
        return OwnedBlocks(self.shape, pieces, like.dtype, like.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_EACH_PIECE:
            mapped = args[0]._map(lambda values: func(values, *args[1:], **kwargs))
            return args[0] if func._schema.is_mutable else mapped
        if func is torch.ops.aten.new_empty.default:
            # Asynchronous saving makes an empty twin, then copies the attributes.
            return cls(args[1], [], args[0].dtype, kwargs.get("device") or args[0].device)
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

    def __setitem__(self, index: Any, value: Any) -> None:
        whole = self.whole()
        whole[index] = value
        self.load(whole)

    def tolist(self) -> list[Any]:
        """As Tensor.tolist()."""
        return self.whole().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As Tensor.numpy(), but a copy."""
        return self.whole().numpy(force=force)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.complete:
            return self.whole().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        raise TypeError(
            "the state of Shampoo is spread over ranks by block; a rank that pickles its part "
            "would lose the others': save it with torch.distributed.checkpoint, or take whole "
            "tensors: get_optimizer_state_dict(model, optimizer, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
        )

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        self._reading, self._to_read = False, set()
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
        # Only for reading. The default planner does not ask whether a checkpoint has all of it.
        self._reading = True
        self._to_read = {offsets for offsets, values in self.pieces if values.numel()}
        return self._chunks()

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=values.shape)
            for offsets, values in self.pieces
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        if len(self._at) != len(self.pieces):  # searching a list would take the square of it
            self._at = dict(self.pieces)
        offsets = tuple(index.offset or ())
        if offsets not in self._at:
            raise ValueError(f"no block of '{index.fqn}' at {index.offset} on this rank")
        if offsets in self._to_read:
            # What is not read stays NaN, which no state is: see `check_read`.
            self._to_read.discard(offsets)
            self._at[offsets].fill_(torch.nan)
        return self._at[offsets]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.complete:
            return repr(self.whole())
        held = sum(math.prod(values.shape) for _, values in self.pieces)
        return f"OwnedBlocks(shape={tuple(self.shape)}, pieces={len(self.pieces)}, held={held})"


class ShardedBlocks(DTensor):
    """A tensor whose rectangles are spread over the ranks of a mesh, in any way.

    Its local part is :class:`OwnedBlocks`. A DTensor, as that is what PyTorch gathers for full
    state dicts and spreads again; its placement says Replicate, for want of a better one, since the
    local part has the shape of the whole.
    """

    _local_tensor: OwnedBlocks

    @staticmethod
    def __new__(cls, local: OwnedBlocks, mesh: DeviceMesh) -> "ShardedBlocks":
        meta = TensorMeta(local.shape, tuple(local.stride()), local.dtype)
        spec = DTensorSpec(mesh, (Replicate(),), meta)
        self: ShardedBlocks = torch.Tensor._dtensor__new__(cls, local, spec, requires_grad=False)
        return self

    def __init__(self, local: OwnedBlocks, mesh: DeviceMesh) -> None:
        pass

    def to_local(self, **_: Any) -> OwnedBlocks:
        """The pieces of this rank."""
        return self._local_tensor

    @torch.no_grad()
    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        **_: Any,
    ) -> DTensor:
        """The whole, from the pieces of all ranks of the mesh, each of which must call it."""
        whole = self._local_tensor.whole()
        if whole.numel():
            # As bytes: each is zero on all ranks but one, so that the sum is exact, -0.0 included.
            dist.all_reduce(whole.view(-1).view(torch.uint8), group=self.device_mesh.get_group())
        result = DTensor.from_local(whole, self.device_mesh, [Replicate()], run_check=False)
        if placements is None or all(isinstance(p, Replicate) for p in placements):
            return result
        return result.redistribute(device_mesh, placements)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        local = tree_map(lambda x: x.to_local() if isinstance(x, ShardedBlocks) else x, args)
        if func in (*_OF_EACH_PIECE, torch.ops.aten.new_empty.default):
            result = func(*local, **(kwargs or {}))
            return args[0] if result is local[0] else cls(result, args[0].device_mesh)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], ShardedBlocks):
            local[0].copy_(local[1])
            return args[0]
        raise NotImplementedError(
            f"{func} on the state of Shampoo, whose blocks are spread over the ranks: call "
            "full_tensor() on all of them for a plain tensor of the whole"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedBlocks":
        return self.clone()  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._local_tensor.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = sum(math.prod(values.shape) for _, values in self._local_tensor.pieces)
        return f"ShardedBlocks(shape={tuple(self.shape)}, held={held}, mesh={self.device_mesh})"


def _slices(offsets: tuple[int, ...], values: Tensor) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))


def _reduce(blocks: OwnedBlocks | ShardedBlocks) -> Any:
    local = blocks.to_local() if isinstance(blocks, ShardedBlocks) else blocks
    return OwnedBlocks, (tuple(local.shape), local.pieces, local.dtype, str(local.device))


# Asynchronous saving may hand a rank's own part to a process of its own, which loses nothing.
ForkingPickler.register(OwnedBlocks, _reduce)
ForkingPickler.register(ShardedBlocks, _reduce)
