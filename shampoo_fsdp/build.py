"""What is built for the parameters in an optimizer's groups: the plan, and what holds state.

It is built with the optimizer, unless the parameters are those of a model that is still to be
sharded or materialised; else when it is used first; and anew if other tensors take their places
before a step, as Accelerate does when it shards a model.
"""

import dataclasses
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.assignment import Assignment, Part, parts_of
from shampoo_fsdp.plan.grid import lr_scale
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.rules.device import kernels_used, on_device, reasons
from shampoo_fsdp.rules.layout import block_costs
from shampoo_fsdp.runtime.bucket import Bucket, Stopwatch, elements, fill_buckets
from shampoo_fsdp.runtime.choice import (
    is_preconditioned,
    refuse_nameless,
    what_names_miss,
    with_embeddings,
)
from shampoo_fsdp.runtime.excluded import ExcludedParameters
from shampoo_fsdp.runtime.groups import named_parameters
from shampoo_fsdp.runtime.parameters import Member, check_parameters, describe, refuse_offloaded
from shampoo_fsdp.runtime.ranks import RankSet, find_groups, is_first_replica
from shampoo_fsdp.runtime.team import Groups, Parameters, Team, tensors_of
from shampoo_fsdp.state import State, States
from shampoo_fsdp.validation import name_some

__all__ = ["build"]


def waits(groups: Groups, replicas: dist.ProcessGroup | None) -> bool:
    """Whether nothing is to be built yet, for a model that may still be sharded or materialised:
    its state would be that of the whole model on each rank."""
    parameters = tensors_of(groups)
    if any(parameter.is_meta for parameter in parameters):
        return True
    several = dist.is_initialized() and dist.get_world_size() > 1
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    return several and replicas is None and not sharded


def check(
    groups: Groups, config: ShampooConfig
) -> tuple[list[tuple[str, Tensor, int]], list[tuple[str, Tensor]]]:
    """The parameters that are trained, with the numbers of their groups, and the frozen ones; a
    ValueError names what cannot be trained, or what needs a name."""
    everything = named_parameters(groups)
    check_parameters(everything)
    trained = [of for of in everything if of[1].requires_grad]
    if config.root_method is None:
        refuse_offloaded(trained)
    if config.exclude and "param_names" not in groups[0]:
        refuse_nameless({name: tuple(p.shape) for name, p, _ in trained}, config)
    return trained, [(name, p) for name, p, _ in everything if not p.requires_grad]


def build(
    groups: Groups,
    states: States,
    config: ShampooConfig,
    replicas: dist.ProcessGroup | None,
    is_embedding: Mapping[str, bool],
    *,
    rank_set: Callable[..., RankSet] = RankSet,
    assign: Callable[..., Assignment] = Assignment,
    watch: Callable[[torch.device], Stopwatch] = Stopwatch,
    state: type[State] = State,
) -> State:
    """What belongs to the parameters that the groups have; all ranks of their meshes must call it.

    Args:
        states: the optimizer's.
        config: as the user gave it.
        replicas: where plain tensors are replicated.
        is_embedding: what a model has told of parameters, by name.
        rank_set, assign, watch, state: others in a dry run, without other ranks and values.

    Raises:
        ValueError: as :func:`check`, or, on every rank, if ranks disagree or a parameter cannot be
            planned.
    """
    trained, frozen = check(groups, config)
    if meta := [name for name, parameter, _ in named_parameters(groups) if parameter.is_meta]:
        raise ValueError(
            f"{name_some(meta)}: on the meta device; materialise the model (to_empty, then "
            "initialise) before the optimizer is used."
        )
    device = next((p.device for _, p, _ in trained), torch.device("cpu"))
    config = with_embeddings(config, [n for n, _, _ in trained if is_embedding.get(n)])
    chosen = on_device(config, device)
    members = []
    for name, parameter, group in trained:
        spec, first = describe(name, parameter, replicas), is_first_replica(parameter, replicas)
        scale = lr_scale(spec.shape, chosen)
        members.append(Member(name, parameter, group, spec, scale, first, states[parameter]))
    ranks_of = partial(rank_set, stall_warning_seconds=config.stall_warning_seconds)
    teams, rank_sets, workspace = _make_teams(members, device, chosen, replicas, ranks_of, assign)
    excluded = [member for member in members if member.part is None]
    if all(ranks.position == 0 for ranks in rank_sets):  # the first rank says it
        shapes = {member.name: member.spec.shape for member in members}
        others = [name for name, _ in frozen]
        for problem in what_names_miss(shapes, others, is_embedding, chosen):
            warnings.warn(problem, stacklevel=5)
    return state(
        Parameters(
            frozen,
            chosen,
            "; ".join(filter(None, (reasons(config, device), kernels_used(config, device)))),
            members,
            teams,
            ExcludedParameters(excluded, chosen, device),
            rank_sets,
            device,
            workspace,
            watch(device),
            tensors_of(groups),
        )
    )


def _make_teams(
    members: Sequence[Member],
    device: torch.device,
    config: ShampooConfig,
    replicas: dist.ProcessGroup | None,
    rank_set: Callable[..., RankSet],
    assign: Callable[..., Assignment],
) -> tuple[list[Team], list[RankSet], Tensor]:
    """Plan all parameters: the teams of those that are preconditioned, the sets of ranks where
    parameters live, which compare what they were given first, and the workspace of all buckets."""
    living_on: dict[tuple[int, ...], list[Member]] = defaultdict(list)
    for member in members:
        living_on[tuple(sorted(member.spec.ranks))].append(member)
    tensors = {ranks: [m.parameter for m in living] for ranks, living in living_on.items()}
    rank_sets, agreed, planned = [], [], []
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
                agreed.append(_agreed_plan(chosen, ranks, config, assign))
    finally:  # all ranks take part, wherever something has failed
        # The ranks that share blocks may be fewer: those of a replica (see owner_scope).
        fewer = {of.ranks: [m.parameter for m in parts] for parts, of in agreed}
        groups |= find_groups({r: on for r, on in fewer.items() if r not in groups}, replicas)
    for parts, assignment in agreed:
        ranks = rank_set(assignment.ranks, groups[assignment.ranks])
        ranks.agree(None, {"the plan of blocks": [assignment.fingerprint]})
        for member, part in parts.items():
            member.precondition(part)
        planned.append((parts, assignment, ranks, fill_buckets(parts, ranks, config)))
    size = max((elements(bucket) for *_, filled in planned for bucket in filled), default=0)
    workspace = torch.empty(size, dtype=torch.float32, device=device)
    teams = []
    for parts, assignment, ranks, filled in planned:
        mesh = None if ranks.group is None else DeviceMesh.from_group(ranks.group, device.type)
        travels = assignment.travels
        buckets = [
            Bucket(own, ranks, config, workspace, travels, f"bucket {number} of {len(filled)}")
            for number, own in enumerate(filled, start=1)
        ]
        teams.append(Team(parts, assignment, ranks, mesh, buckets))
    workspace.untyped_storage().resize_(0)
    return teams, rank_sets, workspace


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
) -> tuple[dict[Member, Part], Assignment]:
    """Raise a ValueError on every rank if one of them cannot take part."""
    problem = None
    try:
        rank = dist.get_rank() if len(ranks.ranks) > 1 else ranks.ranks[0]
        specs = [member.spec for member in members]
        assignment = assign(specs, config, block_costs(config), rank)
        parts = dict(zip(members, parts_of(assignment, rank), strict=True))
        for member, part in parts.items():
            _check(member, part, config)
    except Exception as error:
        problem = str(error) or repr(error)
    ranks.agree(problem, {})
    return parts, assignment


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
            config.rule.check_block(shape, config)
    except ValueError as error:
        raise ValueError(f"parameter '{spec.name}': {error}.") from None
