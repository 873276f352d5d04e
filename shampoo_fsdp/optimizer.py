"""The optimizer: `step()` and what torch.optim and checkpoints expect of it."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_fsdp.build import build, check, waits
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings, settings_from_keywords
from shampoo_fsdp.kernels.language import kernels
from shampoo_fsdp.rules.matrices import sides_without_factor
from shampoo_fsdp.rules.precision import full_precision
from shampoo_fsdp.runtime.diagnostics import Diagnostics, counters, diagnose
from shampoo_fsdp.runtime.groups import (
    check_entries,
    check_group,
    find_saved,
    settings_to_load,
    settle_initial_lr,
    take_types,
    warn_of_initial_lr,
)
from shampoo_fsdp.runtime.parameters import refuse_moved
from shampoo_fsdp.runtime.ranks import Replicas, group_of
from shampoo_fsdp.runtime.team import Parameters
from shampoo_fsdp.state import State

__all__ = ["Shampoo"]


class Shampoo(torch.optim.Optimizer):
    """Shampoo on FSDP2, HSDP, tensor-parallel, replicated or plain parameters.

    A language model, once it is sharded; embeddings and the output layer take AdamW's step:

        optimizer = Shampoo(param_groups(model, weight_decay=0.1), lr=3e-4)

    Any module, each matrix and convolution of it:

        optimizer = Shampoo(param_groups(model), lr=1e-3, lr_factor=1, exclude=[])

    Keep AdamW's lr, betas, eps, weight decay, schedule and clipping: `lr_factor` is what Shampoo
    wants of lr, and 1 for convolutions. Then `step()` and `zero_grad()` as with any optimizer.

    How it works (Shi et al. 2023, arXiv 2309.06497): a parameter is cut into blocks, in the same
    way on every mesh; each has one owner among the ranks of the mesh, which keeps its state. On a
    step

    1. the pieces of each gradient block travel to its owner, in one all-to-all per bucket;
    2. the owner updates factors and momentum, refreshes the inverse roots that are due,
       preconditions, and gives the direction the size of the grafted method's step;
    3. the pieces of the updates travel back and are subtracted from the shards.

    Parameters that are not preconditioned (see `exclude`, `precondition_1d`) take the grafted
    method's own step on their shards, with the lr that `excluded_lr_factor` says.
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
            params: `shampoo_fsdp.param_groups(model)`, which knows embeddings by their type,
                `model.named_parameters()`, or groups of these, or of plain parameters and
                'param_names', with their own lr, lr_factor, betas, eps and weight_decay. Without
                names `exclude` has to be [], or there are no matrices.
            lr, betas, eps, weight_decay: as in AdamW; lr may be a tensor, on the CPU. betas[1] also
                averages the factors. For the kind of weight decay see `weight_decay_type`.
            replicas: the mesh (of one dimension) or process group on which plain tensors are
                replicated, as with DDP; its ranks share the work. Without it plain tensors are
                trained by this process alone.
            **settings: the fields of :class:`shampoo_fsdp.ShampooConfig`, or one of these as
                `config`. Options of other optimizers of torch.optim, such as `fused`, are accepted,
                here and in groups, where they would change nothing.

        Raises:
            ValueError, TypeError: names the setting or the parameter, what was found and what is
                allowed. Raised on every rank if the ranks' plans differ.
        """
        self._given, self._replicas = settings_from_keywords(settings), group_of(replicas)
        self._is_embedding: dict[str, bool] = {}
        self._built: State | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults["lr_factor"] = self.config.lr_factor
        check_group(self.config, defaults)
        self._own_lrs: list[tuple[float | None, float]] = []
        self._loaded_lrs: list[float] = []
        if isinstance(params, set):  # which torch refuses in groups: each rank has another order
            params = [{"params": params}]
        # (torch.optim changes groups.)
        given = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
        super().__init__(given, defaults)
        if self._waits:
            check(self.param_groups, self._given)
        else:
            self._ready()

    @property
    def config(self) -> ShampooConfig:
        """The settings; once parameters are planned, with the device's defaults."""
        return self._built.parameters.config if self._built else self._given

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; a RuntimeError if a step has been taken."""
        if self._built and self._built.parameters.has_values:
            raise RuntimeError(
                "add_param_group() after a step. Build another one with all groups and "
                'on_mismatch = "rebuild", and load the state_dict() of this one into it.'
            )
        check_entries(param_group)
        self._is_embedding.update(take_types(param_group))
        super().add_param_group(param_group)
        check_group(self._given, self.param_groups[-1])

    def _ready(self) -> State:
        """What belongs to the parameters that the groups have now."""
        if self._built is None or not self._built.parameters.fits(self.param_groups):
            self._built = None
            self.state.clear()  # before the new one is made: there may be no memory for both
            self._built = self._build()
        return self._built

    def _build(self) -> State:
        given, replicas = self._given, self._replicas
        return build(self.param_groups, self.state, given, replicas, self._is_embedding)

    @property
    def _parameters(self) -> Parameters:
        return self._ready().parameters

    @property
    def _waits(self) -> bool:
        return self._built is None and waits(self.param_groups, self._replicas)

    @property
    def chosen_by_device(self) -> str:
        """Which settings were not given and follow from the device, and why: one line, or ""."""
        return self._parameters.chosen_by_device

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient.

        Every rank of a mesh must call it. A block whose gradient has a non-finite entry keeps its
        state and gets no update but weight decay; after 10 such steps in a row not that either, and
        a warning of `logging` names the parameter, as it does where roots keep failing. In other
        parameters such an entry alone stays as it is. Both are counted (see :meth:`counters`).

        A first step with an lr and gradients of zero, with which loaders of checkpoints let state
        be made, changes nothing and does not count.

        Raises:
            ValueError: names a parameter that has moved to another device, or was frozen when the
                optimizer was built, or whose gradient is sparse or complex or, on all ranks and
                with on_nonfinite = "raise", not finite. Nothing has been changed then, except where
                one of several ranks has a sparse, complex or frozen one: the step is taken as if it
                were NaN, and this rank raises at its end.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        built = self._ready()
        parameters, built.whole = built.parameters, None
        parameters.watch.start()
        refuse_moved(parameters.members, parameters.device)
        with full_precision(parameters.device.type), kernels(self.config.kernels):
            trouble = built.take_back(self.state)
            settle_initial_lr(self.param_groups, self._own_lrs, self._loaded_lrs)
            self._own_lrs = []
            problem = parameters.step(self.param_groups, trouble)
            if parameters.has_seen_gradients:
                built.streaks.look()
        if problem:
            raise problem
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's: all tensors are those of the optimizer.

        Where several ranks share blocks, their state is in ShardedBlocks, a DTensor, for
        torch.distributed.checkpoint, also with `full_state_dict`; in one process tensors are, or
        behave as, plain ones. What one rank can save alone: :meth:`consolidate_state_dict`.

        As long as the model may still have to be sharded or materialised there is no state in it:
        Accelerate asks before it shards.
        """
        state = self.state
        if not self._waits:
            built = self._ready()
            self.state = built.whole or state  # type: ignore[assignment]
            built.whole = None
        try:
            return super().state_dict()
        finally:
            self.state = state

    @torch.no_grad()
    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Let the next :meth:`state_dict` of one rank have whole tensors, which it may save alone.

        All ranks must call it, for tools that ask the first rank alone, as many do under DDP: what
        torch.save writes there any mesh can load. (Lightning knows the name, that of
        torch.distributed.optim.ZeroRedundancyOptimizer.)

        Args:
            to: the rank; None for all. The tensors, on the CPU, are kept for one call of
                state_dict() or until the next step.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._ready().gather(self.state, keep=to in (rank, None))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, keeping the types of the state here.

        Also a state dict of AdamW, whose moments are Shampoo's: factors start anew. Parameters are
        found by their names if both optimizers have been given names; where settings or parameters
        differ `on_mismatch` decides. All ranks of the parameters' meshes must call it.

        Raises:
            ValueError: on every rank, names the parameter and the entry or setting that does not
                fit; nothing has been changed then.
        """

        def read() -> dict[str, Any]:
            result = state_dict
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                result = hook(self, result) or result
            return result

        own = [(group.get("initial_lr"), float(group["lr"])) for group in self.param_groups]
        self._own_lrs = self._own_lrs or own  # it may be loaded several times before a step
        if self._waits and state_dict.get("state") == {}:
            _, saved = find_saved(self.param_groups, read()["param_groups"])
            loaded = settings_to_load(self.config, self.param_groups, saved)
            for group, settings in zip(self.param_groups, loaded, strict=True):
                group.update(settings)
        else:
            self._ready().load(self.param_groups, self.state, read)
        self._loaded_lrs = [float(group["lr"]) for group in self.param_groups]
        if self.config.weight_decay_type == "independent":
            warn_of_initial_lr(self.param_groups, self._own_lrs)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "Shampoo cannot be copied or pickled: build another one and load_state_dict() into it."
        )

    def counters(self) -> Tensor:
        """[inverse roots taken, roots that failed, blocks skipped for a bad gradient, entries of
        other parameters skipped for one] so far, for this rank's blocks and shards; int64, on the
        parameters' device. Of replicas one counts, so that ranks may add theirs."""
        return counters(self._parameters)

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """Figures of the last step, for this rank's blocks; the host waits for the device."""
        built = self._ready()
        if problem := built.take_back(self.state):
            raise problem
        parameters = built.parameters
        groups = [GroupSettings.of(group, self.config) for group in self.param_groups]
        return diagnose(parameters.buckets, parameters.watch.milliseconds(), groups)

    def matrices_left_to_grafting(self) -> list[str]:
        """Names of the parameters of two or more dimensions that are not preconditioned."""
        members = self._parameters.excluded.members
        return [member.name for member in members if member.parameter.ndim > 1]

    def sides_without_factor(self) -> dict[tuple[int, ...], list[int]]:
        """For each shape of block, of all ranks, the sides that have no factor; see
        `max_factor_ratio` and `large_dim`."""
        parts = [member.part for member in self._parameters.members if member.part]
        shapes = {shape for part in parts for shape in part.grid.block_shapes}
        found = ((shape, sides_without_factor(shape, self.config)) for shape in sorted(shapes))
        return {shape: sides for shape, sides in found if sides}

    def summary(self) -> dict[str, float]:
        """Figures about the plan, the same on every rank of a mesh."""
        return dict(self._parameters.summary)
