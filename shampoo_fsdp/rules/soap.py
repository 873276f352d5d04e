"""SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3): Adam in Shampoo's eigenbasis.

For a block of m x n, its gradient G and momentum N:

    L <- beta2 L + (1 - beta2) G G^T,  R <- beta2 R + (1 - beta2) G^T G
    Q_L, Q_R: the eigenvectors of L and R, in columns       when a refresh is due
    V <- beta2 V + (1 - beta2) (Q_L^T G Q_R)^2              V moves with its basis at a refresh
    D = Q_L [Q_L^T N Q_R / (sqrt(V / c) + eps)] Q_R^T       c is the bias correction

Q is the identity until the first refresh: until then this is Adam. At the first refresh V starts
from the product of the factors' eigenvalues over their trace (Morwani et al. 2024, arXiv
2406.17748: the closest Kronecker product), as its entries in the old basis say nothing about the
new one. Later V moves with its basis, as the diagonal of a covariance does, so that each entry
belongs to what the momentum has there. A dimension without a matrix keeps its own basis.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.rules.eigenbasis import updated_basis
from shampoo_fsdp.rules.matrices import (
    Positions,
    StateEntry,
    along,
    condition_number,
    factor_kinds,
    matrix_entries,
    per_block,
    scale_along,
)
from shampoo_fsdp.rules.rule import Rule, Step, register
from shampoo_fsdp.validation import refuse

__all__ = ["SoapRule"]

# Where gradients lack rank, the same training on two meshes must not drift apart by rounding. Two
# 64 x 64 layers, 1 to 4 rows of a batch on each of 3 ranks, 10 steps: parameters differed by 89%
# ("qr") and 73% ("eigh") of the way they went. Now it is 3e-6, of 48 runs at most 3e-3 ("qr") and
# 4e-4 ("eigh"); of twelve others with 4 rows two by 2e-2 ("qr"): its steps take columns in the
# order of their eigenvalues, and where two new ones are nearly equal, rounding chooses. Without
# one part, in median, "qr" and "eigh": 30% and 17% if V stays in the old basis, 13% and 0.05% if
# bases are not completed, 35% and 35% without the floor, 6% ("qr") with one iteration. The loss
# of a model of 1 M parameters after 120 steps, two seeds, fell from 1.702 and 1.699 to 1.674 and
# 1.661 ("qr"). (A hard floor of 1e-5 under V would cost 0.1.)
#
# Eigenvalues up to this, relative to the largest, tell no direction: these come from the others.
_RESOLUTION = 1e-5
# Steps of "qr" at a refresh: after one, rounding is still in directions that have just appeared.
_ITERATIONS = 2
# Entries of V below this, relative to the block's largest, are no measure of themselves: both they
# and the momentum are rounding there, and directions fade in proportion to V.
_FLOOR = 1e-8


@register
class SoapRule(Rule):
    """The equations above, on stacks of blocks."""

    name = "soap"
    number = 1
    entries = ("factors", "eigenvectors", "second_moment")
    root_methods = ("qr", "eigh")
    matmul_precision = "high"
    products = 4
    refresh_cost = 3.0
    works_cold = True

    @classmethod
    def check(cls, config: ShampooConfig) -> None:
        if any(config.root_exponents):
            refuse("root_exponents", config.root_exponents, f"[] for {cls.name}")

    def accumulate(self, gradient: Tensor, step: Step) -> None:
        """L <- beta2 L + (1 - beta2) G G^T, and R likewise."""
        low = gradient.to(self.products_in)
        for i in self.full:
            self._average(i, low, step)

    def refresh(self, where: Positions, cold: bool, correction: float | Tensor) -> Tensor:
        """Q_L and Q_R of L and R, and V in the new basis."""
        eigenvalues, failures = [], []
        resolution, anew = max(self.resolution, _RESOLUTION), cold or self.method == "eigh"
        moved = self.state["second_moment"][where]
        # One gradient, the first, which is in the factors and not yet in V, tells no basis: in its
        # own the direction would be that gradient. An idle expert keeps the basis of the axes.
        fresh = per_block((moved == 0.0).flatten(1).all(1), 3)
        for i in self.full:
            kept = self.state[f"eigenvectors_{i}"]
            before = kept[where].to(torch.float32, copy=True)
            values, _, failed = updated_basis(
                kept, where, self.factors[i].read(where), anew, _ITERATIONS, resolution
            )
            eigenvalues.append(values)
            failures.append(failed)
            if not cold:
                kept[where] = torch.where(fresh, before.to(kept.dtype), kept[where])
                moved = along(moved, (kept[where].float().mT @ before).square_(), i)
        if cold:
            self._start_second_moment(where, eigenvalues, torch.stack(failures).any(0))
        else:
            self.state["second_moment"][where] = moved
        return torch.stack(failures)

    def observe(self, gradient: Tensor, step: Step) -> None:
        """V <- beta2 V + (1 - beta2) (Q_L^T G Q_R)^2."""
        projected = self._to_basis(gradient, step)
        moment = self.state["second_moment"].mul_(per_block(step.decay, gradient.ndim))
        moment.addcmul_(projected, projected, value=step.weight)

    def direction(self, momentum: Tensor, step: Step, out: Tensor) -> Tensor:
        """D = Q_L [Q_L^T N Q_R / (sqrt(V / c) + eps)] Q_R^T."""
        root = per_block(step.correction**0.5, momentum.ndim)
        moment = self.state["second_moment"]
        denominator = moment.sqrt().add_(step.eps * root)
        result = torch.div(self._to_basis(momentum, step), denominator, out=denominator)
        if step.warm:
            result = self._from_basis(result.mul_(self._fade(moment)), out)
        return result.float().mul_(root)

    def _to_basis(self, blocks: Tensor, step: Step) -> Tensor:
        """Q_L^T G Q_R; before the first refresh G."""
        if not step.warm:
            return blocks.float()
        blocks = blocks.to(self.products_in)
        for i in self.full:
            blocks = along(blocks, self._vectors(i).mT, i)
        return blocks.float()

    def _from_basis(self, blocks: Tensor, out: Tensor) -> Tensor:
        """Q_L D Q_R^T."""
        blocks = blocks.to(self.products_in)
        for i in reversed(self.full):
            blocks = along(blocks, self._vectors(i), i, out=out)
        return blocks

    def _fade(self, moment: Tensor) -> Tensor:
        """What entries of the direction are multiplied by: 1, or less where V is rounding."""
        floor = moment.amax(tuple(range(1, moment.ndim)), keepdim=True).mul_(_FLOOR)
        if self.full:  # in the basis of the axes small entries are no rounding
            bases = (self.state[f"eigenvectors_{i}"] for i in self.full)
            least = [basis.diagonal(dim1=1, dim2=2).amin(1) for basis in bases]
            turned = functools.reduce(torch.minimum, least) < 1.0
            floor.mul_(per_block(turned, moment.ndim))
        floor.clamp_min_(torch.finfo(torch.float32).tiny)
        return moment.div(floor).clamp_max_(1.0)

    def _start_second_moment(
        self, where: Positions, eigenvalues: Sequence[Tensor], failed: Tensor
    ) -> None:
        """V <- the product of the sides' eigenvalues / trace^(k - 1). (Bias corrections cancel.)"""
        before = self.state["second_moment"][where]
        trace = eigenvalues[0].clamp_min(0.0).sum(1)
        started = per_block(trace, before.ndim).expand_as(before)
        for i in range(before.ndim - 1):
            if i in self.full:
                side = eigenvalues[self.full.index(i)].clamp_min(0.0)
            else:  # its factor would be the diagonal that V has along it
                others = [d for d in range(1, before.ndim) if d != i + 1]
                side = before.sum(others) if others else before
            # A share of the whole: products of two sides' eigenvalues could leave fp32's range.
            total = side.sum(1, keepdim=True)
            share = torch.where(total > 0.0, side / total, 1.0 / side.shape[1])
            started = scale_along(started, share, i)
        self.state["second_moment"][where] = torch.where(
            per_block(failed, before.ndim), before, started
        )

    def _vectors(self, i: int) -> Tensor:
        return self.state[f"eigenvectors_{i}"].to(self.products_in)

    @classmethod
    def layout(cls, shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
        entries: dict[str, StateEntry] = {"second_moment": (tuple(shape), torch.float32)}
        for i, (n, kind) in enumerate(zip(shape, factor_kinds(shape, config), strict=True)):
            if kind == "full":
                entries |= matrix_entries(i, n, config, "factors", "eigenvectors")
        return entries

    def health(self, correction: float | Tensor) -> tuple[Tensor, Tensor]:
        """From Q^T L Q, whose diagonal has the eigenvalues; the residual is what is beside it."""
        conditions, residuals = [], []
        for i in self.full:
            vectors = self.state[f"eigenvectors_{i}"].float()
            rotated = vectors.mT @ self.factors[i].read() @ vectors
            eigenvalues = rotated.diagonal(dim1=1, dim2=2)
            largest, smallest = eigenvalues.amax(1), eigenvalues.amin(1)
            conditions.append(condition_number(largest, smallest, self.resolution))
            whole = torch.linalg.matrix_norm(rotated)
            beside = torch.linalg.matrix_norm(rotated - torch.diag_embed(eigenvalues))
            residuals.append(beside / torch.where(whole > 0.0, whole, 1.0))
        return torch.stack(conditions), torch.stack(residuals)
