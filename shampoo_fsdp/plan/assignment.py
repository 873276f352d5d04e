"""All blocks of parameters that live on the same ranks, and their owners."""

import hashlib
import re
import zlib
from collections.abc import Sequence

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.owners import Costs, choose_owners
from shampoo_fsdp.plan.replicas import replica_of_rank
from shampoo_fsdp.plan.shards import ParameterSpec, ShardMap, Site, shard_maps

__all__ = ["Assignment"]


class Assignment:
    """Who owns which block; the same on every rank of the parameters.

    Blocks are numbered in the order of parameters and grids.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterSpec],
        config: ShampooConfig,
        costs: Costs,
        rank: int,
    ) -> None:
        """
        Args:
            parameters: they live on the same ranks; their meshes may differ.
            costs: of each shape of block.
            rank: with `owner_scope = "shard"`, one that the blocks are for.

        Raises:
            ValueError: names the parameter whose placement is not supported.
        """
        if config.owner_scope == "shard":
            parameters = replica_of_rank(parameters, rank)
        self.parameters = parameters
        self.config = config
        self.costs = costs
        self.ranks = tuple(sorted(parameters[0].ranks))
        """The ranks that share the blocks, ascending."""
        self.maps: list[ShardMap] = shard_maps(parameters, config)
        """Of each parameter."""
        self.sites: list[Site] = []
        self.phases: list[int] = []
        """Of each block, as are the owners, positions among the ranks."""
        self.first: list[int] = []
        """Number of each parameter's first block."""
        for parameter, shard_map in zip(parameters, self.maps, strict=True):
            self.first.append(len(self.sites))
            self.sites += shard_map.sites
            self.phases += _phases(parameter.name, len(shard_map.grid), config)
        self.owners = choose_owners(self.sites, self.phases, self.ranks, config, costs)
        facts = repr((parameters, config, self.owners))
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        """Equal on two ranks if and only if they planned the same."""


def _phases(name: str, blocks: int, config: ShampooConfig) -> Sequence[int]:
    if config.refresh_schedule == "together":
        return [0] * blocks
    frequency = config.precondition_frequency
    phase = refresh_phase(name, 0, blocks, frequency)
    return [(phase + index) % frequency for index in range(blocks)]


def refresh_phase(name: str, index: int, blocks: int, frequency: int) -> int:
    """The phase of a block: its roots are refreshed when (step + phase) % period == 0,
    the period being `frequency` once `refresh_warmup_steps` are over.

    It follows from the block's identity alone, so that it is the same on every mesh and with any
    set of other parameters. Blocks of like parameters (those whose names differ in numbers only:
    layers.0.w, layers.1.w, ...) take consecutive phases, so that a period's steps share them
    evenly; different kinds of parameters start at different phases.

    Args:
        name: the parameter's full name.
        index: the block's row-major position in the parameter's grid.
        blocks: number of blocks in that grid.
        frequency: steps of a period.
    """
    kind = re.sub(r"\d+", "#", name)
    number = sum(map(int, re.findall(r"\d+", name)))
    return (zlib.crc32(kind.encode()) + number * blocks + index) % frequency
