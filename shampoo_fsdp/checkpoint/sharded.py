"""State entries whose pieces are spread over ranks by block, for distributed checkpoints.

The state of a parameter's blocks is saved under the parameter's name as a few tensors, of which
each rank holds the pieces of the blocks that it owns:

    exp_avg, exp_avg_sq, ...     in the shape of the parameter (its view, if dimensions are merged)
    factors, inverse_roots, ...  flat: block after block, in each dimension after dimension

`torch.distributed.checkpoint` knows the pieces by their offsets, never by rank, so that it saves
on any mesh and loads on any other, and `exp_avg` and `exp_avg_sq` are those of AdamW.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._pytree import tree_map

from shampoo_fsdp.checkpoint.owned import OF_EACH_PIECE, OwnedBlocks, Reading, reduce_blocks
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.assignment import OwnedBlock
from shampoo_fsdp.plan.grid import BlockGrid
from shampoo_fsdp.rules.layout import MARKER, saved_entries, settings_marker

aten = torch.ops.aten

__all__ = ["local_parts"]

Pieces = Mapping[tuple[int, ...], Tensor]
"""Values by their offsets in the whole."""


def state_entries(
    grid: BlockGrid,
    owned: Sequence[tuple[OwnedBlock, Mapping[str, Tensor]]],
    config: ShampooConfig,
    device: torch.device,
    mesh: DeviceMesh | None,
    reading: Reading,
) -> dict[str, Tensor]:
    """The entries of a parameter: views of what its blocks have.

    An entry that this rank has in one piece is these values themselves, unless ranks share blocks.

    Args:
        owned: the blocks of the parameter that this rank owns, with the state of each by name.
        mesh: of the ranks that share the blocks; None for one rank.
        reading: is told when a checkpoint is read into them.
    """

    def blocks(shape: Sequence[int], pieces: Pieces, dtype: torch.dtype) -> Tensor:
        local = OwnedBlocks(shape, pieces, dtype, device, reading)
        return local if mesh is None else ShardedBlocks(local, mesh)

    marker = settings_marker(config, grid.fingerprint)
    empty = torch.empty(marker, dtype=torch.float32, device=device)
    holds_first = any(block.index == 0 for block, _ in owned)
    nothing = {(0,) * len(marker): empty} if holds_first else {}
    entries = {MARKER: blocks(marker, nothing, torch.float32)}

    owned = sorted(owned, key=lambda pair: pair[0].index)
    shapes = [grid.block_shape(coordinate) for coordinate in grid.coordinates()]
    kept = {shape: saved_entries(shape, config) for shape in dict.fromkeys(shapes)}
    types = {name: dtype for of_shape in kept.values() for name, (_, dtype) in of_shape.items()}
    for name, dtype in types.items():
        having = [(block, saved[name]) for block, saved in owned if name in saved]
        whole: Sequence[int]
        if kept[shapes[0]].get(name, ((), dtype))[0] == shapes[0]:
            pieces = {
                tuple(start for start, _ in block.rectangle): values.view(block.sizes)
                for block, values in having
            }
            whole = grid.view_shape
        else:
            size = {shape: math.prod(kept[shape].get(name, ((0,),))[0]) for shape in kept}
            starts = [0, *itertools.accumulate(size[shape] for shape in shapes)]
            pieces = {(starts[block.index],): values for block, values in having}
            whole = (starts[-1],)
        all_of_it = [values for values in pieces.values() if values.shape == torch.Size(whole)]
        if mesh is None and all_of_it:
            entries[name] = all_of_it[0]
        else:
            entries[name] = blocks(whole, pieces, dtype)
    return entries


def local_parts(entry: Tensor) -> list[Tensor]:
    """The memory that this rank has of an entry of the state."""
    entry = local_tensor(entry)
    return [*entry.pieces.values()] if isinstance(entry, OwnedBlocks) else [entry]


def local_tensor(entry: Tensor) -> Tensor:
    """What this rank has of an entry of the state, as one tensor."""
    return entry.to_local() if isinstance(entry, DTensor) else entry


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
        known = func in (*OF_EACH_PIECE, aten.new_empty.default, aten.copy_.default)
        if known and isinstance(args[0], ShardedBlocks):
            result = func(*local, **(kwargs or {}))
            return args[0] if result is local[0] else cls(result, args[0].device_mesh)
        raise NotImplementedError(
            f"{func} on the state of Shampoo, whose blocks are spread over the ranks: call "
            "full_tensor() on all of them for a plain tensor of the whole"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedBlocks":
        return self.clone()  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._local_tensor.__reduce_ex__(protocol)


ForkingPickler.register(ShardedBlocks, lambda blocks: reduce_blocks(blocks.to_local()))
