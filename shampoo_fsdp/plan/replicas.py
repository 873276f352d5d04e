"""Over which ranks blocks may be spread: all of the parameters', or those of one replica."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

from shampoo_fsdp.plan.shards import ParameterSpec

__all__ = ["replica_of_rank"]


def replica_of_rank(parameters: Sequence[ParameterSpec], rank: int) -> list[ParameterSpec]:
    """The parameters on the fewest ranks that include `rank` and hold each of them completely.

    The parameters must live on the same ranks; their meshes may differ.

    Raises:
        ValueError: names a parameter for which these ranks are no part of its mesh.
    """
    members = _replica(parameters, rank)
    layouts: dict[tuple[object, ...], ParameterSpec] = {}
    result = []
    for parameter in parameters:
        layout = (parameter.ranks, parameter.mesh_shape, parameter.placements)
        if layout not in layouts:
            layouts[layout] = _on(parameter, members)
        narrow = layouts[layout]
        result.append(
            dataclasses.replace(parameter, ranks=narrow.ranks, mesh_shape=narrow.mesh_shape)
        )
    return result


def _replica(parameters: Sequence[ParameterSpec], rank: int) -> set[int]:
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for ranks, mesh_shape, replicated in {
        (p.ranks, p.mesh_shape, tuple(x is None for x in p.placements)) for p in parameters
    }:
        holding_once: dict[tuple[int, ...], list[int]] = defaultdict(list)
        coordinates = itertools.product(*map(range, mesh_shape))
        for member, coordinate in zip(ranks, coordinates, strict=True):
            replica = tuple(itertools.compress(coordinate, replicated))
            holding_once[replica].append(member)
        for group in holding_once.values():
            for member in group:
                groups[member].append(group)
    found, new = {rank}, [rank]
    while new:
        for group in groups[new.pop()]:
            new += [member for member in group if member not in found]
            found.update(group)
    return found


def _on(parameter: ParameterSpec, members: set[int]) -> ParameterSpec:
    coordinates = itertools.product(*map(range, parameter.mesh_shape))
    kept = [
        (rank, coordinate)
        for rank, coordinate in zip(parameter.ranks, coordinates, strict=True)
        if rank in members
    ]
    mesh_shape = tuple(
        len({coordinate[d] for _, coordinate in kept}) for d in range(len(parameter.mesh_shape))
    )
    if math.prod(mesh_shape) != len(kept):
        raise ValueError(
            f"owner_scope = 'shard' is impossible: the ranks {sorted(members)}, which hold all "
            f"parameters once, are no part of the mesh {parameter.mesh_shape} of parameter "
            f"'{parameter.name}'; set owner_scope = 'all'."
        )
    return dataclasses.replace(
        parameter, ranks=tuple(rank for rank, _ in kept), mesh_shape=mesh_shape
    )
