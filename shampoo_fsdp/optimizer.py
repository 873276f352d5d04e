"""The optimizer: `step()` and what torch.optim and checkpoints expect of it."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings, settings_from_keywords
from shampoo_fsdp.plan.grid import patterns_without_heads
from shampoo_fsdp.rules.device import on_device, reasons
from shampoo_fsdp.rules.factors import sides_without_factor
from shampoo_fsdp.rules.precision import full_precision
from shampoo_fsdp.runtime.diagnostics import Diagnostics, diagnose
from shampoo_fsdp.runtime.excluded import ExcludedParameters
from shampoo_fsdp.runtime.groups import check_entries, check_group, copied, given_in
from shampoo_fsdp.runtime.parameters import (
    check_parameters,
    count,
    find_gradients,
    refuse_moved,
    warning_without_names,
)
from shampoo_fsdp.runtime.ranks import Replicas, check_replicas
from shampoo_fsdp.runtime.schedule import take_steps
from shampoo_fsdp.runtime.stopwatch import Stopwatch
from shampoo_fsdp.runtime.team import make_parameters, refuse_nonfinite, summary
from shampoo_fsdp.state import create_state, forget_reading, load_state
from shampoo_fsdp.validation import name_some

__all__ = ["Shampoo"]


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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_group(self.config, defaults)
        self._built = False
        super().__init__(copied(params), defaults)
        self._build(replicas)
        self._built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; only while constructing."""
        if getattr(self, "_built", False):
            raise RuntimeError(
                "Shampoo plans its blocks when it is built: pass all parameter groups to the "
                "constructor instead of add_param_group()."
            )
        check_entries(param_group)
        super().add_param_group(param_group)
        check_group(self.config, self.param_groups[-1])

    def _build(self, replicas: Replicas) -> None:
        check_replicas(replicas)
        self._given = given_in(self.param_groups)
        check_parameters(self._given.parameters)
        device = next((p.device for _, p, _ in self._given.trained), torch.device("cpu"))
        self.chosen_by_device = reasons(self.config, device)
        """Which settings were not given and follow from the device, and why: one line, or ""."""
        self.config = on_device(self.config, device)
        self._parameters = make_parameters(self._given.trained, self.state, replicas, self.config)
        create_state(self._parameters, self.config)
        self._excluded = ExcludedParameters(
            [member for member in self._parameters.members if member.part is None],
            self.config,
            self._parameters.device,
        )
        matrices = [
            tuple(member.parameter.shape)
            for member in self._parameters.members
            if member.part and member.parameter.ndim > 1
        ]
        if self.config.exclude and not self._given.named and matrices:
            warnings.warn(
                warning_without_names(len(self._parameters.members), matrices), stacklevel=3
            )
        names = [member.name for member in self._parameters.members if member.part]
        # No error: a stage of a pipeline may have no attention.
        if unmatched := patterns_without_heads(names, self.config):
            warnings.warn(
                f"setting 'split_heads' has {name_some(unmatched)}, which the name of no "
                "preconditioned parameter matches; nothing is cut there.",
                stacklevel=3,
            )
        self._watch = Stopwatch(self._parameters.device)
        self._seen_a_gradient = False

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
        with full_precision(self._parameters.device.type):
            self._step()
        return loss

    def _step(self) -> None:
        parameters, watch = self._parameters, self._watch
        watch.start()
        refuse_moved(parameters.members, self._parameters.device)
        self._excluded.follow_the_model()
        groups = [GroupSettings.of(group, self.config) for group in self.param_groups]
        problem = find_gradients(parameters.members, self._given.frozen)
        self._warn_without_gradients()
        if problem and all(ranks.group is None for ranks in parameters.rank_sets):
            raise problem
        if self.config.on_nonfinite == "raise":
            try:
                refuse_nonfinite(parameters)
            except ValueError:
                if problem:
                    raise problem from None
                raise
        count(parameters.members, self.config.start_preconditioning_step)
        take_steps(
            parameters.buckets,
            parameters.workspace,
            groups,
            watch,
            meanwhile=lambda: self._excluded.step(self.param_groups),
        )
        for member in parameters.members:
            member.gradient = None  # the caller may free them
        if problem:
            raise problem

    def _warn_without_gradients(self) -> None:
        if not self._seen_a_gradient:
            self._seen_a_gradient = any(m.gradient is not None for m in self._parameters.members)
            if not self._seen_a_gradient:
                warnings.warn(
                    "no parameter of this optimizer has a gradient; was it built before "
                    "fully_shard(), which replaces the parameters?",
                    stacklevel=4,
                )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's: all tensors are those of the optimizer.

        Where several ranks share blocks, their state is in ShardedBlocks, a DTensor, for
        torch.distributed.checkpoint, also with `full_state_dict`. In one process tensors are plain
        or, where they consist of several blocks, behave so (see OwnedBlocks).
        """
        forget_reading(self.state)
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

        def read() -> dict[str, Any]:
            result = state_dict
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                result = hook(self, result) or result
            return result

        strangers = load_state(self._parameters, self._given, self.param_groups, self.config, read)
        self.state.update(strangers)
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
        counts = torch.zeros(4, dtype=torch.int64, device=self._parameters.device)
        for bucket in self._parameters.buckets:
            for owned in bucket.stacks:
                counts[0] += owned.stack.refreshes
                counts[1] += owned.stack.failed_roots
                counts[2] += owned.stack.skipped_blocks
        counts[3] += self._excluded.skipped_entries
        return counts

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """Figures of the last step, for this rank's blocks; the host waits for the device."""
        stacks = [owned for bucket in self._parameters.buckets for owned in bucket.stacks]
        betas = [group["betas"][1] for group in self.param_groups]
        return diagnose(stacks, self._watch.milliseconds(), betas)

    def matrices_left_to_grafting(self) -> list[str]:
        """Names of the parameters of two or more dimensions that are not preconditioned."""
        return [member.name for member in self._excluded.members if member.parameter.ndim > 1]

    def sides_without_factor(self) -> dict[tuple[int, ...], list[int]]:
        """For each shape of block, of all ranks, the sides that have no factor; see
        `max_factor_ratio` and `large_dim`."""
        parts = [member.part for member in self._parameters.members if member.part]
        shapes = {shape for part in parts for shape in part.grid.block_shapes}
        found = {shape: sides_without_factor(shape, self.config) for shape in sorted(shapes)}
        return {shape: sides for shape, sides in found.items() if sides}

    def summary(self) -> dict[str, float]:
        """Figures about the plan, the same on every rank of a mesh."""
        return dict(self._summary)

    @functools.cached_property
    def _summary(self) -> dict[str, float]:
        return summary(self._parameters, self.config)
