"""What is built for the parameters in an optimizer's groups: the plan, and what holds state."""

import functools
import operator
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
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
from shampoo_fsdp.runtime.groups import GroupContents, contents_of
from shampoo_fsdp.runtime.parameters import check_parameters
from shampoo_fsdp.runtime.ranks import RankSet, Replicas
from shampoo_fsdp.runtime.stopwatch import Stopwatch
from shampoo_fsdp.runtime.streaks import Streaks
from shampoo_fsdp.runtime.team import Parameters, make_parameters, summary
from shampoo_fsdp.state import State

__all__ = ["Builder", "Built", "Runtime"]

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Runtime:
    """What an optimizer communicates, measures and reads back with. A dry run, in which there are
    no other ranks and no values, gives another one: see :attr:`shampoo_fsdp.Shampoo.runtime`."""

    rank_set: Callable[..., RankSet] = RankSet
    """Of ranks and their process group."""
    watch: Callable[[torch.device], Stopwatch] = Stopwatch
    streaks: Callable[[Parameters], Streaks] = Streaks


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
        """Whether the groups still have these parameters."""
        now = [parameter for group in groups for parameter in group["params"]]
        return len(now) == len(self.tensors) and all(map(operator.is_, now, self.tensors))

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


@dataclass
class Builder:
    """Builds for an optimizer what belongs to its parameters: with it, unless they are those of a
    model that is still to be sharded or materialised; else when it is used first; and anew if
    other tensors take their places before a step, as Accelerate does when it shards a model."""

    config: ShampooConfig
    """As the user gave it."""
    replicas: Replicas
    runtime: Runtime
    is_embedding: dict[str, bool] = field(default_factory=dict)
    """What a model has told of parameters, by name."""
    built: Built | None = None

    def check(self, groups: Groups) -> None:
        """Raise a ValueError that names what cannot be trained, or what needs a name."""
        given = contents_of(groups)
        check_parameters(given.parameters)
        if self.config.exclude and not given.named:
            found = [
                tuple(p.shape)
                for n, p, _ in given.trained
                if is_preconditioned(n, p.shape, self.config)
            ]
            refuse_nameless(len(given.trained), [shape for shape in found if len(shape) > 1])

    def waits(self, groups: Groups) -> bool:
        """Whether nothing is built, for a model that may still be sharded or materialised: its
        state would be that of the whole model on each rank."""
        if self.built is not None:
            return False
        parameters = [parameter for group in groups for parameter in group["params"]]
        if any(parameter.is_meta for parameter in parameters):
            return True
        several = dist.is_initialized() and dist.get_world_size() > 1
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        return several and self.replicas is None and not sharded

    def build(self, groups: Groups, states: MutableMapping[Tensor, dict[str, Any]]) -> Built:
        """What belongs to the parameters that the groups have now; all ranks of their meshes must
        call it.

        Args:
            states: the optimizer's.

        Raises:
            ValueError: as :meth:`check`, or, on every rank, if the ranks' plans differ.
            RuntimeError: steps have been taken with other parameters.
        """
        built = self.built
        if built is not None:
            if built.fits(groups) and (built.has_values or not built.outdated):
                return built
            if built.has_values:
                raise RuntimeError(
                    "the parameters in 'param_groups' are no longer those that this optimizer has "
                    "state for: build another one for the new ones, with named parameters, and "
                    "load_state_dict() the state_dict() of this one, taken before, into it."
                )
        self.built = built = None
        states.clear()  # before the new one is made: there may be no memory for both
        self.built = self._new(groups, states)
        return self.built

    def _new(self, groups: Groups, states: MutableMapping[Tensor, dict[str, Any]]) -> Built:
        self.check(groups)
        given = contents_of(groups)
        for name, parameter in given.parameters:
            if parameter.is_meta:
                raise ValueError(
                    f"parameter '{name}' is on the meta device; materialise the model (to_empty, "
                    "then initialise) before the optimizer is used."
                )
        device = next((p.device for _, p, _ in given.trained), torch.device("cpu"))
        embeddings = [n for n, _, _ in given.trained if self.is_embedding.get(n)]
        config = with_embeddings(self.config, embeddings)
        chosen = on_device(config, device)
        parameters = make_parameters(
            given.trained, states, self.replicas, chosen, self.runtime.rank_set
        )
        others = [member for member in parameters.members if member.part is None]
        excluded = ExcludedParameters(others, chosen, parameters.device)
        state = State(parameters, excluded, chosen)
        if parameters.on_first_rank:
            shapes = {member.name: member.spec.shape for member in parameters.members}
            frozen = [name for name, _ in given.frozen]
            for problem in what_names_miss(shapes, frozen, self.is_embedding, chosen):
                warnings.warn(problem, stacklevel=5)
        tensors = tuple(parameter for group in groups for parameter in group["params"])
        return Built(
            given,
            chosen,
            reasons(config, device),
            parameters,
            excluded,
            self.runtime.streaks(parameters),
            state,
            self.runtime.watch(parameters.device),
            tensors,
        )
