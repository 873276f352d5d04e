"""What a rule is: it turns a stack of momenta into directions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from shampoo_fsdp.config import RULES, ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.kernels.gram import can_update, update_factors
from shampoo_fsdp.rules.matrices import (
    MatrixStack,
    Positions,
    StateEntry,
    factor_kinds,
    is_matrix,
    per_block,
    resolution_of,
    torch_dtype,
    unfold,
)
from shampoo_fsdp.rules.precision import MatmulPrecision, add_gram, gram
from shampoo_fsdp.rules.roots import check_exponent

__all__ = ["Rule", "Step", "register"]


@dataclass
class Step:
    """A step of the blocks of one stack; sequences have one entry for each block."""

    group: GroupSettings
    """What their parameter group says; a second beta of 1 sums the factors."""
    steps: Sequence[int]
    """Gradients of the block's parameter so far, this one included."""
    factor_steps: Sequence[int]
    """Of these the ones since its factors were started, see `load_state_dict`."""
    active: Sequence[bool]
    """Whether the parameter has a gradient on this step. (The gradient blocks of one that has none
    must have been filled with NaN.)"""
    refreshed: Sequence[bool]
    """Whether the block has had its first refresh, this step's included."""
    cold: Sequence[bool]
    """Whether this step's is its first one."""
    correction: float | Tensor = field(default=1.0, init=False)
    """Bias correction of the factors, this step's gradient included; as the next two a number or
    [B]."""
    momentum_correction: float | Tensor = field(default=1.0, init=False)
    graft_correction: float | Tensor = field(default=1.0, init=False)
    size: Tensor = field(init=False)
    """Of the gradient's largest entry, [B], 0 where it is not usable; as the next two known once
    the gradients are there."""
    usable: Tensor = field(init=False)
    """1 where the gradient is finite and not excessive, else 0, [B]."""
    unusable: Tensor = field(init=False)
    """Whether it is 0."""
    rate: Tensor = field(init=False)
    """What the gradient counts in the factors, [B]: `weight`, and 0 where they stay."""
    in_one_pass: bool = field(default=False, init=False)
    """Whether a kernel takes the averages, with what is preconditioned and the grafted norms."""

    @property
    def weight(self) -> float:
        """That of the gradient in the factors: 1 - beta2, or 1 for sums."""
        return 1.0 if self.sums else 1.0 - self.group.betas[1]

    @property
    def decay(self) -> float | Tensor:
        """What the factors are multiplied by first; a number or [B]."""
        return 1.0 if self.sums else 1.0 - self.rate

    @property
    def sums(self) -> bool:
        """Whether factors are sums: beta2 is 1."""
        return self.group.betas[1] == 1.0

    @property
    def eps(self) -> float:
        """The optimizer's."""
        return self.group.eps

    @property
    def warm(self) -> bool:
        """Whether any block has had its first refresh."""
        return any(self.refreshed)


class Rule(ABC):
    """A rule for a stack of blocks of one shape (d_1, ..., d_k).

    On a step the stack calls `accumulate`, `refresh` for the blocks that are due, `observe` and
    `direction`, in this order. All that the package knows of a rule it asks the class. To add one,
    write one file with a subclass, decorated with :func:`register`, and import it before a
    :class:`shampoo_fsdp.ShampooConfig` names it: here, or anywhere.
    """

    name: ClassVar[str]
    """What the setting `preconditioner` calls it."""
    number: ClassVar[int]
    """What checkpoints call it: below 2^16, and another one for each rule."""
    entries: ClassVar[tuple[str, ...]]
    """Names of the entries of its state in checkpoints: those of :meth:`layout` without _i."""
    root_methods: ClassVar[tuple[str, ...]]
    """Allowed values of `root_method`; the first is the default."""
    root_method_by_products: ClassVar[str | None] = None
    """The default on accelerators, where decompositions are slow and make the host wait."""
    matmul_precision: ClassVar[MatmulPrecision] = "highest"
    """The default of the setting where the device multiplies in it faster than in fp32."""
    rounds_roots: ClassVar[bool] = False
    """Whether nothing but the products of a step reads what it keeps in `root_dtype`."""
    averages: ClassVar[bool] = False
    """Whether its factors must be averages (beta2 below 1)."""
    resolution: float = 0.0
    """Eigenvalues of a factor count as at least this, relative to the largest; of a rule's blocks
    also as at least what :func:`shampoo_fsdp.rules.matrices.resolution_of` says."""
    products: ClassVar[int]
    """Matrix products with a d_i x d_i matrix per step and dimension, for the planner."""
    refresh_cost: ClassVar[float] = 1.0
    """Time of a factor's refresh over that of a root or eigenbasis by the same method, for the
    planner."""
    works_cold: ClassVar[bool]
    """Whether `direction` means something before the first refresh."""

    @classmethod  # noqa: B027
    def check(cls, config: ShampooConfig) -> None:
        """Raise a ValueError if a setting has a value that the rule does not allow."""

    @classmethod
    def root_exponent(cls, config: ShampooConfig, factors: int) -> float:
        """The p of factor^(-p) for a block with this number of factors, at least one."""
        given = config.root_exponents[factors - 1] if factors <= len(config.root_exponents) else 0.0
        return given or 0.5 / factors

    @classmethod
    def check_block(cls, shape: Sequence[int], config: ShampooConfig) -> None:
        """Raise a ValueError if the root method cannot take the roots that a block needs."""
        kinds = factor_kinds(shape, config)
        if factors := len(kinds) - kinds.count("none"):
            check_exponent(config.basis_method, -cls.root_exponent(config, factors))

    @classmethod
    @abstractmethod
    def layout(cls, shape: Sequence[int], config: ShampooConfig) -> dict[str, StateEntry]:
        """The state of one block: names, shapes and types. Entries of a name that ends in _i belong
        to dimension i, and those that differ in i alone are of one type; others have the shape of
        the block."""

    def __init__(
        self, shape: Sequence[int], config: ShampooConfig, state: Mapping[str, Tensor]
    ) -> None:
        """
        Args:
            shape: of a block.
            state: stacked tensors [B, ...] as :meth:`layout` says; :meth:`restart` fills them.
        """
        self.shape = tuple(shape)
        self.config = config
        self.state = state
        # Vectors cost nothing, and few of them span little: rounding would fill the rest.
        low = config.matmul_precision == "medium" and is_matrix(shape)
        self.products_in = torch.bfloat16 if low else torch.float32
        """Type of what is multiplied on every step; what comes out is of it too, but for grams."""
        kinds = factor_kinds(shape, config)
        self.rounded = config.factor_dtype == "bfloat16"
        self.full = [i for i, kind in enumerate(kinds) if kind == "full"]
        """Dimensions that have a matrix as their factor."""
        self.sides = [i for i, kind in enumerate(kinds) if kind != "none"]
        """Dimensions that have a factor: also those whose factor is a diagonal."""
        self.two_sided = len(kinds) == 2 and self.full == [0, 1]
        """Whether it is the usual case, a matrix for each of two dimensions."""
        kept = {i: state.get(f"factors_{i}") for i in self.full}
        self.factors = {i: MatrixStack(factor) for i, factor in kept.items() if factor is not None}
        kept_in = torch_dtype(config.factor_dtype)
        self.resolution = max(self.resolution, resolution_of(kept_in))
        self.method = config.basis_method
        self.exponent = -self.root_exponent(config, max(1, len(self.sides)))

    def restart(self, where: Positions) -> None:
        """Set the state of these blocks to what it is before the first step: zero, and the identity
        for eigenvectors and roots."""
        for name, kept in self.state.items():
            entry, _, side = name.rpartition("_")
            kind = entry if side.isdigit() else name
            if kind in ("eigenvectors", "inverse_roots"):
                MatrixStack(kept).write_identity(where)
            elif kind in self.entries:
                kept[where] = 0.0

    @abstractmethod
    def accumulate(self, gradient: Tensor, step: Step) -> None:
        """Add a gradient to the factors.

        Args:
            gradient: [B, d_1, ..., d_k]; zero where it is not usable, or as it came if
                :meth:`skips_blocks`.
        """

    def skips_blocks(self, gradient: Tensor) -> bool:
        """Whether :meth:`accumulate` leaves out by itself what is not usable of such gradients,
        and nothing else looks at them: else it is zero there. True only where our own kernels
        can run: the stack launches them then, too."""
        return False

    @abstractmethod
    def refresh(self, where: Positions, cold: bool, correction: float | Tensor) -> Tensor:
        """Take the roots or eigenbases of some blocks anew; one whose decomposition fails keeps
        its last.

        Args:
            where: n positions.
            cold: whether it is the first time for them.
            correction: of the factors, a number or [n].

        Returns:
            where a decomposition failed, [dimensions, n], in any order of the dimensions.
        """

    def observe(self, gradient: Tensor, step: Step) -> None:  # noqa: B027
        """Look at the gradient once more, after the refresh."""

    @abstractmethod
    def direction(self, momentum: Tensor, step: Step, out: Tensor) -> Tensor:
        """The preconditioned momentum, in fp32 or the type of the products; linear in it.

        Args:
            momentum: [B, d_1, ..., d_k], in the type of the products; stays as it is, unless it
                lies in `out`.
            out: memory of its shape and type that the result may use.
        """

    @abstractmethod
    def health(self, correction: float | Tensor) -> tuple[Tensor, Tensor]:
        """Condition numbers of the factors that are matrices, as far as cheap products tell them,
        and how much these have outgrown their roots or eigenbases: from 0, not at all, to 1, which
        is nothing in common. Both [dimensions, B]; too costly for every step."""

    def _average(self, i: int, blocks: Tensor, step: Step, over: float = 1.0) -> None:
        """factors_i <- decay factors_i + rate U U^T / over, U being the blocks unfolded along i; of
        diagonals_i what is on the diagonal.

        Args:
            blocks: [B, d_1, ..., d_k], zero where the rate is; anything if `step.in_one_pass`.
        """
        if i not in self.full:
            squares = blocks.float().square()
            others = [d for d in range(1, squares.ndim) if d != i + 1]
            diagonal = self.state[f"diagonals_{i}"].mul_(per_block(step.decay, 2))
            total = squares.sum(others) if others else squares
            diagonal.add_(total, alpha=step.weight / over)
            return
        unfolded = unfold(blocks, i)
        kept = self.factors[i].storage
        if unfolded.dtype != torch.float32 and can_update(kept, unfolded):
            return update_factors(kept, unfolded, step.rate, 1.0 / over, sums=step.sums)
        if step.in_one_pass:  # the gradient is as it came, and nothing else leaves blocks out
            unfolded = unfolded.masked_fill(per_block(step.unusable, 3), 0.0)
        factor = self.factors[i].read()
        if unfolded.dtype == torch.float32 or unfolded.device.type == "cpu" or step.sums:
            factor.mul_(per_block(step.decay, 3))
            add_gram(factor, unfolded, step.weight / over)
        else:  # in one pass less
            unfolded = unfolded if over == 1.0 else unfolded * over**-0.5
            factor.lerp_(gram(unfolded), per_block(step.rate, 3))
        self.factors[i].keep(factor)


def register(rule: type[Rule]) -> type[Rule]:
    """Make a rule known by its name.

    Raises:
        ValueError: another rule has its name or number.
    """
    for name, other in RULES.items():
        same = rule.name == name or rule.number == getattr(other, "number", None)
        if same and other.__qualname__ != rule.__qualname__:
            raise ValueError(
                f"rule '{rule.name}', number {rule.number}, has the name or the number of '{name}'."
            )
    RULES[rule.name] = rule
    return rule
