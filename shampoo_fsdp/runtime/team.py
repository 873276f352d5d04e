"""All parameters of an optimizer: the teams of those on the same ranks, their step, and what all
ranks ask each other before it."""

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.plan.assignment import Assignment, OwnedBlock, Part
from shampoo_fsdp.plan.totals import Totals, summed
from shampoo_fsdp.rules.matrices import torch_dtype
from shampoo_fsdp.rules.stack import BlockStack
from shampoo_fsdp.runtime.bucket import Bucket, Stopwatch
from shampoo_fsdp.runtime.excluded import ExcludedParameters
from shampoo_fsdp.runtime.parameters import Member, count, find_gradients
from shampoo_fsdp.runtime.ranks import RankSet, tell_all
from shampoo_fsdp.validation import name_some

Groups = Sequence[Mapping[str, Any]]
"""Those of an optimizer."""


@dataclass(frozen=True)
class Team:
    """Preconditioned parameters whose meshes consist of the same ranks."""

    parts: dict[Member, Part]
    assignment: Assignment
    """Of all of their blocks."""
    ranks: RankSet
    """That share blocks."""
    mesh: DeviceMesh | None
    """Of these; None for one rank."""
    buckets: list[Bucket]

    @property
    def stacks(self) -> dict[BlockStack, list[tuple[Member, OwnedBlock]]]:
        """Of all buckets."""
        return {s: owned for bucket in self.buckets for s, owned in bucket.stacks.items()}

    @property
    def is_first_replica(self) -> bool:
        """Whether these ranks are the first of those that do the same work (see `owner_scope`)."""
        return min(next(iter(self.parts)).spec.ranks) in self.ranks.ranks


@dataclass
class Parameters:
    """All parameters of an optimizer, on this rank."""

    frozen: list[tuple[str, Tensor]]
    """Parameters that did not require a gradient."""
    config: ShampooConfig
    """With the device's defaults."""
    chosen_by_device: str
    """Which settings were not given and follow from the device, and why: one line, or ""."""
    members: list[Member]
    teams: list[Team]
    """Of those that are preconditioned."""
    excluded: ExcludedParameters
    """The others."""
    rank_sets: list[RankSet]
    """Where parameters live."""
    device: torch.device
    workspace: Tensor
    """Of all buckets; it has memory only while a step needs it."""
    watch: Stopwatch
    """Measures the parts of a step."""
    tensors: list[Tensor]
    """Of the groups, in their order."""
    has_seen_gradients: bool = False
    """Whether any rank has had one, on the first step."""

    @functools.cached_property
    def buckets(self) -> list[Bucket]:
        return [bucket for team in self.teams for bucket in team.buckets]

    def step(self, groups: Groups, trouble: Exception | None) -> Exception | None:
        """Update those that have a gradient; all ranks must call it.

        Args:
            groups: of the optimizer.
            trouble: why this rank cannot take part as it should, if anything is wrong.

        Returns:
            what this rank has to raise at the end: others, which wait for it, take the step.
        """
        trouble = find_gradients(self.members, self.frozen) or trouble
        if not self.has_seen_gradients:
            _refuse_without_gradients(self)
            if _changes_nothing(self, [float(group["lr"]) for group in groups]):
                return None
            self.has_seen_gradients = True
        if trouble and all(ranks.group is None for ranks in self.rank_sets):
            raise trouble
        if self.config.on_nonfinite == "raise":
            _refuse_nonfinite(self, trouble)
        settings = [GroupSettings.of(group, self.config) for group in groups]
        count(self.members, self.config.start_preconditioning_step)
        self._take_steps(groups, settings)
        for member in self.members:
            member.gradient = None  # the caller may free them
        return trouble

    def _take_steps(self, groups: Groups, settings: Sequence[GroupSettings]) -> None:
        """Take the step of all parameters; all ranks do so in this order.

        While something travels, something else is computed: the excluded parameters; the first half
        of a bucket's work, while the last one's updates travel; the second half, while the next
        one's gradients do. More at once would only take more memory. When no gradients are to come
        any more, the last but one's updates may travel longer instead.

        Args:
            groups: of the optimizer.
            settings: of each group.
        """
        steps = [bucket.step(settings, self.watch) for bucket in self.buckets]
        # Updates wait until memory of the next gradients is free. Not where these come from other
        # ranks: they may be waiting for such updates before they send.
        waits = [a.ranks == b.ranks for a, b in itertools.pairwise(self.buckets)] + [True]
        for step in steps[:1]:
            next(step)  # gradients set out
        self.excluded.step(groups)
        self.watch.lap("excluded")
        memory = self.workspace.untyped_storage()
        memory.resize_(self.workspace.numel() * self.workspace.itemsize)
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
        memory.resize_(0)
        for step in steps[-1:]:
            next(step)  # updates set out
        for step in steps[-2:]:
            next(step, None)  # updates are applied

    def fits(self, groups: Groups) -> bool:
        """Whether the groups still have these parameters, where they were.

        Raises:
            RuntimeError: they have others, and steps have been taken with these.
        """
        now = tensors_of(groups)
        same = len(now) == len(self.tensors) and all(map(operator.is_, now, self.tensors))
        if self.has_values:
            if not same:
                raise RuntimeError(
                    "the parameters in 'param_groups' are no longer those that it has state for: "
                    "build another one, with names, and load_state_dict() what was saved before."
                )
            return True
        moved = any(member.parameter.device != self.device for member in self.members)
        unfrozen = any(parameter.requires_grad for _, parameter in self.frozen)
        return same and not moved and not unfrozen

    @property
    def has_values(self) -> bool:
        """Whether a step has been taken, here or before a checkpoint."""
        return any(member.step for member in self.members)

    @functools.cached_property
    def summary(self) -> dict[str, float]:
        """Figures about the plan, and load, state and traffic of the ranks that share blocks with
        this one; the same on all of these."""
        plans = [Totals(team.assignment) for team in self.teams]
        load, state, sent = (summed(plans, name) for name in ("load", "state", "sent"))
        mean_load = sum(load) / len(load)
        mib = torch_dtype(self.config.communication_dtype).itemsize / 2**20
        chosen = [member.parameter.numel() for team in self.teams for member in team.parts]
        return {
            "parameters_preconditioned": len(chosen),
            "parameters_total": len(self.members),
            "elements_preconditioned": sum(chosen),
            "elements_total": sum(member.parameter.numel() for member in self.members),
            "blocks": sum(sum(plan.owned) for plan in plans),
            "load_max_over_mean": max(load) / mean_load if mean_load else 1.0,
            "state_mib_max": max(state) / 2**20,
            "state_mib_mean": sum(state) / len(state) / 2**20,
            "mib_sent_per_step_max": max(sent) * mib,
            "mib_sent_per_step_mean": sum(sent) / len(sent) * mib,
        }


def tensors_of(groups: Groups) -> list[Tensor]:
    """The parameters of all groups."""
    return [parameter for group in groups for parameter in group["params"]]


def _refuse_nonfinite(parameters: Parameters, cause: Exception | None) -> None:
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


def _refuse_without_gradients(parameters: Parameters) -> None:
    """Raise a RuntimeError on all ranks if none of them has a gradient: nothing would be trained,
    which is what an optimizer does that has kept the tensors of before `fully_shard`."""
    members = parameters.members
    some = any(member.gradient is not None for member in members)
    if not tell_all(parameters.rank_sets, some) and members:
        raise RuntimeError(
            f"none of the {len(members)} parameters has a gradient on the first step: call "
            "backward() first, and if the optimizer was built before fully_shard() or another "
            "wrapper that replaces parameters, build it after that."
        )


def _changes_nothing(parameters: Parameters, lrs: Sequence[float]) -> bool:
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
