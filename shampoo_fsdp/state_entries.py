"""The state of a parameter's blocks as entries of a state dict."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shampoo_fsdp.bucket import Bucket
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.planner import Plan
from shampoo_fsdp.state import CAP, Piece, state_tensor
from shampoo_fsdp.state_layout import saved_entries, settings_marker

__all__ = ["state_entries"]


def state_entries(
    plan: Plan, buckets: Sequence[Bucket], config: ShampooConfig, mesh: DeviceMesh | None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """For each parameter of a plan its index there, and its entries: views of the stacks.

    Entries in the shape of a block (momenta, second moments) are tensors in the shape of the
    parameter's view; rows of matrices lie one after the other, in the order of the grid.
    """
    owned: dict[int, list[int]] = defaultdict(list)
    for number, block in enumerate(plan.blocks):
        owned[block.parameter].append(number)
    for bucket in buckets:
        for parameter in bucket.chosen:
            yield parameter, _entries(plan, bucket, config, mesh, parameter, owned[parameter])


def _entries(
    plan: Plan,
    bucket: Bucket,
    config: ShampooConfig,
    mesh: DeviceMesh | None,
    parameter: int,
    owned: Sequence[int],
) -> dict[str, Tensor]:
    grid = plan.grids[parameter]
    device = bucket.parameters[parameter].device
    shape = settings_marker(config, grid.fingerprint)
    holds_first = any(plan.blocks[n].index == 0 for n in owned)
    empty = torch.empty(shape, dtype=torch.float32, device=device)
    marker: list[Piece] = [((0,) * len(shape), empty)] if holds_first else []
    entries = {CAP: state_tensor(shape, marker, torch.float32, device, mesh)}

    shapes = [grid.block_shape(coordinate) for coordinate in grid.coordinates()]
    kept = {shape: saved_entries(shape, config) for shape in dict.fromkeys(shapes)}
    types = {name: dtype for of_shape in kept.values() for name, (_, dtype) in of_shape.items()}
    for name, dtype in types.items():
        stacked = [(n, *bucket.home[n]) for n in owned if name in bucket.home[n][0].saved]
        pieces: list[Piece]
        if kept[shapes[0]].get(name, ((), dtype))[0] == shapes[0]:
            pieces = [
                (
                    tuple(start for start, _ in plan.blocks[n].rectangle),
                    bucket.of_block(n, stack.saved[name]),
                )
                for n, stack, _ in stacked
            ]
            whole: Sequence[int] = grid.view_shape
        else:
            size = {shape: math.prod(kept[shape].get(name, ((0,),))[0]) for shape in kept}
            starts = [0, *itertools.accumulate(size[shape] for shape in shapes)]
            pieces = [
                ((starts[plan.blocks[n].index],), stack.saved[name][position])
                for n, stack, position in stacked
            ]
            whole = (starts[-1],)
        entries[name] = state_tensor(whole, pieces, dtype, device, mesh)
    return entries
