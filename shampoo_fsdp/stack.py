"""All blocks of one shape that a rank owns, handled together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.grafting import LARGEST_GRADIENT, AdamGrafting
from shampoo_fsdp.planner import OwnedBlock
from shampoo_fsdp.preconditioners import ShampooPreconditioner

__all__ = ["BlockStack"]


class BlockStack:
    """State and update of blocks of one shape (d_1, ..., d_k), stacked in fp32 as [B, d_1, ...].

    Blocks are in the order of their refresh phase, so that those due on a step are neighbours.
    `gradient` is where the exchange puts the gradient blocks; :meth:`step` overwrites it with the
    update blocks, which the exchange sends back.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[int, OwnedBlock]],
        group: int,
        config: ShampooConfig,
        device: torch.device,
    ) -> None:
        ordered = sorted(blocks, key=lambda block: (block[1].phase, block[0]))
        self.positions = {number: position for position, (number, _) in enumerate(ordered)}
        """Position in the stack of each block, by its index in the plan."""
        self.parameters = [block.parameter for _, block in ordered]
        self.phases = [block.phase for _, block in ordered]
        self.group = group
        self.config = config
        shape = ordered[0][1].shape
        self.gradient = torch.zeros(len(ordered), *shape, dtype=torch.float32, device=device)
        self.exp_avg = torch.zeros_like(self.gradient)
        self.grafting = AdamGrafting(tuple(self.gradient.shape), device)
        self.preconditioner = ShampooPreconditioner(len(ordered), shape, device)
        self._rooted = [False] * len(ordered)
        self.refreshes = 0
        self.failed_roots = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_blocks = torch.zeros((), dtype=torch.int64, device=device)

    def step(
        self, steps: Sequence[int], active: Sequence[bool], beta1: float, beta2: float, eps: float
    ) -> None:
        """Replace the gradients in `gradient` by the updates D, to be subtracted times lr.

        A block with a non-finite or excessive gradient is skipped: its state stays, its update is
        zero.

        Args:
            steps: for each block the number of its parameter's gradients so far, this one included.
            active: for each block whether its parameter has a gradient on this step. (The gradient
                of one that has none must have been filled with NaN.)
            beta1, beta2, eps: as in AdamW; beta2 = 1 sums the factors.
        """
        config, gradient = self.config, self.gradient
        grafting_beta2 = beta2 if config.grafting_beta2 is None else config.grafting_beta2
        inner = tuple(range(1, gradient.ndim))
        # Comparisons with NaN are false. (The infinity norm is far slower on CPUs.)
        largest, least = gradient.amax(inner), gradient.amin(inner)
        usable = (largest < LARGEST_GRADIENT) & (least > -LARGEST_GRADIENT)  # [B]
        self._count_skipped(usable, active)
        kept = usable.to(gradient.dtype)
        each = kept.view(-1, *(1 for _ in inner))  # [B, 1, ...]; 1 for usable gradients, else 0
        gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(each)

        # Decays are 1 where a gradient is not usable: there the state stays.
        self.preconditioner.update_factors(gradient, 1.0 - (1.0 - beta2) * kept, beta2)
        self.exp_avg.lerp_(gradient, (1.0 - beta1) * each)
        self.grafting.update(gradient, 1.0 - (1.0 - grafting_beta2) * each, grafting_beta2)

        self._refresh(steps, active, beta2)

        graft, factor = self.grafting.step(
            self.exp_avg,
            self._correction(beta1, steps, gradient.ndim),
            self._correction(grafting_beta2, steps, gradient.ndim),
            eps,
        )
        if any(self._rooted):
            direction = self.preconditioner.precondition(self.exp_avg)
            graft_norm = torch.linalg.vector_norm(graft, 2, inner, keepdim=True)
            norm = torch.linalg.vector_norm(direction, 2, inner, keepdim=True)
            scale = (graft_norm * factor / norm).masked_fill_(norm == 0.0, 0.0)
            torch.mul(direction, scale * each, out=gradient)
            if all(self._rooted):
                return
            cold = self._host_mask(self._rooted).logical_not_().view_as(each)
            torch.where(cold, graft * (each * factor), gradient, out=gradient)
        else:
            torch.mul(graft, each * factor, out=gradient)

    def find_rooted(self) -> None:
        """Look which blocks have roots, after state was loaded: the others get theirs as soon as
        the settings of this run allow it, and are grafted until then."""
        self._rooted = self.preconditioner.has_roots().tolist()

    def _refresh(self, steps: Sequence[int], active: Sequence[bool], beta2: float) -> None:
        due = self._due(steps, active)
        if not due:
            return
        where: slice | Tensor = slice(due[0], due[-1] + 1)
        if len(due) != due[-1] + 1 - due[0]:
            where = torch.tensor(due).to(self.gradient.device, non_blocking=True)
        correction = self._correction(beta2, [steps[b] for b in due], 3)
        self.failed_roots += self.preconditioner.refresh(
            where, correction, self.config.preconditioner_eps
        )
        self.refreshes += len(due) * len(self.preconditioner.factors)
        for b in due:
            self._rooted[b] = True

    def _due(self, steps: Sequence[int], active: Sequence[bool]) -> list[int]:
        """Positions of the blocks whose roots are refreshed on this step, ascending."""
        first, frequency = self.config.first_preconditioned_step, self.config.precondition_frequency
        return [
            b
            for b, (step, phase) in enumerate(zip(steps, self.phases, strict=True))
            if active[b] and ((step + phase) % frequency == 0 if self._rooted[b] else step >= first)
        ]

    def _correction(self, beta: float, steps: Sequence[int], ndim: int) -> float | Tensor:
        """The bias correction 1 - beta^t; a tensor [B, 1, ...] where the blocks' t differ."""
        if beta == 1.0:
            return 1.0
        if min(steps) == max(steps):
            return 1.0 - beta ** max(steps[0], 1)
        values = torch.tensor([1.0 - beta ** max(step, 1) for step in steps], dtype=torch.float32)
        shape = (-1, *(1 for _ in range(ndim - 1)))
        return values.to(self.gradient.device, non_blocking=True).view(shape)

    def _count_skipped(self, usable: Tensor, active: Sequence[bool]) -> None:
        skipped = usable.logical_not()
        if not all(active):
            skipped &= self._host_mask(active)
        self.skipped_blocks += skipped.sum()

    def _host_mask(self, values: Sequence[bool]) -> Tensor:
        return torch.tensor(values).to(self.gradient.device, non_blocking=True)
