"""Over which ranks blocks may be spread: all of the parameters', or those of one replica."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

from shampoo_fsdp.plan.shards import ParameterSpec, Placement


def replica_of_rank(parameters: Sequence[ParameterSpec], rank: int) -> list[ParameterSpec]:
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
