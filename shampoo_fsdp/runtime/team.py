"""All parameters of an optimizer: their plan, what ranks compare, the teams of those on the same
ranks, and the figures about them."""

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.grid import lr_scale
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.plan.transfers import Part, Plan, make_plan
from shampoo_fsdp.rules.layout import BlockCosts
from shampoo_fsdp.rules.rule import rule_of
from shampoo_fsdp.runtime.bucket import Bucket, Stopwatch, elements, fill_buckets
from shampoo_fsdp.runtime.choice import is_preconditioned
from shampoo_fsdp.runtime.exchange import allocate, release
from shampoo_fsdp.runtime.parameters import Member, describe
from shampoo_fsdp.runtime.ranks import (
    RankSet,
    find_groups,
    is_first_replica,
    tell_all,
)
from shampoo_fsdp.validation import name_some

__all__ = [
    "Parameters",
    "changes_nothing",
    "make_parameters",
    "refuse_nonfinite",
    "refuse_without_gradients",
]


@dataclass(frozen=True)
class Team:
    """Preconditioned parameters whose meshes consist of the same ranks."""

    parts: dict[Member, Part]
    plan: Plan
    ranks: RankSet
    """That share blocks."""
    mesh: DeviceMesh | None
    """Of these; None for one rank."""
    buckets: list[Bucket]

    @property
    def is_first_replica(self) -> bool:
        """Whether these ranks are the first of those that do the same work (see `owner_scope`)."""
        return min(next(iter(self.parts)).spec.ranks) in self.ranks.ranks


@dataclass(frozen=True)
class Parameters:
    """All parameters of an optimizer, on this rank."""

    members: list[Member]
    teams: list[Team]
    """Of those that are preconditioned."""
    rank_sets: list[RankSet]
    """Where parameters live."""
    device: torch.device
    workspace: Tensor
    """Of all buckets; it has memory only while a step needs it."""

    @functools.cached_property
    def buckets(self) -> list[Bucket]:
        return [bucket for team in self.teams for bucket in team.buckets]

    def take_steps(
        self, groups: Sequence[GroupSettings], watch: Stopwatch, meanwhile: Callable[[], None]
    ) -> None:
        """Take the step of all buckets; all ranks do so in this order.

        While something travels, something else is computed: what `meanwhile` does; the first half
        of a bucket's work, while the last one's updates travel; the second half, while the next
        one's gradients do. More at once would only take more memory. When no gradients are to come
        any more, the last but one's updates may travel longer instead.

        Args:
            groups: of the optimizer.
            watch: measures the parts.
        """
        steps = [bucket.step(groups, watch) for bucket in self.buckets]
        # Updates wait until memory of the next gradients is free. Not where these come from other
        # ranks: they may be waiting for such updates before they send.
        waits = [a.ranks == b.ranks for a, b in itertools.pairwise(self.buckets)] + [True]
        for step in steps[:1]:
            next(step)  # gradients set out
        meanwhile()
        watch.lap("excluded")
        allocate(self.workspace)
        for k, step in enumerate(steps):
            following = k + 1 < len(steps)
            next(step)  # gradients arrive
            if k and waits[k - 1]:
                next(steps[k - 1])  # updates set out
            if following and not k:
                next(steps[1])  # gradients set out
            next(step)  # gradients are accumulated
            if following and k:
                next(steps[k - 1], None)  # updates are applied
                next(steps[k + 1])  # gradients set out
            next(step)  # gradients become updates
            if not waits[k]:
                next(step)  # updates set out
        release(self.workspace)
        for step in steps[-1:]:
            next(step)  # updates set out
        for step in steps[-2:]:
            next(step, None)  # updates are applied


def make_parameters(
    named: Sequence[tuple[str, Tensor, int]],
    states: Mapping[Tensor, dict[str, Any]],
    replicas: dist.ProcessGroup | None,
    config: ShampooConfig,
    rank_set: Callable[..., RankSet] = RankSet,
    assign: Callable[..., Assignment] = Assignment,
) -> Parameters:
    """Plan all parameters.

    All ranks that parameters live on compare what they were given first.

    Args:
        named: name, parameter and number of the parameter group of each.
        states: the optimizer's.
        replicas: where plain tensors are replicated.
        rank_set: makes one of ranks and their process group.
        assign: makes the assignment of blocks.

    Raises:
        ValueError: on every rank, if ranks disagree or a parameter cannot be planned.
    """
    members = [
        Member(
            name,
            parameter,
            group,
            spec := describe(name, parameter, replicas),
            lr_scale(spec.shape, config),
            is_first_replica(parameter, replicas),
            states[parameter],
        )
        for name, parameter, group in named
    ]
    rank_set = partial(rank_set, stall_warning_seconds=config.stall_warning_seconds)
    living_on: dict[tuple[int, ...], list[Member]] = defaultdict(list)
    for member in members:
        living_on[tuple(sorted(member.spec.ranks))].append(member)
    device = members[0].parameter.device if members else torch.device("cpu")
    tensors = {ranks: [m.parameter for m in living] for ranks, living in living_on.items()}
    rank_sets, agreed, plans = [], [], []
    groups = find_groups(tensors, replicas)
    try:
        # The same order on every rank, so that overlapping sets of ranks cannot wait in a circle.
        for all_ranks, living in sorted(living_on.items(), key=lambda entry: entry[0]):
            ranks = rank_set(all_ranks, groups[all_ranks])
            ranks.agree(None, _facts([member.spec for member in living], config))
            ranks.connect(device)
            rank_sets.append(ranks)
            chosen = [m for m in living if is_preconditioned(m.name, m.spec.shape, config)]
            if chosen:
                agreed.append((chosen, _agreed_plan(chosen, ranks, config, assign)))
    finally:  # all ranks take part, wherever something has failed
        # The ranks that share blocks may be fewer: those of a replica (see owner_scope).
        fewer = {plan.ranks: [m.parameter for m in chosen] for chosen, plan in agreed}
        groups |= find_groups({r: on for r, on in fewer.items() if r not in groups}, replicas)
    for chosen, plan in agreed:
        ranks = rank_set(plan.ranks, groups[plan.ranks])
        ranks.agree(None, {"the plan of blocks": [plan.fingerprint]})
        parts = dict(zip(chosen, plan.parts, strict=True))
        for member, part in parts.items():
            member.precondition(part)
        plans.append((parts, plan, ranks, fill_buckets(parts, ranks, config)))
    size = max((elements(bucket) for *_, filled in plans for bucket in filled), default=0)
    workspace = torch.empty(size, dtype=torch.float32, device=device)
    teams = [
        Team(
            parts,
            plan,
            ranks,
            None if ranks.group is None else DeviceMesh.from_group(ranks.group, device.type),
            [
                Bucket(
                    bucket,
                    ranks,
                    config,
                    workspace,
                    travels=plan.travels,
                    name=f"bucket {number} of {len(filled)}",
                )
                for number, bucket in enumerate(filled, start=1)
            ],
        )
        for parts, plan, ranks, filled in plans
    ]
    release(workspace)
    return Parameters(members, teams, rank_sets, device, workspace)


def _facts(specs: Sequence[ParameterSpec], config: ShampooConfig) -> dict[str, Sequence[object]]:
    """What ranks must agree about."""
    settings = dataclasses.asdict(config).items()
    return {
        "the parameters that are trained": [spec.name for spec in specs],
        "their shapes": [(spec.name, spec.shape) for spec in specs],
        "their placements": [(spec.name, spec.mesh_shape, spec.placements) for spec in specs],
        "the settings": [f"{name} = {value}" for name, value in settings],
    }


def _agreed_plan(
    members: Sequence[Member],
    ranks: RankSet,
    config: ShampooConfig,
    assign: Callable[..., Assignment],
) -> Plan:
    """Raise a ValueError on every rank if one of them cannot take part."""
    problem = None
    try:
        rank = dist.get_rank() if len(ranks.ranks) > 1 else ranks.ranks[0]
        specs = [member.spec for member in members]
        plan = make_plan(assign(specs, config, BlockCosts(config), rank), rank)
        for member, part in zip(members, plan.parts, strict=True):
            _check(member, part, config)
    except Exception as error:
        problem = str(error) or repr(error)
    ranks.agree(problem, {})
    return plan


def _check(member: Member, part: Part, config: ShampooConfig) -> None:
    """Raise a ValueError if its shard is not what its placements say, or its roots are none that
    the settings can take."""
    spec, shard = member.spec, member.shard()
    if shard.numel() != math.prod(part.shard_shape):
        raise ValueError(
            f"parameter '{spec.name}' has a shard of {tuple(shard.shape)} here, but its placements "
            f"{spec.placements} on a mesh of {spec.mesh_shape} say {part.shard_shape}."
        )
    try:
        for shape in part.grid.block_shapes:
            rule_of(config).check_block(shape, config)
    except ValueError as error:
        raise ValueError(f"parameter '{spec.name}': {error}.") from None


def refuse_nonfinite(parameters: Parameters, cause: Exception | None) -> None:
    """Raise a ValueError on all ranks if one of them has a gradient with a NaN or infinity.

    Args:
        cause: why this rank has put NaN in the place of one, if it has.
    """
    mine = [(member.name, g) for member in parameters.members if (g := member.gradient) is not None]
    bad = torch.zeros(len(mine), dtype=torch.bool, device=parameters.device)
    for k, (_, gradient) in enumerate(mine):
        bad[k] = gradient.isfinite().all().logical_not_()
    anywhere = bad.any().int()
    # Twice, since a set may hear of it in another one through a third.
    for ranks in (*parameters.rank_sets, *parameters.rank_sets):
        ranks.maximum(anywhere)
    if not anywhere:  # the host waits
        return
    names = [name for (name, _), is_bad in zip(mine, bad.tolist(), strict=True) if is_bad]
    where = tell_all(parameters.rank_sets, name_some(names))
    raise ValueError(
        f"the gradient of {where} is not finite, and setting 'on_nonfinite' is 'raise'; nothing "
        "has been changed."
    ) from cause


def refuse_without_gradients(parameters: Parameters) -> None:
    """Raise a RuntimeError on all ranks if none of them has a gradient: nothing would be trained,
    which is what an optimizer does that has kept the tensors of before `fully_shard`."""
    members = parameters.members
    some = any(member.gradient is not None for member in members)
    if not tell_all(parameters.rank_sets, some) and members:
        raise RuntimeError(
            f"none of the {len(members)} parameters of this optimizer has a gradient on its first "
            "step: call backward() first, and if the optimizer was built before fully_shard() or "
            "another wrapper that replaces parameters, build it after that."
        )


def changes_nothing(parameters: Parameters, lrs: Sequence[float]) -> bool:
    """Whether no step was taken, and every lr and every gradient is zero, on all ranks; their
    gradients are let go then.

    Where an lr is not, the host waits for no gradient.
    """
    # (All ranks ask: a rank alone may have loaded the steps of its experts.)
    moved = any(member.step for member in parameters.members)
    gradients = [m.gradient for m in parameters.members if m.gradient is not None]
    some = moved or any(lrs) or any(bool(gradient.any()) for gradient in gradients)
    if tell_all(parameters.rank_sets, some):
        return False
    for member in parameters.members:
        member.gradient = None
    return True
