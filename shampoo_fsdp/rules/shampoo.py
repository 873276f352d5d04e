"""Shampoo (Gupta et al. 2018, arXiv 1802.09568, algorithms 1 and 2).

For a block of m x n, its gradient G and momentum N:

    L <- beta2 L + (1 - beta2) G G^T        [m, m]; for beta2 = 1 sums
    R <- beta2 R + (1 - beta2) G^T G        [n, n]
    P_L = (L / c + ridge I)^(-1/4)          when a refresh is due; c is the bias correction
    P_R = (R / c + ridge I)^(-1/4)
    D = P_L N P_R

A block of k dimensions has a factor for each, of its gradient unfolded along it, and the exponent
is -1 / (2k). Dimensions with a diagonal factor keep the diagonal, whose root is taken on every
step.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.kernels.gram import can_update
from shampoo_fsdp.kernels.refresh import keep, parts
from shampoo_fsdp.rules.eigenbasis import updated_basis
from shampoo_fsdp.rules.matrices import (
    MatrixStack,
    Positions,
    StateEntry,
    along,
    condition_number,
    factor_kinds,
    matrix_entries,
    per_block,
    scale_along,
)
from shampoo_fsdp.rules.roots import ROOT_METHODS, inverse_root, ridged_powers, root_from_basis
from shampoo_fsdp.rules.rule import Rule, Step, register
from shampoo_fsdp.validation import refuse

__all__ = ["ShampooRule"]

# What the diagonal of a factor in bf16 is raised by, relative to it, where the rows of its
# correlations have the norm 1: 8 times the rounding of an entry. (1M model, 240 steps: 0.4% of
# the roots failed, 12% with half of it. A ridge as large as the rounding of the largest entries
# cost 0.06 more.)
_ROUNDING = 2.0**-6

_POWER_ITERATIONS = 8
_TINY = torch.finfo(torch.float32).tiny


@register
class ShampooRule(Rule):
    """The equations above, on stacks of blocks."""

    name = "shampoo"
    number = 0
    products = 2
    entries = ("factors", "diagonals", "inverse_roots", "eigenvectors")
    root_methods: ClassVar[tuple[str, ...]] = (*ROOT_METHODS, "qr")
    root_method_by_products = "polynomial"
    matmul_precision = "medium"
    rounds_roots = True
    works_cold = False

    def accumulate(self, gradient: Tensor, step: Step) -> None:
        """L <- beta2 L + (1 - beta2) G G^T, and R likewise."""
        low = gradient.to(self.products_in)
        for i in self.sides:
            self._average(i, low if i in self.full else gradient, step)

    def refresh(self, where: Positions, cold: bool, correction: float | Tensor) -> Tensor:
        """P_L = (L / c + ridge I)^(-1/4), and P_R likewise."""
        failed = []
        for n in sorted({factor.size for factor in self.factors.values()}):
            sides = [i for i in self.full if self.factors[i].size == n]
            # Sides of one length in one call: half as many kernels for square blocks.
            factors = torch.cat([self.factors[i].read(where) for i in sides])
            c = _joined([self._correction_of(i, correction) for i in sides], factors)
            ridge = self._ridge(factors, c)
            if self.rounded and self.method == "polynomial":
                _raise_diagonal(factors)
            if self.method == "qr":
                kept = [self.state[f"eigenvectors_{i}"] for i in sides]
                pairs = zip(kept, factors.chunk(len(sides)), strict=True)
                bases = [updated_basis(basis, where, part, cold) for basis, part in pairs]
                values, vectors, lost = map(torch.cat, zip(*bases, strict=True))
                powers = self.exponent, ridge, self.resolution
                roots, bad = root_from_basis(values / per_block(c, 2), vectors, *powers)
                bad = lost | bad
            else:
                roots, bad = inverse_root(
                    factors, self.exponent, ridge, self.method, self.resolution, c
                )
            failed.append(bad.view(len(sides), -1))
            # A block that has seen no gradient has no scale: its roots would blow up the first.
            unseen = factors.diagonal(dim1=1, dim2=2).amax(1) <= 0.0
            self._keep_roots(sides, where, roots, bad | unseen, cold)
        return failed[0] if len(failed) == 1 else torch.cat(failed)

    def direction(self, momentum: Tensor, step: Step, out: Tensor) -> Tensor:
        """D = P_L N P_R."""
        if not self.two_sided:
            return self.multiply_sides(momentum, step)
        left, right = self.inverse_roots()
        return torch.bmm(left, momentum @ right, out=out)

    # What follows is how it is kept, and for blocks of other sides than two.

    @classmethod
    def check(cls, config: ShampooConfig) -> None:
        method = config.root_method
        if config.factor_dtype == "bfloat16" and method == "coupled_newton":
            # Rounding makes eigenvalues negative: it diverges then.
            refuse("root_method", method, "another one if factor_dtype is 'bfloat16'")

    @classmethod
    def layout(cls, shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
        kept = ["factors", "inverse_roots"] + ["eigenvectors"] * (config.basis_method == "qr")
        entries: dict[str, StateEntry] = {}
        for i, (n, kind) in enumerate(zip(shape, factor_kinds(shape, config), strict=True)):
            if kind == "full":
                entries |= matrix_entries(i, n, config, *kept)
            elif kind == "diagonal":
                entries[f"diagonals_{i}"] = (n,), torch.float32
        return entries

    def __init__(
        self, shape: Sequence[int], config: ShampooConfig, state: Mapping[str, Tensor]
    ) -> None:
        super().__init__(shape, config, state)
        self.roots = {i: MatrixStack(state[f"inverse_roots_{i}"]) for i in self.full}
        # How much the last refresh changed each root, for `health`; in no checkpoint.
        self._changes = {
            i: root.storage.new_zeros(len(root.storage), parts(root.size), 2, dtype=torch.float32)
            for i, root in self.roots.items()
        }

    def _keep_roots(
        self, sides: Sequence[int], where: Positions, roots: Tensor, bad: Tensor, cold: bool
    ) -> None:
        """Keep the last roots where these are bad; note how much the others changed."""
        parts_of = zip(sides, roots.chunk(len(sides)), bad.chunk(len(sides)), strict=True)
        for i, root, wrong in parts_of:
            kept, changes = self.roots[i], self._changes[i][where]
            last = kept.read(where, kept.storage.dtype)
            keep(root, last, wrong, changes)
            kept.keep(last, where)
            if cold:  # the first root takes the place of the identity
                changes.zero_()
            if isinstance(where, Tensor):
                self._changes[i][where] = changes

    def skips_blocks(self, gradient: Tensor) -> bool:
        low = self.products_in != torch.float32 and gradient.shape[-1] % 8 == 0
        factors = [factor.storage for factor in self.factors.values()]
        return low and self.two_sided and all(can_update(f, gradient) for f in factors)

    def inverse_roots(self) -> list[Tensor]:
        """P of each dimension with a matrix, in the type of the products."""
        return [root.read(dtype=self.products_in) for root in self.roots.values()]

    def multiply_sides(self, momentum: Tensor, step: Step) -> Tensor:
        """`direction` for any number of sides, each with a matrix, a diagonal or nothing."""
        for i in (*set(self.sides).difference(self.full), *reversed(self.full)):
            momentum = self.multiply_side(momentum, i, step)
        return momentum

    def multiply_side(self, blocks: Tensor, i: int, step: Step) -> Tensor:
        """Blocks multiplied by the root of one dimension's factor, in the type of the products."""
        if i in self.full:
            root = self.roots[i].read(dtype=self.products_in)
            return along(blocks.to(self.products_in), root, i, symmetric=True)
        c, diagonal = self._correction_of(i, step.correction), self.state[f"diagonals_{i}"]
        ridge, scaled = self._ridge(diagonal, c), diagonal / per_block(c, 2)
        root = ridged_powers(scaled, self.exponent, ridge, self.resolution)
        return scale_along(blocks, root.to(blocks.dtype), i)

    def health(self, correction: float | Tensor) -> tuple[Tensor, Tensor]:
        """The residual is the change of the root at its last refresh: it is known what the old one
        was good for when there is a new one."""
        conditions = []
        for i, root in self.roots.items():
            factor = self.factors[i].read()
            # What the root magnifies most is what the factor has least of.
            rows = (_dominant(matrices) for matrices in (factor, root.read()))
            largest, smallest = ((v @ factor * v).sum((1, 2)) for v in rows)
            conditions.append(condition_number(largest, smallest, self.resolution))
        changes = torch.stack([squares.sum(1) for squares in self._changes.values()])
        relative = (changes[..., 0] / changes[..., 1]).sqrt_()
        return torch.stack(conditions), relative.clamp_max_(1.0)

    def _correction_of(self, i: int, correction: float | Tensor) -> float | Tensor:
        """The bias correction of the factors of dimension i."""
        return correction

    def _ridge(self, factors: Tensor, correction: float | Tensor) -> float | Tensor:
        """What is added to the eigenvalues of factors [B, d] or [B, d, d], once they are
        over their correction; a number or [B]."""
        return self.config.preconditioner_eps


def _raise_diagonal(factors: Tensor) -> None:
    """Let factors [B, n, n] outgrow the rounding of their entries, in place.

    It makes eigenvalues negative, which only "eigh" and "qr" can raise. Its size goes with the
    entries': what a row has of it goes with that row's diagonal.
    """
    diagonal = factors.diagonal(dim1=1, dim2=2)
    scale = diagonal.clamp_min(_TINY).rsqrt()
    correlations = factors * scale.unsqueeze(1) * scale.unsqueeze(2)
    norm = torch.linalg.matrix_norm(correlations) * (_ROUNDING * diagonal.shape[1] ** -0.5)
    diagonal.mul_(1.0 + norm.unsqueeze(1))


def _joined(values: Sequence[float | Tensor], factors: Tensor) -> float | Tensor:
    """Values of sides, numbers or [n], as one number or [sides * n]."""
    first = values[0]
    if not any(isinstance(value, Tensor) for value in values) and len({*values}) == 1:
        return first
    n = len(factors) // len(values)
    return torch.cat(
        [value if isinstance(value, Tensor) else factors.new_full((n,), value) for value in values]
    )


def _dominant(matrices: Tensor) -> Tensor:
    """About the eigenvectors of the largest eigenvalues of positive semi-definite matrices
    [B, n, n]; rows of length 1, [B, 1, n]."""
    vectors = torch.ones_like(matrices[:, :1])  # rows, see `root_residual`
    for _ in range(_POWER_ITERATIONS):
        vectors = torch.nn.functional.normalize(vectors @ matrices, dim=-1, eps=_TINY)
    return vectors
