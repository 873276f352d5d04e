"""All blocks of one shape that a rank owns, handled together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.kernels.momenta import momenta
from shampoo_fsdp.rules.grafting import (
    LARGEST_GRADIENT,
    accelerate,
    bias_correction,
    graft_numbers,
    graft_step,
    one_or_each,
    second_moment_name,
    update_second_moment,
)
from shampoo_fsdp.rules.layout import saved_entries, split_rows
from shampoo_fsdp.rules.matrices import Positions, blank, largest_entries, on_device, per_block
from shampoo_fsdp.rules.precision import products_in
from shampoo_fsdp.rules.rule import Rule, Step

# Elements of factors whose roots are taken in one call: five to ten times their memory is needed,
# and while all roots are refreshed on each step, as at the start, all would be many.
_AT_ONCE = 2**25


class BlockStack:
    """State and update of blocks of one shape (d_1, ..., d_k), stacked as [B, d_1, ..., d_k].

    Blocks are in the order of their refresh phase, so that those due on a step are neighbours.
    `gradient`, in fp32, is filled with the gradient blocks; a step, which is :meth:`begin`,
    :meth:`accumulate`, :meth:`refresh` and :meth:`direct`, overwrites it with the update blocks.
    """

    def __init__(
        self, shape: Sequence[int], phases: Sequence[int], config: ShampooConfig, gradient: Tensor
    ) -> None:
        """
        Args:
            shape: of a block.
            phases: of each block, ascending.
            gradient: [B, d_1, ..., d_k], the memory to work in.
        """
        self.shape = tuple(shape)
        self.phases = list(phases)
        self.config = config
        self.gradient = gradient
        self.device = device = gradient.device
        self.allocate()
        self.norms: tuple[Tensor, Tensor] | None = None
        """The norm of the last direction, and what grafting multiplied it by, [B, 1, ...]."""
        self.refreshes = 0
        self.skipped = torch.zeros(2, len(phases), dtype=torch.int32, device=device)
        """How often each block was skipped for a bad gradient: in all, and in a row until now."""
        self.failed_roots = torch.zeros_like(self.skipped)
        """The same of roots that failed, and of refreshes with such a root."""

    def allocate(self) -> None:
        """Make the state, as it is before the first step."""
        self.saved = {
            name: torch.zeros(len(self.phases), *kept, dtype=dtype, device=self.device)
            for name, (kept, dtype) in saved_entries(self.shape, self.config).items()
        }
        """The state as checkpoints have it, stacked."""
        self.state = split_rows(self.saved, self.shape, self.config)
        """The same, with a tensor for each matrix of a block."""
        self.rule: Rule = self.config.rule(self.shape, self.config, self.state)
        self.rule.restart(slice(None))
        self._second_moment = self.state.get(second_moment_name(self.config.grafting) or "")

    def release(self) -> None:
        """Forget the state, until the next :meth:`allocate`; its memory is free when no view of it
        is left."""
        self.saved, self.state, self._second_moment = {}, {}, None
        del self.rule

    def begin(self, step: Step) -> Step:
        """Fill in the bias corrections."""
        group, (beta1, beta2) = step.group, step.group.betas
        step.correction = self._correction(beta2, step.factor_steps)
        step.momentum_correction = self._correction(beta1, step.steps, group.beta3)
        step.graft_correction = self._correction(group.graft_beta2, step.steps)
        return step

    def accumulate(self, step: Step) -> None:
        """Let the gradients in `gradient` into the factors, the momentum and graft statistics.

        A block with a non-finite or excessive gradient is skipped: its state stays, its update is
        zero.
        """
        gradient = self.gradient
        size = largest_entries(gradient.flatten(1))
        usable = size < LARGEST_GRADIENT  # false for NaN
        step.usable, step.unusable = usable.float(), usable.logical_not()
        step.size = size.masked_fill_(step.unusable, 0.0)
        step.rate = step.usable * step.weight
        step.in_one_pass = all(step.refreshed) and self.rule.skips_blocks(gradient)
        if not step.in_one_pass:
            blank(gradient, per_block(step.usable, gradient.ndim))
        with products_in(self.config.matmul_precision or "highest"):
            self.rule.accumulate(gradient, step)
        if not step.in_one_pass:
            self._average(step)
        skipped = step.unusable
        if not all(step.active):
            skipped = skipped & on_device(step.active, self.device)
        _tally(self.skipped, skipped, step.unusable)

    def refresh(self, step: Step) -> None:
        """Take the roots or eigenbases of the blocks that are due anew."""
        if not self.rule.full:
            return
        most = max(1, _AT_ONCE // sum(self.shape[i] ** 2 for i in self.rule.full))
        due = self._due(step)
        # Those of one call are all refreshed for the first time, or none is.
        for cold in (True, False):
            same = [b for b in due if step.cold[b] == cold]
            for start in range(0, len(same), most):
                self._refresh(same[start : start + most], cold, step)

    def _refresh(self, chosen: list[int], cold: bool, step: Step) -> None:
        where: slice | Tensor = slice(chosen[0], chosen[-1] + 1)
        if len(chosen) != chosen[-1] + 1 - chosen[0]:
            where = on_device(chosen, self.device)
        own = [step.factor_steps[b] for b in chosen]
        correction = self._correction(step.group.betas[1], own)
        failed = self.rule.refresh(where, cold, correction).to(self.device)
        failures = failed.sum(0)
        _tally(self.failed_roots, failures, failures.bool(), where)
        self.refreshes += failed.numel()

    def direct(self, step: Step) -> None:
        """Replace the gradients in `gradient` by the updates D, to be subtracted times lr."""
        with products_in(self.config.matmul_precision or "highest"):
            self._direct(step)
        if self.config.momentum:
            weights = [1.0 if steps <= 1 else 1.0 - self.config.dampening for steps in step.steps]
            weight = per_block(one_or_each(weights, self.device), self.gradient.ndim)
            buffer = self.state["momentum_buffer"].float()
            each = per_block(step.usable, self.gradient.ndim)
            accelerate(self.config, self.gradient, buffer, weight, each)
            self._keep("momentum_buffer", buffer)

    def health(self, step: Step) -> tuple[float, float]:
        """The largest condition number of a factor, and the largest residual of a root; the host
        waits for the device."""
        if not (self.rule.full and all(step.refreshed)):
            return 0.0, 0.0
        health = self.rule.health(step.correction)
        condition, residual = (float(figures.nan_to_num(0.0).amax()) for figures in health)
        return condition, residual

    def _average(self, step: Step) -> None:
        """Let the gradients into the momentum and the second moment."""
        gradient, each = self.gradient, per_block(step.usable, self.gradient.ndim)
        rate = (1.0 - step.group.betas[0]) * each
        self._keep("exp_avg", self.state["exp_avg"].float().lerp_(gradient, rate))
        if self._second_moment is not None:
            graft_beta2 = step.group.graft_beta2
            decay = 1.0 - (1.0 - graft_beta2) * each
            method = self.config.grafting
            moment = self._second_moment.float()
            update_second_moment(method, moment, gradient, decay, graft_beta2)
            if moment is not self._second_moment:
                self._second_moment.copy_(moment)

    def _direct(self, step: Step) -> None:
        """Put the preconditioned and grafted momentum, beta3 M' + (1 - beta3) G, into `gradient`.

        M' is the last momentum; with M = beta1 M' + (1 - beta1) G it is a mix of M and G.
        """
        config, gradient, rule = self.config, self.gradient, self.rule
        if step.in_one_pass:
            mixed, graft_norm = self._average_in_one_pass(step)
            self._scale(rule.direction(mixed, step, mixed), graft_norm, step)
            return
        exp_avg = self.state["exp_avg"].float()
        rule.observe(gradient, step)
        share = _share(step)
        each = per_block(step.usable, gradient.ndim)
        grafted = config.grafting != "none"
        # Without roots a block takes the grafted method's direction, if there is no better one.
        known = step.refreshed if grafted or not rule.works_cold else [True]
        graft_norm = cold_update = None
        # What is only multiplied, and measured, is made in the type of the products at once.
        momentum = self._mixed(exp_avg, share, rule.products_in if any(known) else torch.float32)
        if any(known) and grafted:
            graft, factor = self._graft(momentum, step)
            graft_norm = _norms(graft) * (each * factor)
            del graft  # as large as all gradients of the stack
        if not all(known):
            whole = momentum
            if momentum.dtype != torch.float32:
                whole = self._mixed(exp_avg, share, torch.float32)
            graft, factor = self._graft(whole, step)
            if not any(known):
                torch.mul(graft, each * factor, out=gradient)
                return
            cold_update = graft * (each * factor)
            del graft
        out = gradient if momentum.dtype == gradient.dtype else torch.empty_like(momentum)
        self._scale(rule.direction(momentum, step, out), graft_norm, step)
        if cold_update is not None:
            cold = per_block(on_device(known, self.device).logical_not_(), gradient.ndim)
            torch.where(cold, cold_update, gradient, out=gradient)

    def _scale(self, direction: Tensor, graft_norm: Tensor | None, step: Step) -> None:
        """Put the direction into `gradient`, with the norm that it shall have, 0 where the gradient
        is not usable."""
        norm = _norms(direction)
        if graft_norm is None:
            scale = per_block(step.usable / step.momentum_correction, direction.ndim)
        else:
            scale = (graft_norm / norm).masked_fill_(norm == 0.0, 0.0)
        self.norms = norm, scale
        torch.mul(direction, scale, out=self.gradient)

    def _average_in_one_pass(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """The averages, the momentum to precondition, in the type of the products, and the norms of
        the grafted steps, by a kernel; gradients may be as they came."""
        method, group = self.config.grafting, step.group
        corrections = step.momentum_correction, step.graft_correction
        eps, factor = graft_numbers(method, *corrections, group.graft_eps)
        mixed = torch.empty_like(self.gradient, dtype=self.rule.products_in)
        tensors = self.gradient, step.usable, self.state["exp_avg"], self._second_moment, mixed
        rates = 1.0 - group.betas[0], 1.0 - group.graft_beta2
        norms = momenta(*tensors, *rates, _share(step), eps, factor, sums=method == "adagrad")
        return mixed, per_block(norms, mixed.ndim) if method != "none" else None

    def _mixed(self, exp_avg: Tensor, share: float, dtype: torch.dtype) -> Tensor:
        """share M + (1 - share) G; what is fp32 in the gradient's memory, if it is not M itself."""
        if share == 1.0:
            return exp_avg.to(dtype)
        gradient = self.gradient
        out = gradient if dtype == gradient.dtype else torch.empty_like(gradient, dtype=dtype)
        return torch.lerp(gradient, exp_avg, share, out=out)

    def _graft(self, momentum: Tensor, step: Step) -> tuple[Tensor, float | Tensor]:
        first = per_block(step.momentum_correction, momentum.ndim)
        second = per_block(step.graft_correction, momentum.ndim)
        method, eps = self.config.grafting, step.group.graft_eps
        moment = None if self._second_moment is None else self._second_moment.float()
        return graft_step(method, momentum, moment, first, second, eps)

    def _keep(self, name: str, values: Tensor) -> None:
        if self.state[name].dtype != torch.float32:  # else they are the state itself
            self.state[name].copy_(values)

    def _due(self, step: Step) -> list[int]:
        """Positions of the blocks whose roots are refreshed on this step, ascending."""
        period = self.config.refresh_period
        return [
            b
            for b, phase in enumerate(self.phases)
            if step.cold[b]
            or (
                step.active[b]
                and step.refreshed[b]
                and (step.steps[b] + phase) % period(step.factor_steps[b]) == 0
            )
        ]

    def _correction(
        self, beta: float, steps: Sequence[int], last: float | None = None
    ) -> float | Tensor:
        used = self.config.use_bias_correction
        return bias_correction(beta, steps, self.device, last) if used else 1.0


def _tally(
    counts: Tensor, times: Tensor, streak_goes_on: Tensor, where: Positions = slice(None)
) -> None:
    """Count how often something went wrong now, [n], for the blocks at n positions."""
    total, streak = counts[0][where], counts[1][where]  # views of a slice
    total += times
    streak += times.bool()
    streak *= streak_goes_on
    if isinstance(where, Tensor):
        counts[0][where], counts[1][where] = total, streak


def _norms(blocks: Tensor) -> Tensor:
    """Of each block, [B, 1, ...], in fp32."""
    inner = tuple(range(1, blocks.ndim))
    norms: Tensor = torch.linalg.vector_norm(blocks, 2, inner, True, dtype=torch.float32)
    return norms


def _share(step: Step) -> float:
    """Of M in what is preconditioned, the rest being G."""
    beta1 = step.group.betas[0]
    return step.group.beta3 / beta1 if beta1 else 1.0
