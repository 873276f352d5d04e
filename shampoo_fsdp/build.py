"""What is built for the parameters in an optimizer's groups: the plan, and what holds state."""

import functools
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.rules.device import on_device, reasons
from shampoo_fsdp.runtime.choice import (
    is_preconditioned,
    refuse_nameless,
    what_names_miss,
    with_embeddings,
)
from shampoo_fsdp.runtime.excluded import ExcludedParameters
from shampoo_fsdp.runtime.groups import Given, given_in
from shampoo_fsdp.runtime.parameters import check_parameters
from shampoo_fsdp.runtime.ranks import RankSet, Replicas
from shampoo_fsdp.runtime.stopwatch import Stopwatch
from shampoo_fsdp.runtime.streaks import Streaks
from shampoo_fsdp.runtime.team import Parameters, make_parameters, summary
from shampoo_fsdp.state import State

__all__ = ["Built", "Runtime", "build", "check", "may_be_replaced"]

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Runtime:
    """What an optimizer communicates, measures and reads back with. A dry run, in which there are
    no other ranks and no values, gives another one: see :attr:`shampoo_fsdp.Shampoo.runtime`."""

    rank_set: Callable[..., RankSet] = RankSet
    """Of ranks and their process group."""
    watch: Callable[[torch.device], Stopwatch] = Stopwatch
    streaks: Callable[[Parameters], Streaks] = Streaks


@dataclass(frozen=True)
class Built:
    """All that belongs to the parameters that groups had at a time."""

    given: Given
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

    def fits(self, groups: Groups) -> bool:
        """Whether the groups still have these parameters."""
        now = [parameter for group in groups for parameter in group["params"]]
        return len(now) == len(self.tensors) and all(map(_same, now, self.tensors))

    @property
    def has_values(self) -> bool:
        """Whether a step has been taken, here or before a checkpoint."""
        return any(member.step for member in self.parameters.members)

    @functools.cached_property
    def summary(self) -> dict[str, float]:
        """Figures about the plan, the same on every rank of a mesh."""
        return summary(self.parameters, self.config)

    @property
    def outdated(self) -> bool:
        """Whether a parameter has left the device of its state, or is frozen no more."""
        device = self.parameters.device
        moved = any(member.parameter.device != device for member in self.parameters.members)
        return moved or any(parameter.requires_grad for _, parameter in self.given.frozen)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other


def check(groups: Groups, config: ShampooConfig) -> None:
    """Raise a ValueError that names what cannot be trained, or what has no name and needs one."""
    given = given_in(groups)
    check_parameters(given.parameters)
    if config.exclude and not given.named:
        found = [
            tuple(p.shape) for n, p, _ in given.trained if is_preconditioned(n, p.shape, config)
        ]
        refuse_nameless(len(given.trained), [shape for shape in found if len(shape) > 1])


def may_be_replaced(groups: Groups, replicas: Replicas) -> bool:
    """Whether these are the parameters of a model that is still to be sharded or materialised.

    Their state would be that of the whole model on each rank.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(parameter.is_meta for parameter in parameters):
        return True
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and replicas is None and not any(isinstance(p, DTensor) for p in parameters)


def build(
    groups: Groups,
    states: MutableMapping[Tensor, dict[str, Any]],
    replicas: Replicas,
    config: ShampooConfig,
    is_embedding: Mapping[str, bool],
    runtime: Runtime,
) -> Built:
    """Plan the parameters and make their state; all ranks of their meshes must call it.

    Args:
        states: the optimizer's, empty.
        config: as the user gave it.
        is_embedding: what a model has told of parameters, by name.

    Raises:
        ValueError: as :func:`check`, or, on every rank, if the ranks' plans differ.
    """
    check(groups, config)
    given = given_in(groups)
    for name, parameter in given.parameters:
        if parameter.is_meta:
            raise ValueError(
                f"parameter '{name}' is on the meta device; materialise the model (to_empty, then "
                "initialise) before the optimizer is used."
            )
    device = next((p.device for _, p, _ in given.trained), torch.device("cpu"))
    config = with_embeddings(config, [n for n, _, _ in given.trained if is_embedding.get(n)])
    chosen = on_device(config, device)
    parameters = make_parameters(given.trained, states, replicas, chosen, runtime.rank_set)
    others = [member for member in parameters.members if member.part is None]
    excluded = ExcludedParameters(others, chosen, parameters.device)
    state = State(parameters, excluded, chosen)
    if parameters.on_first_rank:
        shapes = {member.name: member.spec.shape for member in parameters.members}
        for problem in what_names_miss(shapes, is_embedding, chosen):
            warnings.warn(problem, stacklevel=4)
    tensors = tuple(parameter for group in groups for parameter in group["params"])
    return Built(
        given,
        chosen,
        reasons(config, device),
        parameters,
        excluded,
        runtime.streaks(parameters),
        state,
        runtime.watch(parameters.device),
        tensors,
    )
