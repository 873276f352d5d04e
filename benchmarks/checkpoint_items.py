"""How many things a checkpoint consists of, for torch.distributed.checkpoint: counted from the plan
of a model on a mesh, without tensors."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.grid import make_grid
from shampoo_fsdp.plan.shards import ParameterSpec, shard_rectangle
from shampoo_fsdp.rules.kept import saved_entries
from shampoo_fsdp.runtime.choice import is_preconditioned

__all__ = ["Items", "count_items"]

_ADAMW_SETTINGS = 12
"""Keys that torch.optim.AdamW and a scheduler of lr keep in a parameter group."""
_OUR_SETTINGS = 6  # with the names of the group's parameters
_ADAMW_MOMENTS = 2
_ADAMW_COUNTERS = 1  # step
_OUR_COUNTERS = 3  # step, factor_step, refreshed


@dataclass
class Items:
    """Of the model and the optimizer, in a flat state dict as TorchTitan saves it."""

    pieces: int = 0
    """Pieces of sharded tensors that the ranks plan to write; replicas repeat each other's."""
    written_pieces: int = 0
    """What is left of them when each is written once."""
    numbers: int = 0
    """Steps and settings: every rank plans to write all, and each is written once."""
    keys: int = 0
    """Names in the checkpoint."""

    def _add(self, pieces: int, written: int) -> None:
        self.pieces += pieces
        self.written_pieces += written
        self.keys += 1

    def _add_numbers(self, number: int, ranks: int) -> None:
        self.numbers += number * ranks
        self.keys += number

    @property
    def planned(self) -> int:
        """All that the ranks send to the coordinator."""
        return self.pieces + self.numbers


def count_items(specs: Sequence[ParameterSpec], config: ShampooConfig | None) -> Items:
    """Count for Shampoo with these settings, or for AdamW (None).

    Args:
        specs: the parameters, sharded on a mesh of several ranks.
        config: blocks cut on whole parameters, each owned once (the defaults).
    """
    items = Items()
    shards: dict[object, tuple[int, int]] = {}
    chosen = [s for s in specs if config and is_preconditioned(s.name, s.shape, config)]
    names = {spec.name for spec in chosen}
    for spec in specs:
        layout = (spec.shape, spec.mesh_shape, spec.placements)
        if layout not in shards:
            shards[layout] = len(spec.ranks), len(_shards(spec))
        items._add(*shards[layout])  # the parameter
        if spec.name not in names:
            for _ in range(_ADAMW_MOMENTS):
                items._add(*shards[layout])
        settings = _OUR_SETTINGS if config else _ADAMW_SETTINGS
        counters = _OUR_COUNTERS if spec.name in names else _ADAMW_COUNTERS
        items._add_numbers(settings + counters, len(spec.ranks))
    for spec in chosen:
        assert config
        grid = make_grid(spec.shape, config)
        blocks = Counter(map(grid.block_shape, grid.coordinates()))
        kept = {shape: saved_entries(shape, config) for shape in blocks}
        for name in {name for entries in kept.values() for name in entries}:
            number = sum(n for shape, n in blocks.items() if name in kept[shape])
            items._add(number, number)
        items._add(1, 1)  # the marker of the settings
    return items


def _shards(spec: ParameterSpec) -> set[object]:
    """The different places of shards in a parameter; empty ones too, which are planned as well."""
    coordinates = itertools.product(*map(range, spec.mesh_shape))
    return {
        tuple(
            start for start, _ in shard_rectangle(spec.shape, spec.mesh_shape, spec.placements, c)
        )
        for c in coordinates
    }
