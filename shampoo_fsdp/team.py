"""The parameters that live on the same ranks: their plan, the blocks this rank owns, exchange."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shampoo_fsdp.agreement import agree, gather
from shampoo_fsdp.blocks import factor_kinds
from shampoo_fsdp.bucket import Bucket
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.parameters import (
    Replicas,
    describe,
    is_preconditioned,
    local_shard,
    process_group,
)
from shampoo_fsdp.planner import ParameterSpec, make_plan
from shampoo_fsdp.roots import check_exponent
from shampoo_fsdp.state_entries import state_entries

__all__ = ["Residents", "Team", "balance", "make_teams", "refuse_nonfinite"]

_BUCKET_ELEMENTS = 32 * 2**20
"""A rank's share of the gradients of one bucket, where `buckets` is not set: 128 MiB in fp32."""


def make_teams(
    names: Sequence[str],
    parameters: Sequence[Tensor],
    param_groups: Sequence[int],
    replicas: Replicas,
    config: ShampooConfig,
) -> tuple[list["Team"], list[int], list["Residents"]]:
    """The teams of the preconditioned parameters, the numbers of the other parameters, and the sets
    of ranks with all parameters that live there.

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
    teams, others, residents = [], [], []
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
        residents.append(Residents(group, ranks, living))
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
    return teams, sorted(others), residents


@dataclass(frozen=True)
class Residents:
    """The parameters, by their numbers in the optimizer, that live on a set of ranks."""

    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    parameters: Sequence[int]


def refuse_nonfinite(
    residents: Sequence[Residents],
    names: Sequence[str],
    gradients: Sequence[Tensor | None],
    device: torch.device,
) -> None:
    """Raise a ValueError on all ranks if one of them has a gradient with a NaN or infinity.

    Args:
        residents: of this rank.
        names, gradients: of all parameters of the optimizer; this rank's shards.
    """
    mine = [(name, g) for name, g in zip(names, gradients, strict=True) if g is not None]
    bad = torch.zeros(len(mine), dtype=torch.bool, device=device)
    for k, (_, gradient) in enumerate(mine):
        bad[k] = gradient.isfinite().all().logical_not_()
    anywhere = bad.any().int()
    # Twice, since a set may hear of the trouble in another one through a third.
    for members in (*residents, *residents):
        if members.group is not None:
            dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=members.group)
    if not anywhere:
        return
    found = {name for (name, _), is_bad in zip(mine, bad.tolist(), strict=True) if is_bad}
    for members in residents:
        found.update(*gather(members.group, members.ranks, sorted(found)))
    first = sorted(found)[:3]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    where = (
        ", ".join(f"'{name}'" for name in first) + more if found else "another rank's parameters"
    )
    raise ValueError(
        f"the gradient of {where} is not finite, and setting 'on_nonfinite' is 'raise'; nothing "
        "has been changed."
    )


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
        ranks = tuple(sorted(specs[0].ranks))
        problem = None
        try:
            rank = dist.get_rank() if len(ranks) > 1 else ranks[0]
            self.plan = make_plan(specs, config, rank)
            self._check_shards(specs, parameters)
            self._check_roots(specs, config)
        except Exception as error:
            problem = str(error) or repr(error)
        agree(group, ranks, problem, {})
        # The ranks that share blocks may be fewer: those of a replica (see owner_scope).
        if self.plan.ranks != ranks:
            group = process_group(self.plan.ranks, parameters, replicas)
        agree(group, self.plan.ranks, None, {"the plan of blocks": [self.plan.fingerprint]})
        self.indices = tuple(indices)
        self.config = config
        self.group = group
        """Of the ranks that share blocks."""
        device = parameters[0].device.type
        self._mesh = None if group is None else DeviceMesh.from_group(group, device)
        self.buckets = [
            Bucket(self.plan, chosen, parameters, param_groups, config)
            for chosen in _bucket_parameters(specs, len(self.plan.ranks), config.buckets)
        ]

    def state_entries(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """For each parameter its number in the optimizer and the state of its blocks."""
        for parameter, entries in state_entries(self.plan, self.buckets, self.config, self._mesh):
            yield self.indices[parameter], entries

    def _check_roots(self, specs: Sequence[ParameterSpec], config: ShampooConfig) -> None:
        for spec, grid in zip(specs, self.plan.grids, strict=True):
            kinds = {factor_kinds(shape, config) for shape in grid.block_shapes}
            for factors in sorted({len(k) - k.count("none") for k in kinds} - {0}):
                try:
                    check_exponent(config.basis_method, -config.root_exponent(factors))
                except ValueError as error:
                    raise ValueError(f"parameter '{spec.name}': {error}.") from None

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


def _bucket_parameters(
    specs: Sequence[ParameterSpec], ranks: int, buckets: int | None
) -> list[list[int]]:
    """Which parameters travel together: neighbours, of about equal numbers of elements."""
    sizes = [math.prod(spec.shape) for spec in specs]
    total = sum(sizes)
    number = buckets or math.ceil(total / ranks / _BUCKET_ELEMENTS)
    chosen: dict[int, list[int]] = defaultdict(list)
    passed = 0
    for p, size in enumerate(sizes):
        chosen[min(passed * number // total, number - 1)].append(p)
        passed += size
    return [chosen[k] for k in sorted(chosen)]


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
            state[rank] += plan.state_bytes[i]
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
