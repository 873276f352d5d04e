"""What is built for the parameters in an optimizer's groups: the plan, and what holds state.

It is built with the optimizer, unless the parameters are those of a model that is still to be
sharded or materialised; else when it is used first; and anew if other tensors take their places
before a step, as Accelerate does when it shards a model.
"""

import functools
import operator
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.totals import Totals, summed
from shampoo_fsdp.rules.device import kernels_used, on_device, reasons
from shampoo_fsdp.rules.layout import BlockCosts
from shampoo_fsdp.rules.precision import torch_dtype
from shampoo_fsdp.runtime.bucket import Stopwatch
from shampoo_fsdp.runtime.choice import refuse_nameless, what_names_miss, with_embeddings
from shampoo_fsdp.runtime.excluded import ExcludedParameters
from shampoo_fsdp.runtime.groups import GroupContents, contents_of
from shampoo_fsdp.runtime.parameters import check_parameters, refuse_offloaded
from shampoo_fsdp.runtime.ranks import RankSet
from shampoo_fsdp.runtime.streaks import Streaks
from shampoo_fsdp.runtime.team import Parameters, make_parameters
from shampoo_fsdp.state import State
from shampoo_fsdp.validation import name_some

__all__ = ["Runtime"]

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Runtime:
    """What an optimizer communicates, measures, plans and keeps with. A dry run, in which there are
    no other ranks and no values, gives another one: see :attr:`shampoo_fsdp.Shampoo.runtime`."""

    rank_set: Callable[..., RankSet] = RankSet
    """Of ranks and their process group."""
    watch: Callable[[torch.device], Stopwatch] = Stopwatch
    assign: Callable[..., Assignment] = Assignment
    state: type[State] = State
    reads_back: bool = True
    """Whether there are values to read."""


@dataclass
class Built:
    """All that belongs to the parameters that groups had at a time."""

    given: GroupContents
    config: ShampooConfig
    """With the device's defaults."""
    chosen_by_device: str
    """Which settings were not given and follow from the device, and why: one line, or ""."""
    parameters: Parameters
    excluded: ExcludedParameters
    streaks: Streaks
    state: State
    watch: Stopwatch
    tensors: tuple[Tensor, ...]
    """Of the groups, in their order."""
    has_seen_gradients: bool = False
    """Whether any rank has had one, on the first step."""
    whole: dict[Any, Any] | None = None
    """The state with whole tensors, for the next state dict."""

    def fits(self, groups: Groups) -> bool:
        """Whether the groups still have these parameters, where they were.

        Raises:
            RuntimeError: they have others, and steps have been taken with these.
        """
        now = _all(groups)
        same = len(now) == len(self.tensors) and all(map(operator.is_, now, self.tensors))
        if self.has_values:
            if not same:
                raise RuntimeError(
                    "the parameters in 'param_groups' are no longer those that this optimizer has "
                    "state for: build another one for the new ones, with names, and "
                    "load_state_dict() what state_dict() gave before into it."
                )
            return True
        device = self.parameters.device
        moved = any(member.parameter.device != device for member in self.parameters.members)
        unfrozen = any(parameter.requires_grad for _, parameter in self.given.frozen)
        return same and not moved and not unfrozen

    @property
    def has_values(self) -> bool:
        """Whether a step has been taken, here or before a checkpoint."""
        return any(member.step for member in self.parameters.members)

    @functools.cached_property
    def summary(self) -> dict[str, float]:
        """Figures about the plan, and load, state and traffic of the ranks that share blocks with
        this one; the same on all of these."""
        teams, costs = self.parameters.teams, BlockCosts(self.config)
        specs = [([member.spec for member in team.parts], team.ranks.ranks[0]) for team in teams]
        plans = [Totals(Assignment(of, self.config, costs, rank)) for of, rank in specs]
        load, state, sent = (summed(plans, name) for name in ("load", "state", "sent"))
        mean_load = sum(load) / len(load)
        mib = torch_dtype(self.config.communication_dtype).itemsize / 2**20
        chosen = [member.parameter.numel() for team in teams for member in team.parts]
        return {
            "parameters_preconditioned": len(chosen),
            "parameters_total": len(self.parameters.members),
            "elements_preconditioned": sum(chosen),
            "elements_total": sum(member.parameter.numel() for member in self.parameters.members),
            "blocks": sum(sum(plan.owned) for plan in plans),
            "load_max_over_mean": max(load) / mean_load if mean_load else 1.0,
            "state_mib_max": max(state) / 2**20,
            "state_mib_mean": sum(state) / len(state) / 2**20,
            "mib_sent_per_step_max": max(sent) * mib,
            "mib_sent_per_step_mean": sum(sent) / len(sent) * mib,
        }


def _all(groups: Groups) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def waits(groups: Groups, replicas: dist.ProcessGroup | None) -> bool:
    """Whether nothing is to be built yet, for a model that may still be sharded or materialised:
    its state would be that of the whole model on each rank."""
    parameters = _all(groups)
    if any(parameter.is_meta for parameter in parameters):
        return True
    several = dist.is_initialized() and dist.get_world_size() > 1
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    return several and replicas is None and not sharded


def check(groups: Groups, config: ShampooConfig) -> GroupContents:
    """What the groups have; a ValueError names what cannot be trained, or what needs a name."""
    given = contents_of(groups)
    check_parameters(given.parameters)
    if config.root_method is None:
        refuse_offloaded([(name, parameter) for name, parameter, _ in given.trained])
    if config.exclude and not given.named:
        refuse_nameless({name: tuple(p.shape) for name, p, _ in given.trained}, config)
    return given


def build(
    groups: Groups,
    states: MutableMapping[Tensor, dict[str, Any]],
    config: ShampooConfig,
    replicas: dist.ProcessGroup | None,
    runtime: Runtime,
    is_embedding: Mapping[str, bool],
) -> Built:
    """What belongs to the parameters that the groups have; all ranks of their meshes must call it.

    Args:
        states: the optimizer's.
        config: as the user gave it.
        is_embedding: what a model has told of parameters, by name.

    Raises:
        ValueError: as :func:`check`, or, on every rank, if the ranks' plans differ.
    """
    given = check(groups, config)
    if meta := [name for name, parameter in given.parameters if parameter.is_meta]:
        raise ValueError(
            f"{name_some(meta)}: on the meta device; materialise the model (to_empty, then "
            "initialise) before the optimizer is used."
        )
    device = next((p.device for _, p, _ in given.trained), torch.device("cpu"))
    config = with_embeddings(config, [n for n, _, _ in given.trained if is_embedding.get(n)])
    chosen = on_device(config, device)
    made_by = runtime.rank_set, runtime.assign
    parameters = make_parameters(given.trained, states, replicas, chosen, *made_by)
    others = [member for member in parameters.members if member.part is None]
    excluded = ExcludedParameters(others, chosen, device)
    if all(ranks.position == 0 for ranks in parameters.rank_sets):  # the first rank says it
        shapes = {member.name: member.spec.shape for member in parameters.members}
        frozen = [name for name, _ in given.frozen]
        for problem in what_names_miss(shapes, frozen, is_embedding, chosen):
            warnings.warn(problem, stacklevel=4)
    return Built(
        given,
        chosen,
        "; ".join(filter(None, (reasons(config, device), kernels_used(config, device)))),
        parameters,
        excluded,
        Streaks(parameters),
        runtime.state(parameters, excluded, chosen),
        runtime.watch(device),
        tuple(_all(groups)),
    )
