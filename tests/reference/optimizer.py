"""The slow, obvious form of the whole optimizer, in fp64 and in one process.

It is what the optimizer is compared with, so it is written from the formulas alone and loops over
parameters, blocks and dimensions in the plainest way.

Sources, besides those of the preconditioners and of the grafted methods:
    Anil, Gupta, Koren, Regan, Singer 2020, "Scalable Second Order Optimization for Deep Learning",
        arXiv 2002.09018: delayed roots, blocking, grafting.
    Shi et al. 2023, "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo
        Optimizer", arXiv 2309.06497: Algorithm 2 and Section 3 (the complete method; bias
        correction, grafting by the norm of each block, momentum, weight decay, and the start).
    Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", arXiv 1711.05101: Algorithm 1
        (L2 regularisation), Algorithm 2 (decoupled: AdamW; "independent" is the same with the
        schedule's factor alone, as in the paper).
"""

import dataclasses
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_fsdp import ShampooConfig
from tests.reference.algebra import LARGEST_GRADIENT, kept_in
from tests.reference.grafting import GraftedMethod, Moments
from tests.reference.kl_shampoo import KLShampooRule
from tests.reference.rule import Settings
from tests.reference.shampoo import ShampooRule
from tests.reference.soap import SoapRule
from tests.reference.views import blocks_of, view_shape

_RULES = {"shampoo": ShampooRule, "soap": SoapRule, "kl_shampoo": KLShampooRule}


@dataclass
class _Block:
    """A rectangle of a parameter and its state."""

    number: int
    index: tuple[int | slice, ...]
    moments: Moments
    rule: ShampooRule | SoapRule


class ReferenceShampoo:
    """Shampoo, SOAP or KL-Shampoo.

    Args:
        shapes: shape of each parameter, by name.
        excluded: names of parameters that take the grafted method's own step (Adam's for "none").
        phase: from a parameter's name and a block's number, row by row; for "staggered".
        group: lr, betas, eps and weight_decay.

    Gradients that are no use, by an entry that is not finite or above LARGEST_GRADIENT: such a
    block keeps its state on this step, but for the roots, which are refreshed when due, and its D
    is 0, and the weights decay. In an excluded parameter, which has no blocks, such an entry keeps
    its weight and its state. t advances all the same.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: ShampooConfig,
        *,
        excluded: Set[str] = frozenset(),
        phase: Callable[[str, int], int] = lambda name, number: 0,
        **group: Any,
    ) -> None:
        self.settings = given = Settings(config, **group)
        self.phase = phase
        self.method = GraftedMethod(given.grafting, given.beta3, given)
        of_excluded = "adam" if given.grafting == "none" else given.grafting
        self.excluded_method = GraftedMethod(of_excluded, given.betas[0], given)
        self.t = dict.fromkeys(shapes, 0)
        self.excluded = {name: Moments.zeros(shapes[name]) for name in excluded & shapes.keys()}
        self.blocks: dict[str, list[_Block]] = {}
        for name, shape in shapes.items():
            if name not in excluded:
                view, batches = self._view(shape)
                self.blocks[name] = []
                for number, (index, kinds) in enumerate(blocks_of(view, batches, given)):
                    cut = torch.empty(view)[index].shape
                    rule = _RULES[given.preconditioner](cut, kinds, given)
                    self.blocks[name].append(_Block(number, index, Moments.zeros(cut), rule))

    def _view(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        cap = self.settings.max_preconditioner_dim
        return view_shape(tuple(shape), self.settings.merge_dims, cap)

    @torch.no_grad()
    def step(self, params: dict[str, Tensor], grads: Mapping[str, Tensor | None]) -> None:
        """Update the parameters (fp64) in place; those with no gradient are left as they are."""
        for name, param in params.items():
            grad = grads.get(name)
            if grad is None:
                continue
            grad = grad.double()
            self.t[name] += 1
            lr, weight_decay = self.settings.lr, self.settings.weight_decay
            kind = self.settings.weight_decay_type
            if kind == "l2":
                grad = grad + weight_decay * param
            before = param.clone()
            direction = self._direction(name, grad)
            # Here lr does not change: the schedule's factor is 1.
            param *= (
                1 - {"decoupled": lr * weight_decay, "independent": weight_decay, "l2": 0}[kind]
            )
            param -= lr * self._scale(name, param.shape) * direction
            if name in self.excluded:
                param.copy_(torch.where(_usable(grad), param, before))

    def _scale(self, name: str, shape: torch.Size) -> float:
        width = self.settings.base_width
        if width is None or name in self.excluded or _is_vector(shape):
            return 1.0
        n = shape[2] if len(shape) == 3 else torch.Size(shape[1:]).numel()
        return (width / n) ** 0.5

    def _direction(self, name: str, grad: Tensor) -> Tensor:
        """D of a whole parameter."""
        if name in self.excluded:
            return self._excluded_direction(self.excluded[name], grad, self.t[name])
        view, _ = self._view(tuple(grad.shape))
        direction = torch.zeros(view, dtype=torch.float64)
        for block in self.blocks[name]:
            block_grad = grad.reshape(view)[block.index]
            direction[block.index] = self._block_direction(name, block, block_grad)
        return direction.reshape(grad.shape)

    def _excluded_direction(self, moments: Moments, grad: Tensor, t: int) -> Tensor:
        method, before, usable = self.excluded_method, dataclasses.replace(moments), _usable(grad)
        method.average(moments, torch.where(usable, grad, 0.0))
        direction = method.accelerate(moments, method.direction(moments, t), t)
        for name, old in vars(before).items():
            setattr(moments, name, torch.where(usable, getattr(moments, name), old))
        return direction

    def _block_direction(self, name: str, block: _Block, grad: Tensor) -> Tensor:
        """D of one block (Shi et al. 2023, Algorithm 2)."""
        t, moments, rule, method = self.t[name], block.moments, block.rule, self.method
        correction = self.settings.correction(self.settings.betas[1], t)
        usable = bool(_usable(grad).all())
        if usable:
            method.average(moments, grad)
            rule.accumulate(grad, correction)
        if self._refresh_is_due(name, block):
            rule.refresh(correction)
        if not usable:
            return torch.zeros_like(grad)
        rule.observe(grad)

        direction = method.direction(moments, t)
        if method.name == "none":
            if rule.has_roots or rule.works_without_roots:
                direction = rule.precondition(method.momentum_hat(moments, t), correction)
        elif rule.has_roots:
            # The direction is the preconditioner's, its size the grafted method's (Anil et al.
            # 2020, Section 2; Shi et al. 2023, Section 3.1: norms per block).
            preconditioned = rule.precondition(method.momentum_hat(moments, t), correction)
            norm = torch.linalg.vector_norm(preconditioned)
            size = torch.linalg.vector_norm(direction)
            direction = preconditioned * (size / norm if norm > 0 else 0.0)
        direction = method.accelerate(moments, direction, t)
        moments.momentum = kept_in(self.settings.momentum_dtype, moments.momentum)
        moments.buffer = kept_in(self.settings.momentum_dtype, moments.buffer)
        return direction

    def _refresh_is_due(self, name: str, block: _Block) -> bool:
        t = self.t[name]
        if t < self.settings.start_preconditioning_step:
            return False
        if not block.rule.has_roots:
            return True
        period = self._period(t)
        if self.settings.refresh_schedule == "together":
            return t % period == 0
        return (t + self.phase(name, block.number)) % period == 0

    def _period(self, t: int) -> int:
        """Time between refreshes at step t: p from the step on that is the sum of how long the
        shorter ones are in use, which is `least` steps each, or p + 1/2 if that is more."""
        frequency = self.settings.precondition_frequency
        warmup = self.settings.refresh_warmup_steps
        if not warmup:
            return frequency
        least, period = max(1, warmup // frequency), 1
        while period < frequency:
            longer = period + 1
            begin = longer * least if longer <= least else (longer**2 + least**2) / 2
            if t < begin:
                break
            period = longer
        return period


def _is_vector(shape: torch.Size) -> bool:
    return sum(side > 1 for side in shape) < 2


def _usable(grad: Tensor) -> Tensor:
    return grad.abs() < LARGEST_GRADIENT  # false for NaN
