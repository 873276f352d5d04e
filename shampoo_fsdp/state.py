"""The state of an optimizer: made at the start, loaded, and taken back from others."""

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from shampoo_fsdp.checkpoint.fits import OF_BEFORE, decide, is_state_entry
from shampoo_fsdp.checkpoint.loading import carry_out, copy_own_part, flat, other_pieces, start_anew
from shampoo_fsdp.checkpoint.owned import OwnedBlocks, Reading
from shampoo_fsdp.checkpoint.sharded import state_entries
from shampoo_fsdp.rules.stack import BlockStack
from shampoo_fsdp.runtime.diagnostics import Streaks
from shampoo_fsdp.runtime.groups import find_saved, settings_to_load
from shampoo_fsdp.runtime.parameters import Member
from shampoo_fsdp.runtime.ranks import tell_all
from shampoo_fsdp.runtime.team import Parameters
from shampoo_fsdp.validation import name_some

_logger = getLogger(__name__)

States = MutableMapping[Tensor, dict[str, Any]]
"""`optimizer.state`: the entries of each parameter."""


@dataclass
class State:
    """What is kept of the parameters of an optimizer, and shown as `optimizer.state`.

    What is shown of blocks are views of their stacks. Others may put other tensors into the places
    of these, as programs do that move state to the host and back: a stack is freed when nothing
    that was shown of it is left, and the next step takes the values back.
    """

    parameters: Parameters
    whole: dict[Any, Any] | None = None
    """`optimizer.state` with whole tensors, for the next state dict."""
    _reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        self.streaks = Streaks(self.parameters.teams, self.parameters.device)
        self._reading.counts = [
            r.make_count() for r in self.parameters.rank_sets if r.group is not None
        ]
        # All state exists from the start: loading a checkpoint into an optimizer without state
        # would make torch.distributed.checkpoint run a step with gradients of zero first.
        for stacks, made in self._make_entries():
            _show(stacks, made, {member.parameter: member.state for member in made})

    def take_back(self, states: States) -> ValueError | None:
        """Copy what others have put into the places of entries, and put the entries back. Those of
        a parameter that has none any more start anew, as with the optimizers of torch.

        Args:
            states: the optimizer's, which may be another one than before.

        Returns:
            trouble with an entry. One process has changed nothing then, and finds it again on the
            next step. One of several, which must take the step, goes on with the values of before,
            or with zeros where memory was freed.

        Raises:
            RuntimeError: a checkpoint was read, and not loaded.
        """
        self._reading.check()
        if self._is_shown(states):
            return None
        several = any(ranks.group is not None for ranks in self.parameters.rank_sets)
        trouble = self._return_entries(states, in_any_case=several)
        return ValueError(trouble) if trouble else None

    def gather(self, states: States, *, keep: bool) -> None:
        """Set `whole`, to tensors on the CPU; all ranks must call it.

        Args:
            keep: whether this rank wants it.

        Raises:
            ValueError: on every rank, if others have put there what cannot be used.
            RuntimeError: a checkpoint was read, and not loaded.
        """
        self.whole = None  # before the new one is made
        self._reading.check()
        if problem := tell_all(self.parameters.rank_sets, self._return_entries(states)):
            raise ValueError(problem)

        def whole(value: Any) -> Any:
            if isinstance(value, DTensor):  # all ranks put one tensor together at a time
                value = value.full_tensor()
            if not keep:
                return None
            if isinstance(value, OwnedBlocks):
                value = value.whole()
            return value.cpu() if isinstance(value, Tensor) else value

        entries = {
            member.parameter: {entry: whole(value) for entry, value in member.state.items()}
            for member in self.parameters.members
        }
        self.whole = {**states, **entries} if keep else None

    def _is_shown(self, states: States) -> bool:
        if not all(member.is_shown(states) for member in self.parameters.members):
            return False
        # Parameters may be cast to other types, which the state of excluded ones follows.
        excluded = self.parameters.excluded.members
        return all(m.state["exp_avg"].dtype == m.parameter.dtype for m in excluded)

    def _return_entries(self, states: States, *, in_any_case: bool = False) -> str | None:
        """What is wrong with an entry; nothing is changed then, unless it is so in any case."""
        if self._is_shown(states):
            return None
        problem = None
        for member in self.parameters.members:
            found = states.get(member.parameter, {})
            problem = problem or _take(member.name, member.forms, found)
        if problem and not in_any_case:
            return problem
        for stacks, made in self._make_entries():
            for member, entries in made.items():
                _take(member.name, entries, states.setdefault(member.parameter, {}))
            _show(stacks, made, states)
        self._start_factors()
        return problem

    def _make_entries(self) -> Iterator[tuple[list[BlockStack], dict[Member, dict[str, Tensor]]]]:
        """The entries of all members, of a few at a time, and the stacks that they are views of."""
        parameters = self.parameters
        for member in parameters.excluded.members:
            yield [], {member: member.counters | parameters.excluded.create_entries(member)}
        for team in parameters.teams:
            for bucket in team.buckets:
                for member in bucket.members:  # what was shown may free the stacks
                    member.hide()
                owned = defaultdict(list)
                for member, block, saved in bucket.saved():
                    owned[member].append((block, saved))
                common = parameters.config, parameters.device, team.mesh, self._reading
                made = {}
                for member in bucket.members:
                    entries = state_entries(team.parts[member].grid, owned[member], *common)
                    made[member] = member.counters | entries
                yield list(bucket.stacks), made

    def _start_factors(self) -> None:
        """Anew where a parameter's factors have seen no gradient, whatever was loaded for them."""
        for member in self.parameters.members:
            if member.part and member.factor_step == 0:
                member.counters["refreshed"].zero_()
        for bucket in self.parameters.buckets:
            bucket.state_was_loaded()

    def load(
        self, param_groups: list[dict[str, Any]], states: States, read: Callable[[], dict[str, Any]]
    ) -> None:
        """Take over a state dict; all ranks must call it.

        Args:
            param_groups: of the optimizer; they take over the saved settings.
            states: the optimizer's; it also gets what the state dict has beside parameters.
            read: gives the state dict; where it raises, all ranks do.

        Raises:
            ValueError: on every rank, names the parameter and the entry or setting that does not
                fit; nothing has been changed then.
        """
        members = self.parameters.members
        rank_sets, self.whole = self.parameters.rank_sets, None
        trouble = self._return_entries(states)
        problem, here, saved, other = None, dict[str, Tensor](), dict[str, Tensor](), list[str]()
        try:
            if trouble:
                raise ValueError(trouble)
            here = flat({member.name: member.state for member in members})
            state_dict = read()
            state = state_dict["state"]
            keys, saved_groups = find_saved(param_groups, state_dict["param_groups"])
            entries = {m.name: state.get(keys.get(m.name), {}) for m in members}
            settings = settings_to_load(self.parameters.config, param_groups, saved_groups)
            saved = flat(entries)
            report = decide(here, saved, self.parameters.config.on_mismatch)
            other = other_pieces(here, saved, report)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = str(error) if isinstance(error, ValueError) else repr(error)
        if problem := tell_all(rank_sets, problem):
            raise ValueError(problem)
        for ranks in rank_sets:
            other += itertools.chain(*ranks.gather(other))
        if frozen := [name for name, _ in self.parameters.frozen if state.get(keys.get(name))]:
            _logger.warning(f"The saved state of {name_some(frozen)}, frozen here, is not used.")
        if said := str(report):
            _logger.warning(f"Not all optimizer state comes from the state dict: {said}.")
        of_before = tell_all(rank_sets, report.of_before)
        of_before = of_before and not any("lr_factor" in loaded for loaded in settings)
        _settle_lr_factor(param_groups, settings, saved_groups, bool(of_before))

        for group, loaded in zip(param_groups, settings, strict=True):
            group.update(loaded)
        carry_out(here, saved, report, set(other))
        self._start_factors()
        self._reading.set(False)
        self.streaks = Streaks(self.parameters.teams, self.parameters.device)  # they begin anew

        # Others may have put more there, also into a state dict that is the optimizer's own.
        known = {key for group in state_dict["param_groups"] for key in group["params"]}
        states.update({key: copy.deepcopy(state[key]) for key in state.keys() - known})
        for member in members:
            member.state.update(_beside_ours(entries[member.name], member.parameter.device))


def _settle_lr_factor(
    groups: Sequence[Mapping[str, Any]],
    settings: Sequence[dict[str, Any]],
    saved_groups: Sequence[Mapping[str, Any] | None],
    of_before: bool,
) -> None:
    """Give groups of Shampoo that were saved without it what that means; say what is not this
    job's.

    Args:
        settings: what the groups take over.
        of_before: whether none of Shampoo's has it, where they are like AdamW's.
    """
    # (AdamW's have "amsgrad", Shampoo's in jobs of TorchTitan as well.)
    as_they_were = [
        loaded
        for loaded, saved in zip(settings, saved_groups, strict=True)
        if saved and "lr_factor" not in saved and (of_before or "amsgrad" not in saved)
    ]
    for loaded in as_they_were:
        loaded["lr_factor"] = 1.0
    if as_they_were:
        _logger.warning(OF_BEFORE)
        return
    for group, loaded in zip(groups, settings, strict=True):
        own = group.get("lr_factor", 1.0)
        if (theirs := loaded.get("lr_factor", own)) != own:
            _logger.warning(f"'lr_factor' is {theirs} in the checkpoint, which counts; {own} here.")


def _beside_ours(entries: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copies of the entries of a parameter that others have put there, tensors on its device."""
    theirs = {e: copy.deepcopy(v) for e, v in entries.items() if not is_state_entry(e)}
    moved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.to(device), theirs)
    return moved


def _show(
    stacks: Sequence[BlockStack], made: Mapping[Member, Mapping[str, Tensor]], states: States
) -> None:
    """Put entries into the optimizer's state; without any of them the stacks are freed."""
    # (It must not know the members, or nothing of an optimizer would be freed at once.)
    left = [sum(len(entries) - len(member.counters) for member, entries in made.items())]

    def when_gone(_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            for stack in stacks:
                stack.release()

    for member, entries in made.items():
        member.show(states[member.parameter], entries, when_gone)


def _take(name: str, entries: Mapping[str, Tensor], found: Mapping[str, Any]) -> str | None:
    """Copy what was found in the places of the entries of a parameter; what is wrong with it."""
    missing = entries.keys() - found.keys()
    if len(missing) == len(entries):
        start_anew(entries.values())
        return None
    problem = None
    for entry, mine in entries.items():
        theirs = found.get(entry)
        try:
            copy_own_part(mine, theirs)
        except (ValueError, TypeError, RuntimeError):
            shape = f"shape {tuple(theirs.shape)}" if isinstance(theirs, Tensor) else repr(theirs)
            problem = (
                f"the entry '{entry}' of optimizer.state of parameter '{name}' is "
                f"{'missing' if entry in missing else shape}, but was {type(mine).__name__} of "
                f"shape {tuple(mine.shape)}: put one there, on any device, or remove all entries."
            )
    return problem
