"""All blocks of one shape that a rank owns, handled together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.grafting import (
    LARGEST_GRADIENT,
    graft_step,
    second_moment_name,
    update_second_moment,
)
from shampoo_fsdp.matrices import per_block
from shampoo_fsdp.planner import OwnedBlock
from shampoo_fsdp.preconditioners import PRECONDITIONERS
from shampoo_fsdp.state_layout import saved_entries, split_rows
from shampoo_fsdp.stopwatch import Stopwatch
from shampoo_fsdp.transfer import to_device

__all__ = ["BlockStack", "Clock"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Clock:
    """Where the blocks of a stack are in time; one entry for each block."""

    steps: Sequence[int]
    """Gradients of the block's parameter so far, this one included."""
    factor_steps: Sequence[int]
    """Of these the ones since its factors were started, see `load_state_dict`."""
    active: Sequence[bool]
    """Whether the parameter has a gradient on this step. (The gradient blocks of one that has none
    must have been filled with NaN.)"""


@dataclass(frozen=True)
class Corrections:
    """Bias corrections: numbers, or tensors [B]."""

    factors: float | Tensor
    momentum: float | Tensor
    graft: float | Tensor


class BlockStack:
    """State and update of blocks of one shape (d_1, ..., d_k), stacked as [B, d_1, ..., d_k].

    Blocks are in the order of their refresh phase, so that those due on a step are neighbours.
    The exchange fills `gradient`, in fp32, with the gradient blocks; :meth:`step` overwrites it
    with the update blocks, which the exchange sends back.
    """

    gradient: Tensor
    """[B, d_1, ..., d_k]: the bucket's memory, set by its owner."""

    def __init__(
        self,
        blocks: Sequence[tuple[int, OwnedBlock]],
        group: int,
        config: ShampooConfig,
        device: torch.device,
    ) -> None:
        """
        Args:
            blocks: with their index in the plan.
            group: number of their parameter group.
        """
        ordered = sorted(blocks, key=lambda block: (block[1].phase, block[0]))
        self.positions = {number: position for position, (number, _) in enumerate(ordered)}
        """Position in the stack of each block, by its index in the plan."""
        self.parameters = [block.parameter for _, block in ordered]
        self.phases = [block.phase for _, block in ordered]
        self.group = group
        self.config = config
        self.shape = ordered[0][1].shape
        self.device = device
        self.saved = {
            name: torch.zeros(len(ordered), *kept, dtype=dtype, device=device)
            for name, (kept, dtype) in saved_entries(self.shape, config).items()
        }
        """The state as checkpoints have it, stacked."""
        self.state = split_rows(self.saved, self.shape, config)
        """The same, with a tensor for each matrix of a block."""
        self.preconditioner = PRECONDITIONERS[config.preconditioner](self.shape, config, self.state)
        self.preconditioner.restart(slice(None))
        self._second_moment = self.state.get(second_moment_name(config.grafting) or "")
        self._rooted = [False] * len(ordered)
        self.norms: tuple[Tensor, Tensor] | None = None
        """Norms of the direction before and after grafting, [B, 1, ...], of the last step."""
        self._compiled = self._accumulate, self._direct
        if config.compile:
            self._compiled = (_compile(self._accumulate), _compile(self._direct))
        self.refreshes = 0
        self.failed_roots = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_blocks = torch.zeros((), dtype=torch.int64, device=device)

    def step(self, clock: Clock, betas: tuple[float, float], eps: float, watch: Stopwatch) -> None:
        """Replace the gradients in `gradient` by the updates D, to be subtracted times lr.

        A block with a non-finite or excessive gradient is skipped: its state stays, its update is
        zero.

        Args:
            betas, eps: the optimizer's; a second beta of 1 sums the factors.
            watch: measures the parts.
        """
        beta1, beta2 = betas
        graft_beta2 = beta2 if self.config.grafting_beta2 is None else self.config.grafting_beta2
        # What is compiled is one case: the step that is taken nearly always.
        compiled = self.config.compile and all(self._rooted) and all(clock.active)
        beta3 = beta1 * beta1 if self.config.beta3 is None else self.config.beta3
        corrections = Corrections(
            self._correction(beta2, clock.factor_steps, as_tensor=compiled),
            self._correction(beta1, clock.steps, beta3, as_tensor=compiled),
            self._correction(graft_beta2, clock.steps, as_tensor=compiled),
        )
        accumulate, direct = self._compiled if compiled else (self._accumulate, self._direct)
        usable, exp_avg = accumulate(beta1, beta2, graft_beta2, corrections)
        self._count_skipped(usable, clock.active)
        watch.lap("factors")
        self._refresh(clock, beta2)
        watch.lap("roots")
        # beta3 M' + (1 - beta3) G, by M = beta1 M' + (1 - beta1) G.
        share = beta3 / beta1 if beta1 else 1.0
        direct(exp_avg, share, usable, beta2, corrections, eps)
        if self.config.momentum:
            self._accelerate(usable, clock)
        watch.lap("direction")

    def health(self, factor_steps: Sequence[int], beta2: float) -> tuple[float, float]:
        """The largest condition number of a factor, and the largest residual of a root; the host
        waits for the device."""
        if not (self.preconditioner.full and all(self._rooted)):
            return 0.0, 0.0
        health = self.preconditioner.health(self._correction(beta2, factor_steps))
        condition, residual = (float(figures.nan_to_num(0.0).amax()) for figures in health)
        return condition, residual

    def _accumulate(
        self, beta1: float, beta2: float, graft_beta2: float, corrections: "Corrections"
    ) -> tuple[Tensor, Tensor]:
        """Let the gradients into the factors, momentum and graft statistics.

        Returns:
            which gradients are usable, [B], and the momentum.
        """
        gradient = self.gradient
        inner = tuple(range(1, gradient.ndim))
        # Comparisons with NaN are false. (The infinity norm is far slower on CPUs.)
        largest, least = gradient.amax(inner), gradient.amin(inner)
        usable = ((largest < LARGEST_GRADIENT) & (least > -LARGEST_GRADIENT)).float()
        each = per_block(usable, gradient.ndim)  # 1 for usable gradients, else 0
        gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(each)

        # Decays are 1 where a gradient is not usable: there the state stays.
        decay, weight = 1.0 - (1.0 - beta2) * usable, 1.0 - beta2 if beta2 < 1.0 else 1.0
        self.preconditioner.accumulate(gradient, decay, weight, corrections.factors)
        exp_avg = self.state["exp_avg"].float().lerp_(gradient, (1.0 - beta1) * each)
        self._keep("exp_avg", exp_avg)
        if self._second_moment is not None:
            graft_decay = 1.0 - (1.0 - graft_beta2) * each
            method = self.config.grafting
            update_second_moment(method, self._second_moment, gradient, graft_decay, graft_beta2)
        return usable, exp_avg

    def _direct(
        self,
        exp_avg: Tensor,
        share: float,
        usable: Tensor,
        beta2: float,
        corrections: "Corrections",
        eps: float,
    ) -> None:
        """Put the preconditioned and grafted momentum into `gradient`, the momentum being
        share * exp_avg + (1 - share) * gradient."""
        config, gradient, preconditioner = self.config, self.gradient, self.preconditioner
        decay, weight = 1.0 - (1.0 - beta2) * usable, 1.0 - beta2 if beta2 < 1.0 else 1.0
        preconditioner.observe(gradient, decay, weight)
        # In the gradient's memory, which nothing needs from here.
        momentum = exp_avg if share == 1.0 else gradient.lerp_(exp_avg, share)
        inner = tuple(range(1, gradient.ndim))
        each = per_block(usable, gradient.ndim)
        correction1 = per_block(corrections.momentum, gradient.ndim)
        correction2 = per_block(corrections.graft, gradient.ndim)
        # Without roots a block takes the grafted method's direction, if there is no better one.
        grafted = config.grafting != "none"
        known = self._rooted if grafted or not preconditioner.works_cold else [True]
        graft_norm = cold_update = None
        if grafted or not all(known):
            graft, factor = graft_step(
                config.grafting,
                momentum,
                self._second_moment,
                correction1,
                correction2,
                eps if config.grafting_eps is None else config.grafting_eps,
            )
            if not any(known):
                torch.mul(graft, each * factor, out=gradient)
                return
            if grafted:
                graft_norm = torch.linalg.vector_norm(graft, 2, inner, keepdim=True) * factor
            if not all(known):
                cold_update = graft * (each * factor)
            del graft  # as large as all gradients of the stack
        direction = preconditioner.direction(momentum, corrections.factors, eps, gradient)
        norm = torch.linalg.vector_norm(direction, 2, inner, keepdim=True)
        scale = 1.0 / correction1
        if graft_norm is not None:
            scale = (graft_norm / norm).masked_fill_(norm == 0.0, 0.0)
        self.norms = norm, scale * norm
        torch.mul(direction, scale * each, out=gradient)
        if cold_update is not None:
            cold = per_block(self._host_mask(known).logical_not_(), gradient.ndim)
            torch.where(cold, cold_update, gradient, out=gradient)

    def restart_factors(self, positions: Sequence[int]) -> None:
        """Forget what the preconditioner knows of these blocks."""
        where = to_device(torch.tensor(positions, dtype=torch.int64), self.device)
        self.preconditioner.restart(where)

    def set_rooted(self, rooted: Sequence[bool]) -> None:
        """Say which blocks have had their first refresh, after state was loaded: the others get it
        as soon as the settings of this run allow it, and are grafted until then."""
        self._rooted = list(rooted)
        self.preconditioner.warm = any(rooted)

    def _accelerate(self, usable: Tensor, clock: Clock) -> None:
        """B <- momentum B + (1 - dampening) D; D <- B, or D + momentum B with Nesterov, as in
        torch.optim.SGD, whose first B is D."""
        momentum, dampening = self.config.momentum, self.config.dampening
        weights = [1.0 if step <= 1 else 1.0 - dampening for step in clock.steps]
        weight = per_block(self._uniform(weights), self.gradient.ndim)
        each = per_block(usable, self.gradient.ndim)
        buffer = self.state["momentum_buffer"].float().mul_(1.0 - (1.0 - momentum) * each)
        buffer.add_(self.gradient * weight)
        self._keep("momentum_buffer", buffer)
        if self.config.nesterov:
            self.gradient.add_(buffer * each, alpha=momentum)
        else:
            torch.mul(buffer, each, out=self.gradient)

    def _keep(self, name: str, values: Tensor) -> None:
        if self.state[name].dtype != torch.float32:  # else they are the state itself
            self.state[name].copy_(values)

    def _refresh(self, clock: Clock, beta2: float) -> None:
        due = self._due(clock)
        if not self.preconditioner.full:
            for b in due:
                self._rooted[b] = True
            return
        for cold in (True, False):
            chosen = [b for b in due if self._rooted[b] != cold]
            if not chosen:
                continue
            where: slice | Tensor = slice(chosen[0], chosen[-1] + 1)
            if len(chosen) != chosen[-1] + 1 - chosen[0]:
                where = to_device(torch.tensor(chosen), self.device)
            correction = self._correction(beta2, [clock.factor_steps[b] for b in chosen])
            failed = self.preconditioner.refresh(where, cold, correction)
            self.failed_roots += failed.sum()
            self.refreshes += failed.numel()
        for b in due:
            self._rooted[b] = True
        self.preconditioner.warm = any(self._rooted)

    def _due(self, clock: Clock) -> list[int]:
        """Positions of the blocks whose roots are refreshed on this step, ascending."""
        first, period = self.config.start_preconditioning_step, self.config.refresh_period
        return [
            b
            for b, phase in enumerate(self.phases)
            if clock.active[b]
            and (
                (clock.steps[b] + phase) % period(clock.factor_steps[b]) == 0
                if self._rooted[b]
                else clock.factor_steps[b] >= first
            )
        ]

    def _correction(
        self,
        beta: float,
        steps: Sequence[int],
        last: float | None = None,
        *,
        as_tensor: bool = False,
    ) -> float | Tensor:
        """The bias correction 1 - beta^t; a tensor [B] where the blocks' t differ, or [1] if a
        number, which is another one on each step, must not be compiled into the step.

        Args:
            last: the weight of the past in the newest average, if that is not beta.
        """
        if beta == 1.0 or not self.config.use_bias_correction:
            return 1.0
        last = beta if last is None else last
        correction = self._uniform([1.0 - last * beta ** (max(step, 1) - 1) for step in steps])
        if as_tensor and not isinstance(correction, Tensor):
            return torch.full((1,), correction, device=self.device)
        return correction

    def _uniform(self, values: Sequence[float]) -> float | Tensor:
        if min(values) == max(values):
            return values[0]
        return to_device(torch.tensor(values, dtype=torch.float32), self.device)

    def _count_skipped(self, usable: Tensor, active: Sequence[bool]) -> None:
        skipped = usable == 0.0
        if not all(active):
            skipped &= self._host_mask(active)
        self.skipped_blocks += skipped.sum()

    def _host_mask(self, values: Sequence[bool]) -> Tensor:
        return to_device(torch.tensor(values), self.device)


def _compile(function: Callable[P, T]) -> Callable[P, T]:
    # Stacks run the same code on other shapes: none may count as the recompilation of another.
    compiled: Callable[P, T] = torch.compile(  # type: ignore[call-overload]
        function, fullgraph=True, dynamic=False, isolate_recompiles=True
    )
    return compiled
