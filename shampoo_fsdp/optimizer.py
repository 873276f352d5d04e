"""The optimizer: `step()` and what torch.optim and checkpoints expect of it."""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import getLogger
from typing import Any, overload

import torch
from torch import Tensor

from shampoo_fsdp.agreement import gather
from shampoo_fsdp.blocks import sides_without_factor
from shampoo_fsdp.config import ShampooConfig, settings_from_keywords, validate_hyperparameters
from shampoo_fsdp.diagnostics import Diagnostics, diagnose
from shampoo_fsdp.elementwise import ElementwiseMethod
from shampoo_fsdp.exchange import allocate, release
from shampoo_fsdp.load_decision import decide
from shampoo_fsdp.loading import (
    carry_out,
    find_saved,
    flat,
    other_pieces,
    settings_to_load,
    strangers,
)
from shampoo_fsdp.mismatch import name_some
from shampoo_fsdp.parameters import (
    Replicas,
    check_parameters,
    check_replicas,
    is_first_replica,
    local_gradient,
    local_shard,
    named_param_groups,
    refuse_frozen,
    refuse_moved,
    warning_without_names,
)
from shampoo_fsdp.precision import full_precision
from shampoo_fsdp.state import OwnedBlocks, ShardedBlocks
from shampoo_fsdp.stopwatch import Stopwatch
from shampoo_fsdp.team import balance, make_teams, refuse_nonfinite

__all__ = ["Shampoo"]

_logger = getLogger(__name__)


class Shampoo(torch.optim.Optimizer):
    """Shampoo on FSDP2, HSDP, tensor-parallel, replicated or plain parameters.

    Shi et al. 2023 (arXiv 2309.06497). A parameter is cut into blocks; each block has one owner
    among the ranks of the parameter's mesh, which keeps all of its state. On a step

    1. the pieces of each gradient block travel to its owner, in one all-to-all per bucket;
    2. the owner updates factors and momentum, refreshes the inverse roots that are due,
       preconditions, and gives the direction the size of the grafted method's step;
    3. the pieces of the updates travel back and are subtracted from the shards.

    While one bucket travels, another is computed.

    Parameters that are not preconditioned (see `exclude`, `precondition_1d`) take the grafted
    method's own step on their shards, with the lr that `excluded_lr_factor` says. Blocks, and so
    the update, do not depend on the mesh.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        replicas: Replicas = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            params: `model.named_parameters()`, `model.parameters()` (then named by position, so
                that `exclude` cannot find embeddings: a warning says so), or groups of either with
                their own lr, betas, eps and weight_decay.
            lr, betas, eps, weight_decay: as in AdamW; lr may be a tensor, on the CPU. betas[1] also
                averages the factors; 1.0 sums them. For the kind of weight decay see
                `weight_decay_type`.
            replicas: the mesh (of one dimension) or process group on which plain tensors are
                replicated, as with DDP; its ranks share the work. Without it plain tensors are
                trained by this process alone.
            **settings: the fields of :class:`shampoo_fsdp.ShampooConfig`. Options of other
                optimizers of torch.optim, such as `fused`, are accepted, here and in groups, where
                they would change nothing.

        Raises:
            ValueError, TypeError: names the setting or the parameter, what was found and what is
                allowed. Raised on every rank if the ranks' plans differ.
        """
        self.config: ShampooConfig = settings_from_keywords(settings)
        validate_hyperparameters(
            self.config, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        groups, names = named_param_groups(params)
        self._built = False
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults)
        self._build(names, replicas)
        self._built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; only while constructing."""
        if getattr(self, "_built", False):
            raise RuntimeError(
                "Shampoo plans its blocks when it is built: pass all parameter groups to the "
                "constructor instead of add_param_group()."
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        validate_hyperparameters(
            self.config, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        )

    def _build(self, names: list[str], replicas: Replicas) -> None:
        members = [(p, g) for g, group in enumerate(self.param_groups) for p in group["params"]]
        check_parameters(names, [parameter for parameter, _ in members])
        check_replicas(replicas)
        self._named = "param_names" in self.param_groups[0]
        rest = iter(names)
        self._names_of_groups = [
            list(itertools.islice(rest, len(group["params"]))) for group in self.param_groups
        ]
        self._parameters: list[Tensor] = []
        self._names: list[str] = []
        self._group_of: list[int] = []
        self._frozen: list[tuple[str, Tensor]] = []
        for name, (parameter, group) in zip(names, members, strict=True):
            if parameter.requires_grad:
                self._parameters.append(parameter)
                self._names.append(name)
                self._group_of.append(group)
            else:
                self._frozen.append((name, parameter))
        self._steps = [0] * len(self._parameters)
        self._factor_steps = [0] * len(self._parameters)
        self._refreshed = [False] * len(self._parameters)
        self._seen_a_gradient = False

        self._teams, self._excluded, self._residents = make_teams(
            self._names, self._parameters, self._group_of, replicas, self.config
        )
        if self.config.exclude and not self._named:
            chosen = [self._parameters[i] for team in self._teams for i in team.indices]
            if matrices := [tuple(p.shape) for p in chosen if p.ndim > 1]:
                said = warning_without_names(len(self._parameters), matrices)
                warnings.warn(said, stacklevel=3)
        self._watch = Stopwatch(
            self._parameters[0].device if self._parameters else torch.device("cpu")
        )
        self._buckets = [(team, bucket) for team in self._teams for bucket in team.buckets]
        device = self._parameters[0].device if self._parameters else None
        self._elementwise = ElementwiseMethod(self.config, device)
        self._counted = [is_first_replica(p, replicas) for p in self._parameters]
        elements = max((bucket.elements for _, bucket in self._buckets), default=0)
        self._workspace = torch.empty(elements, dtype=torch.float32, device=device)
        for team, bucket in self._buckets:
            bucket.bind(self._workspace, team.group)
        release(self._workspace)
        self._create_state()

    def _create_state(self) -> None:
        # All state exists from the start: loading a checkpoint into an optimizer without state
        # would make torch.distributed.checkpoint run a step with gradients of zero first.
        for parameter in self._parameters:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter]["step"] = step
        for i in self._excluded:
            self.state[self._parameters[i]].update(self._elementwise.new_state(self._parameters[i]))
        for team in self._teams:
            for i, entries in team.state_entries():
                state = self.state[self._parameters[i]]
                for entry in ("factor_step", "refreshed"):
                    state[entry] = torch.zeros_like(state["step"])
                state.update(entries)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient.

        Every rank of a mesh must call it. A block whose gradient has a non-finite entry keeps its
        state and gets no update on this step but weight decay. In parameters that are not
        preconditioned it is such an entry alone that keeps its state, and its weight as well.
        Both are counted (see :meth:`counters`).

        Raises:
            ValueError: names a parameter that has moved to another device since the optimizer was
                built (another floating-point type is followed), or whose gradient is sparse or
                complex, or that was frozen when the optimizer was built, or, on all ranks and with
                on_nonfinite = "raise", is not finite. Nothing has been changed then, except on
                several ranks where some have a sparse, complex or frozen one, which the others
                cannot know: the step is taken as if it were NaN, and the ranks that have it raise
                at its end.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision(self._parameters[0].device.type if self._parameters else "cpu"):
            self._step()
        return loss

    def _step(self) -> None:
        watch = self._watch
        watch.start()
        self._follow_the_model()
        groups = [_with_plain_lr(group) for group in self.param_groups]
        gradients, problem = self._local_gradients()
        if problem and all(members.group is None for members in self._residents):
            raise problem
        if self.config.on_nonfinite == "raise":
            try:
                refuse_nonfinite(self._residents, self._names, gradients, self._workspace.device)
            except ValueError:
                if problem:
                    raise problem from None
                raise
        for i, gradient in enumerate(gradients):
            self._steps[i] += gradient is not None
            self._factor_steps[i] += gradient is not None
        # While the gradients of one bucket travel, something else is computed.
        self._send_gradients(0, gradients, groups)
        watch.lap("exchange")
        self._step_excluded(gradients, groups)
        watch.lap("excluded")
        allocate(self._workspace)
        for number, (team, bucket) in enumerate(self._buckets):
            self._send_gradients(number + 1, gradients, groups)
            watch.lap("exchange")
            steps = [self._steps[i] for i in team.indices]
            factor_steps = [self._factor_steps[i] for i in team.indices]
            bucket.precondition(groups, steps, factor_steps, watch)
            bucket.apply_own(groups)
            watch.lap("apply")
            if number:
                self._buckets[number - 1][1].apply_arriving(groups)
                watch.lap("exchange")
        release(self._workspace)
        if self._buckets:
            self._buckets[-1][1].apply_arriving(groups)
            watch.lap("exchange")
        if problem:
            raise problem

    def _follow_the_model(self) -> None:
        """Notice that it has been moved, or cast to another type, since the last step."""
        refuse_moved(self._names, self._parameters, self._workspace.device)
        for i in self._excluded:
            parameter, state = self._parameters[i], self.state[self._parameters[i]]
            if state["exp_avg"].dtype != parameter.dtype:
                for entry, new in self._elementwise.new_state(parameter).items():
                    state[entry] = state[entry].to(new.dtype)

    def _send_gradients(
        self,
        number: int,
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        if number >= len(self._buckets):
            return
        team, bucket = self._buckets[number]
        moving = [i for p in bucket.chosen if gradients[i := team.indices[p]] is not None]
        states = [self.state[self._parameters[i]] for i in moving]
        if states:
            counters = [state[name] for state in states for name in ("step", "factor_step")]
            torch._foreach_add_(counters, 1)
        for i, state in zip(moving, states, strict=True):
            if (
                not self._refreshed[i]
                and self._factor_steps[i] >= self.config.start_preconditioning_step
            ):
                self._refreshed[i] = True
                state["refreshed"].fill_(1.0)
        bucket.send_gradients([gradients[i] for i in team.indices], groups)

    def _local_gradients(self) -> tuple[list[Tensor | None], Exception | None]:
        """This rank's shard of each parameter's gradient, and the first trouble with one.

        Other ranks wait for this one, which therefore goes on with NaN in that gradient's place:
        so it is skipped everywhere, and replicas and counts of steps stay the same.
        """
        gradients: list[Tensor | None] = []
        problem: Exception | None = None
        try:
            refuse_frozen(self._frozen)
        except ValueError as error:
            problem = error
        for name, parameter in zip(self._names, self._parameters, strict=True):
            try:
                gradients.append(local_gradient(name, parameter))
            except Exception as error:
                problem = problem or error
                gradients.append(torch.full_like(local_shard(parameter), torch.nan))
        if not self._seen_a_gradient:
            self._seen_a_gradient = any(gradient is not None for gradient in gradients)
            if not self._seen_a_gradient:
                warnings.warn(
                    "no parameter of this optimizer has a gradient; was it built before "
                    "fully_shard(), which replaces the parameters?",
                    stacklevel=4,
                )
        return gradients, problem

    def _step_excluded(
        self, gradients: Sequence[Tensor | None], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        for number, group in enumerate(groups):
            scaled = dict(group)
            for name in {"lr", "initial_lr"} & group.keys():
                # Both, as "independent" weight decay takes their ratio.
                scaled[name] = self.config.excluded_lr_factor * group[name]
            mine = [
                i
                for i in self._excluded
                if self._group_of[i] == number and gradients[i] is not None
            ]
            if mine:
                self._elementwise.step(
                    [self._parameters[i] for i in mine],
                    [g for i in mine if (g := gradients[i]) is not None],
                    [self.state[self._parameters[i]] for i in mine],
                    [self._steps[i] for i in mine],
                    [self._counted[i] for i in mine],
                    scaled,
                )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's: all tensors are those of the optimizer.

        Where several ranks share blocks, their state is in :class:`ShardedBlocks`, a DTensor, for
        torch.distributed.checkpoint, also with `full_state_dict`. In one process tensors are plain
        or, where they consist of several blocks, behave so (see :class:`OwnedBlocks`).
        """
        for entries in self.state.values():
            for value in entries.values() if isinstance(entries, dict) else ():
                local = value.to_local() if isinstance(value, ShardedBlocks) else value
                if isinstance(local, OwnedBlocks):
                    local.forget_reading()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, keeping the types of the state here.

        Also a state dict of AdamW, whose moments are Shampoo's: factors start anew. Parameters are
        found by their names if both optimizers have been given names; where settings or parameters
        differ `on_mismatch` decides. All ranks of the parameters' meshes must call it.

        A parameter whose `factor_step` is zero starts its factors anew, whatever is loaded for
        them: :class:`shampoo_fsdp.checkpoint.ShampooLoadPlanner` sets it where they do not fit.

        Raises:
            ValueError: on every rank, names the parameter and the entry or setting that does not
                fit; nothing has been changed then.
        """
        named = dict(zip(self._names, self._parameters, strict=True))
        here = flat({name: self.state[parameter] for name, parameter in named.items()})
        problem, saved, other = None, {}, []
        try:
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = hook(self, state_dict) or state_dict
            keys, saved_groups = find_saved(
                self._names_of_groups, self._named, state_dict["param_groups"]
            )
            entries = {n: state_dict["state"].get(keys.get(n), {}) for n in named}
            groups = [
                settings_to_load(self.config, group, saved_group)
                for group, saved_group in zip(self.param_groups, saved_groups, strict=True)
            ]
            saved = flat(entries)
            decision = decide(here, saved, self.config.on_mismatch)
            other = other_pieces(here, saved, decision)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = str(error) if isinstance(error, ValueError) else repr(error)
        # Twice, since a set may hear of the trouble in another one through a third.
        for residents in (*self._residents, *self._residents):
            problems = gather(residents.group, residents.ranks, problem)
            problem = problem or next(filter(None, problems), None)
        if problem:
            raise ValueError(problem)
        for residents in self._residents:
            other += itertools.chain(*gather(residents.group, residents.ranks, other))
        frozen = [name for name, _ in self._frozen if state_dict["state"].get(keys.get(name))]
        if frozen:
            _logger.warning(f"The saved state of {name_some(frozen)}, frozen here, is not used.")
        if said := str(decision.report):
            _logger.warning(f"Not all optimizer state comes from the state dict: {said}.")

        for group, settings in zip(self.param_groups, groups, strict=True):
            group.update(settings)
        carry_out(here, saved, decision, set(other))
        known = {key for group in state_dict["param_groups"] for key in group["params"]}
        for key in state_dict["state"].keys() - known:  # what others keep beside parameters
            self.state[key] = copy.deepcopy(state_dict["state"][key])
        for i, (name, parameter) in enumerate(named.items()):
            state = self.state[parameter]
            for entry in strangers(state):
                del state[entry]
            state.update(strangers(entries[name]))
            self._steps[i] = int(state["step"])
            self._factor_steps[i] = int(state.get("factor_step", state["step"]))
            if self._factor_steps[i] == 0 and "refreshed" in state:
                state["refreshed"].zero_()
            self._refreshed[i] = bool(state.get("refreshed", 0))
        for team, bucket in self._buckets:
            bucket.state_was_loaded(
                [self._factor_steps[i] for i in team.indices],
                [self._refreshed[i] for i in team.indices],
            )
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "Shampoo cannot be copied or pickled, since its blocks are views of the stacks and its "
            "plan belongs to this process: build another one and load_state_dict() into it."
        )

    def counters(self) -> Tensor:
        """[inverse roots taken, roots that failed, blocks skipped for a bad gradient, entries of
        other parameters skipped for one] so far, for this rank's blocks and shards; int64, on the
        parameters' device. Of replicas one counts, so that ranks may add theirs."""
        stacks = [stack for _, bucket in self._buckets for stack in bucket.stacks]
        device = self._parameters[0].device if self._parameters else None
        counts = torch.zeros(4, dtype=torch.int64, device=device)
        for stack in stacks:
            counts[0] += stack.refreshes
            counts[1] += stack.failed_roots
            counts[2] += stack.skipped_blocks
        counts[3] += self._elementwise.skipped_entries
        return counts

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """Figures of the last step, for this rank's blocks; the host waits for the device."""
        stacks = [
            (
                stack,
                [self._names[team.indices[p]] for p in stack.parameters],
                [self._factor_steps[team.indices[p]] for p in stack.parameters],
            )
            for team, bucket in self._buckets
            for stack in bucket.stacks
        ]
        betas = [group["betas"][1] for group in self.param_groups]
        return diagnose(stacks, self._watch.milliseconds(), betas)

    def matrices_left_to_grafting(self) -> list[str]:
        """Names of the parameters of two or more dimensions that are not preconditioned."""
        return [self._names[i] for i in self._excluded if self._parameters[i].ndim > 1]

    def sides_without_factor(self) -> dict[tuple[int, ...], list[int]]:
        """For each shape of block, of all ranks, the sides that have no factor; see
        `max_factor_ratio` and `large_dim`."""
        shapes = {s for team in self._teams for grid in team.plan.grids for s in grid.block_shapes}
        found = {shape: sides_without_factor(shape, self.config) for shape in sorted(shapes)}
        return {shape: sides for shape, sides in found.items() if sides}

    def summary(self) -> dict[str, float]:
        """Figures about the plan, the same on every rank of a mesh."""
        preconditioned = [i for team in self._teams for i in team.indices]
        return {
            "parameters_preconditioned": len(preconditioned),
            "parameters_total": len(self._parameters),
            "elements_preconditioned": sum(self._parameters[i].numel() for i in preconditioned),
            "elements_total": sum(p.numel() for p in self._parameters),
            **balance(self._teams),
        }


def _with_plain_lr(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group whose lr, which may be a tensor on the CPU, is a number."""
    return {**group, **{k: float(group[k]) for k in ("lr", "initial_lr") if k in group}}
