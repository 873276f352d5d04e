"""The parameters that live on the same ranks: their plan, the blocks this rank owns, exchange."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_fsdp.agreement import agree
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.exchange import Exchange
from shampoo_fsdp.parameters import (
    Replicas,
    describe,
    is_preconditioned,
    local_shard,
    process_group,
)
from shampoo_fsdp.planner import ParameterSpec, make_plan
from shampoo_fsdp.stack import BlockStack
from shampoo_fsdp.state import CAP, Piece, ShardedBlocks

__all__ = ["Team", "balance", "make_teams"]


def make_teams(
    names: Sequence[str],
    parameters: Sequence[Tensor],
    param_groups: Sequence[int],
    replicas: Replicas,
    config: ShampooConfig,
) -> tuple[list["Team"], list[int]]:
    """The teams of the preconditioned parameters, and the numbers of the other parameters.

    All ranks that parameters live on compare what they were given first.

    Args:
        names, parameters, param_groups: of each parameter, and the number of its group.
        replicas: where plain tensors are replicated.

    Raises:
        ValueError: on every rank, if ranks disagree or a parameter cannot be planned.
    """
    specs = [describe(n, p, replicas) for n, p in zip(names, parameters, strict=True)]
    living_on: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, spec in enumerate(specs):
        living_on[tuple(sorted(spec.ranks))].append(i)
    teams, others = [], []
    # The same order on every rank, so that overlapping sets of ranks cannot wait in a circle.
    for ranks, living in sorted(living_on.items()):
        group = process_group(ranks, [parameters[i] for i in living], replicas)
        settings = dataclasses.asdict(config).items()
        facts: dict[str, Sequence[object]] = {
            "the parameters that are trained": [names[i] for i in living],
            "their shapes": [(names[i], specs[i].shape) for i in living],
            "their placements": [
                (names[i], specs[i].mesh_shape, specs[i].placements) for i in living
            ],
            "the settings": [f"{name} = {value}" for name, value in settings],
        }
        agree(group, ranks, None, facts)
        chosen = [i for i in living if is_preconditioned(names[i], specs[i].shape, config)]
        others += [i for i in living if not is_preconditioned(names[i], specs[i].shape, config)]
        if chosen:
            teams.append(
                Team(
                    chosen,
                    [specs[i] for i in chosen],
                    [parameters[i] for i in chosen],
                    [param_groups[i] for i in chosen],
                    group,
                    replicas,
                    config,
                )
            )
    return teams, sorted(others)


class Team:
    """Preconditioned parameters whose meshes consist of the same ranks.

    Parameters are numbered here by their position in `indices`, which are their numbers in the
    optimizer.
    """

    def __init__(
        self,
        indices: Sequence[int],
        specs: Sequence[ParameterSpec],
        parameters: Sequence[Tensor],
        param_groups: Sequence[int],
        group: dist.ProcessGroup | None,
        replicas: Replicas,
        config: ShampooConfig,
    ) -> None:
        """
        Args:
            indices: numbers of the parameters in the optimizer.
            specs, parameters: what the planner knows of them, and the parameters.
            param_groups: number of the parameter group of each.
            group: of all ranks that the parameters live on.

        Raises:
            ValueError: on every rank, if any of them cannot take part or planned otherwise.
        """
        device = parameters[0].device
        ranks = tuple(sorted(specs[0].ranks))
        problem = None
        try:
            rank = dist.get_rank() if len(ranks) > 1 else ranks[0]
            self.plan = make_plan(specs, config, rank)
            self._check_shards(specs, parameters)
        except Exception as error:
            problem = str(error) or repr(error)
        agree(group, ranks, problem, {})
        # The ranks that share blocks may be fewer: those of a replica (see owner_scope).
        if self.plan.ranks != ranks:
            group = process_group(self.plan.ranks, parameters, replicas)
        agree(group, self.plan.ranks, None, {"the plan of blocks": [self.plan.fingerprint]})
        self.indices = tuple(indices)
        self.config = config
        by_shape = defaultdict(list)
        for number, block in enumerate(self.plan.blocks):
            by_shape[param_groups[block.parameter], block.shape].append((number, block))
        self.stacks = [
            BlockStack(blocks, param_group, config, device)
            for (param_group, _), blocks in sorted(by_shape.items())
        ]
        self._home = {
            number: (stack, position)
            for stack in self.stacks
            for number, position in stack.positions.items()
        }
        gradients = [
            self._of_block(number, self._home[number][0].gradient)
            for number in range(len(self.plan.blocks))
        ]
        dtype = getattr(torch, config.communication_dtype)
        self.exchange = Exchange(self.plan, gradients, group, dtype, device)

    def in_view(self, parameter: int, shard: Tensor) -> Tensor:
        """A parameter's shard in the shape of its view, sharing its memory."""
        return shard.view(self.plan.shard_shapes[parameter])

    def state_entries(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """For each parameter its number in the optimizer and the state of its blocks."""
        owned: dict[int, list[int]] = defaultdict(list)
        for number, block in enumerate(self.plan.blocks):
            owned[block.parameter].append(number)
        for parameter, index in enumerate(self.indices):
            yield index, self._entries(parameter, owned[parameter])

    def _entries(self, parameter: int, owned: Sequence[int]) -> dict[str, Tensor]:
        grid = self.plan.grids[parameter]
        moments: dict[str, list[Piece]] = {"exp_avg": [], "exp_avg_sq": []}
        for number in owned:
            offsets = tuple(start for start, _ in self.plan.blocks[number].rectangle)
            stack, _ = self._home[number]
            moments["exp_avg"].append((offsets, self._of_block(number, stack.exp_avg)))
            second = self._of_block(number, stack.grafting.exp_avg_sq)
            moments["exp_avg_sq"].append((offsets, second))
        # A tensor without elements, whose shape tells the setting: a checkpoint that was saved
        # with another one is refused in its name before anything is read.
        cap = (self.config.max_preconditioner_dim, 0)
        first = [((0, 0), torch.empty(cap))] if any(self._index(n) == 0 for n in owned) else []
        entries: dict[str, Tensor] = {CAP: self._sharded(cap, first)}
        entries |= {name: self._sharded(grid.view_shape, p) for name, p in moments.items()}

        shapes = [grid.block_shape(coordinate) for coordinate in grid.coordinates()]
        for i in range(len(shapes[0])):
            sizes = [shape[i] ** 2 for shape in shapes]
            starts = [0, *itertools.accumulate(sizes)]
            for name in ("factor", "inverse_root"):
                pieces = [
                    ((starts[self._index(n)],), self._matrices(n, name, i).view(-1)) for n in owned
                ]
                entries[f"{name}_{i}"] = self._sharded((starts[-1],), pieces)
        return entries

    def _sharded(self, shape: Sequence[int], pieces: Sequence[Piece]) -> ShardedBlocks:
        return ShardedBlocks(shape, pieces, alone=len(self.plan.ranks) == 1)

    def _index(self, number: int) -> int:
        return self.plan.blocks[number].index

    def _matrices(self, number: int, name: str, i: int) -> Tensor:
        stack, position = self._home[number]
        preconditioner = stack.preconditioner
        matrices = preconditioner.factors if name == "factor" else preconditioner.inverse_roots
        return matrices[i][position]

    def _of_block(self, number: int, stacked: Tensor) -> Tensor:
        """A block's part of a stacked tensor, in the shape of its rectangle."""
        _, position = self._home[number]
        rectangle = self.plan.blocks[number].rectangle
        return stacked[position].view(tuple(stop - start for start, stop in rectangle))

    def _check_shards(self, specs: Sequence[ParameterSpec], parameters: Sequence[Tensor]) -> None:
        for spec, parameter, shape in zip(specs, parameters, self.plan.shard_shapes, strict=True):
            shard = local_shard(parameter).detach()
            if shard.numel() != math.prod(shape):
                raise ValueError(
                    f"parameter '{spec.name}' has a shard of {tuple(shard.shape)} here, but its "
                    f"placements {spec.placements} on a mesh of {spec.mesh_shape} say {shape}."
                )
            try:
                shard.view(shape)
            except RuntimeError:
                raise ValueError(
                    f"parameter '{spec.name}' of {tuple(shard.shape)} has strides "
                    f"{shard.stride()}, so that it cannot be updated as {shape}; use the default "
                    "memory format or exclude it."
                ) from None


def balance(teams: Sequence[Team]) -> dict[str, float]:
    """Load, state and traffic of the ranks that share blocks with this one."""
    load: dict[int, float] = defaultdict(float)
    state: dict[int, int] = defaultdict(int)
    sent: dict[int, int] = defaultdict(int)
    blocks = 0
    for team in teams:
        plan = team.plan
        width = getattr(torch, team.config.communication_dtype).itemsize
        blocks += sum(len(grid) for grid in plan.grids)
        for i, rank in enumerate(plan.ranks):
            load[rank] += plan.load[i]
            state[rank] += plan.state_elements[i] * torch.float32.itemsize
            sent[rank] += plan.elements_sent[i] * width
    ranks = max(len(load), 1)
    mean_load = sum(load.values()) / ranks
    return {
        "blocks": blocks,
        "load_max_over_mean": max(load.values()) / mean_load if mean_load else 1.0,
        "state_mib_max": max(state.values(), default=0) / 2**20,
        "state_mib_mean": sum(state.values()) / ranks / 2**20,
        "mib_sent_per_step_max": max(sent.values(), default=0) / 2**20,
        "mib_sent_per_step_mean": sum(sent.values()) / ranks / 2**20,
    }
