"""All blocks of parameters that live on the same ranks, and their owners."""

import dataclasses
import hashlib
import itertools
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.owners import Costs, choose_owners
from shampoo_fsdp.plan.shards import ParameterSpec, Placement, ShardMap, Site, shard_maps

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
            parameters = _replica_of_rank(parameters, rank)
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


def _replica_of_rank(parameters: Sequence[ParameterSpec], rank: int) -> list[ParameterSpec]:
    """The parameters on the fewest ranks that include `rank` and hold each of them completely.

    The parameters must live on the same ranks; their meshes may differ.

    Raises:
        ValueError: names a parameter for which these ranks are no part of its mesh.
    """
    members, known = {rank}, set[int]()
    copies = [
        c
        for layout in {(p.ranks, p.mesh_shape, p.placements) for p in parameters}
        for c in _copies(*layout)
    ]
    while members != known:
        known = members
        members = members.union(*(copy for copy in copies if members & copy))
    layouts: dict[tuple[object, ...], dict[str, tuple[int, ...]]] = {}
    result = []
    for parameter in parameters:
        layout = parameter.ranks, parameter.mesh_shape
        if layout not in layouts:
            layouts[layout] = _narrowed(parameter, members)
        result.append(dataclasses.replace(parameter, **layouts[layout]))  # type: ignore[arg-type]
    return result


def _copies(
    ranks: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> list[set[int]]:
    """The sets of ranks that hold a parameter once."""
    copies: dict[tuple[int, ...], set[int]] = defaultdict(set)
    replicated = [placement is None for placement in placements]
    coordinates = itertools.product(*map(range, mesh_shape))
    for rank, coordinate in zip(ranks, coordinates, strict=True):
        copies[tuple(itertools.compress(coordinate, replicated))].add(rank)
    return list(copies.values())


def _narrowed(parameter: ParameterSpec, members: set[int]) -> dict[str, tuple[int, ...]]:
    """The ranks and the shape of the part of its mesh that these ranks are."""
    coordinates = itertools.product(*map(range, parameter.mesh_shape))
    kept = {r: c for r, c in zip(parameter.ranks, coordinates, strict=True) if r in members}
    mesh_shape = tuple(len(set(along)) for along in zip(*kept.values(), strict=True))
    if math.prod(mesh_shape) != len(kept):
        raise ValueError(
            f"owner_scope = 'shard' is impossible: the ranks {sorted(members)}, which hold all "
            f"parameters once, are no part of the mesh {parameter.mesh_shape} of parameter "
            f"'{parameter.name}'; set owner_scope = 'all'."
        )
    return {"ranks": tuple(kept), "mesh_shape": mesh_shape}
