"""The state of a parameter's blocks as entries of a state dict."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shampoo_fsdp.checkpoint.owned import OwnedBlocks, Piece, Reading
from shampoo_fsdp.checkpoint.sharded import ShardedBlocks, local_tensor, state_tensor
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.grid import BlockGrid
from shampoo_fsdp.plan.transfers import OwnedBlock
from shampoo_fsdp.rules.layout import MARKER, saved_entries, settings_marker

__all__ = ["state_entries"]

Owned = Sequence[tuple[OwnedBlock, Mapping[str, Tensor]]]
"""The blocks of a parameter that a rank owns, with the state of each by name."""


def state_entries(
    grid: BlockGrid,
    owned: Owned,
    config: ShampooConfig,
    device: torch.device,
    mesh: DeviceMesh | None,
    reading: Reading,
) -> dict[str, Tensor]:
    """The entries of a parameter: views of what its blocks have.

    Entries in the shape of a block (momenta, second moments) are tensors in the shape of the
    parameter's view; rows of matrices lie one after the other, in the order of the grid.

    Args:
        mesh: of the ranks that share the blocks; None for one rank.
        reading: is told when a checkpoint is read into them.
    """
    owned = sorted(owned, key=lambda pair: pair[0].index)
    marker = settings_marker(config, grid.fingerprint)
    empty = torch.empty(marker, dtype=torch.float32, device=device)
    holds_first = any(block.index == 0 for block, _ in owned)
    nothing: list[Piece] = [((0,) * len(marker), empty)] if holds_first else []
    marked = OwnedBlocks(marker, nothing, torch.float32, device)
    entries: dict[str, Tensor] = {MARKER: marked if mesh is None else ShardedBlocks(marked, mesh)}

    shapes = [grid.block_shape(coordinate) for coordinate in grid.coordinates()]
    kept = {shape: saved_entries(shape, config) for shape in dict.fromkeys(shapes)}
    types = {name: dtype for of_shape in kept.values() for name, (_, dtype) in of_shape.items()}
    for name, dtype in types.items():
        having = [(block, saved[name]) for block, saved in owned if name in saved]
        whole: Sequence[int]
        if kept[shapes[0]].get(name, ((), dtype))[0] == shapes[0]:
            pieces = [_rectangle(block, values) for block, values in having]
            whole = grid.view_shape
        else:
            size = {shape: math.prod(kept[shape].get(name, ((0,),))[0]) for shape in kept}
            starts = [0, *itertools.accumulate(size[shape] for shape in shapes)]
            pieces = [((starts[block.index],), values) for block, values in having]
            whole = (starts[-1],)
        entries[name] = state_tensor(whole, pieces, dtype, device, mesh)
    for entry in entries.values():
        if isinstance(local := local_tensor(entry), OwnedBlocks):
            local.reading = reading
    return entries


def _rectangle(block: OwnedBlock, values: Tensor) -> Piece:
    offsets = tuple(start for start, _ in block.rectangle)
    return offsets, values.view(tuple(stop - start for start, stop in block.rectangle))
