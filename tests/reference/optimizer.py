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
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.algebra import LARGEST_GRADIENT, kept_in
from tests.reference.grafting import GraftedMethod, Moments, bias_correction
from tests.reference.kl_shampoo import KLShampooRule
from tests.reference.rule import Preconditioner, RuleSettings
from tests.reference.shampoo import ShampooRule
from tests.reference.soap import SoapRule
from tests.reference.views import blocks_of, view_shape

__all__ = ["ReferenceShampoo"]

_RULES: dict[str, Callable[[torch.Size, tuple[str, ...], RuleSettings], Preconditioner]] = {
    "shampoo": ShampooRule,
    "soap": SoapRule,
    "kl_shampoo": KLShampooRule,
}
_OWN_ROOT_METHOD = {"shampoo": "eigh", "soap": "qr", "kl_shampoo": "eigh"}


@dataclass
class _Block:
    """A rectangle of a parameter and its state."""

    coordinates: tuple[int, ...]
    index: tuple[int | slice, ...]
    moments: Moments
    rule: Preconditioner


class ReferenceShampoo:
    """Shampoo, SOAP or KL-Shampoo.

    Args:
        shapes: shape of each parameter, by name.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. betas[1] == 1 means that the factors
            are plain sums (Gupta et al. 2018) instead of exponential averages (Shi et al. 2023).
            `lr` is an attribute that a test may change from step to step.
        initial_lr: for weight_decay_type "independent". None: lr.
        max_preconditioner_dim: the largest side of a block.
        precondition_frequency: steps from one refresh of a block's roots to the next.
        start_preconditioning_step: the first step that uses the roots, and computes them.
        refresh_warmup_steps: steps over which the time between refreshes grows from 1 to the
            frequency. None: 10 times the frequency.
        refresh_schedule: "together": roots are refreshed when t % frequency == 0; "staggered": when
            (t + phase) % frequency == 0.
        preconditioner: "shampoo", "soap" or "kl_shampoo".
        grafting: "adam", "rmsprop" (no bias correction), "adagrad" (sums), "sgd" or "none".
        grafting_beta2, grafting_eps: of the grafted method. None: betas[1], eps.
        beta3: weight of the last momentum in what is used of it, of preconditioned parameters.
            None: betas[0]^2, Nesterov's.
        use_bias_correction: without, all averages are taken as they are.
        momentum, nesterov, dampening: of the direction, as in torch.optim.SGD.
        weight_decay_type: "decoupled", "l2" or "independent".
        preconditioner_eps: added to the eigenvalues of the bias-corrected factors.
        root_method: "qr" improves the last eigenbasis by a step of orthogonal iteration,
            "eigh_pseudo_inverse" leaves out null spaces; all others have the same limit, which is
            computed here. None: "qr" for soap, "eigh" for the others.
        root_exponents: entry k-1 is the power -root_exponents[k-1] of tensors with k factors; 0:
            the rule's own.
        large_dim: what dimensions above max_preconditioner_dim get: "block" (they are cut),
            "one_sided" (no factor), "diagonal" (a diagonal one).
        max_factor_ratio: a side of a block has a factor if that has at most so many times the
            block's elements, or if the side is the shortest one.
        base_width: the lr of a weight [m, n] that is preconditioned is multiplied by the root of
            base_width / n (experts [E, m, n] the same, [m, n_1, n_2, ...] with the product). None:
            by 1.
        precondition_1d: blocks of one row or column are vectors, with all of their factors.
        merge_dims: "matrix": shapes of order 4 and more count as [out, rest]; "small": neighbouring
            dimensions are merged up to max_preconditioner_dim; "none".
        factor_dtype, root_dtype, momentum_dtype: "bfloat16" rounds what is kept of blocks from step
            to step; "float32" does not. All is computed in fp64.
        excluded: names of parameters that take the grafted method's own step (Adam's for "none").
        phase: from a parameter's name and a block's coordinates; needed for "staggered". The
            coordinates count the blocks along each dimension of the shape that is cut, after the
            number of the matrix for a batch of them: (e, i, j).
        batched_3d: cut a parameter of order 3 into its matrices [E] x [m, n]; otherwise it is a
            tensor with three factors.

    Gradients that are no use, by an entry that is not finite or above LARGEST_GRADIENT: such a
    block keeps its state on this step, but for the roots, which are refreshed when due, and its D
    is 0, and the weights decay. In an excluded parameter, which has no blocks, such an entry keeps
    its weight and its state. t advances all the same.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_preconditioner_dim: int,
        precondition_frequency: int,
        preconditioner_eps: float,
        initial_lr: float | None = None,
        start_preconditioning_step: int = 2,
        refresh_warmup_steps: int | None = None,
        refresh_schedule: str = "together",
        preconditioner: str = "shampoo",
        grafting: str = "adam",
        grafting_beta2: float | None = None,
        beta3: float | None = None,
        grafting_eps: float | None = None,
        use_bias_correction: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        weight_decay_type: str = "decoupled",
        root_method: str | None = None,
        root_exponents: list[float] | None = None,
        large_dim: str = "block",
        max_factor_ratio: float = 4.0,
        merge_dims: str = "matrix",
        factor_dtype: str = "float32",
        root_dtype: str = "float32",
        momentum_dtype: str = "float32",
        excluded: set[str] | frozenset[str] = frozenset(),
        phase: Callable[[str, tuple[int, ...]], int] | None = None,
        batched_3d: bool = True,
        precondition_1d: bool = False,
        base_width: int | None = None,
    ) -> None:
        grafting_beta2 = betas[1] if grafting_beta2 is None else grafting_beta2
        for name, value, allowed in (
            ("refresh_schedule", refresh_schedule, ("together", "staggered")),
            ("grafting", grafting, ("adam", "rmsprop", "adagrad", "sgd", "none")),
            ("weight_decay_type", weight_decay_type, ("decoupled", "l2", "independent")),
            ("large_dim", large_dim, ("block", "one_sided", "diagonal")),
            ("merge_dims", merge_dims, ("matrix", "small", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}")
        if refresh_schedule == "staggered" and phase is None:
            raise ValueError("the staggered schedule needs a phase")
        if grafting in ("adam", "rmsprop") and not grafting_beta2 < 1:
            raise ValueError(f"grafting {grafting!r} needs grafting_beta2 < 1")
        self.lr = lr
        self.initial_lr = lr if initial_lr is None else initial_lr
        self.beta2 = betas[1]
        self.weight_decay = weight_decay
        self.weight_decay_type = weight_decay_type
        self.use_bias_correction = use_bias_correction
        self.method = GraftedMethod(
            name=grafting,
            beta1=betas[0],
            beta2=grafting_beta2,
            eps=eps if grafting_eps is None else grafting_eps,
            use_bias_correction=use_bias_correction,
            momentum=momentum,
            nesterov=nesterov,
            dampening=dampening,
            beta3=betas[0] ** 2 if beta3 is None else beta3,
        )
        self.excluded_method = dataclasses.replace(
            self.method, name="adam" if grafting == "none" else grafting, beta3=betas[0]
        )
        self.base_width = base_width
        self.cap = max_preconditioner_dim
        self.frequency = precondition_frequency
        self.start = start_preconditioning_step
        self.warmup = 10 * self.frequency if refresh_warmup_steps is None else refresh_warmup_steps
        self.refresh_schedule = refresh_schedule
        self.phase = phase
        self.batched_3d = batched_3d
        self.merge_dims = merge_dims
        self.momentum_dtype = momentum_dtype
        rule_settings = RuleSettings(
            beta2=self.beta2,
            eps=eps,
            preconditioner_eps=preconditioner_eps,
            root_method=root_method or _OWN_ROOT_METHOD[preconditioner],
            root_exponents=root_exponents or [],
            factor_dtype=factor_dtype,
            root_dtype=root_dtype,
        )

        self.t = dict.fromkeys(shapes, 0)
        self.excluded: dict[str, Moments] = {}
        self.blocks: dict[str, list[_Block]] = {}
        for name, shape in shapes.items():
            if name in excluded:
                self.excluded[name] = Moments.zeros(tuple(shape))
                continue
            view, batches = self._view(tuple(shape))
            whole = torch.zeros(view, dtype=torch.float64)
            self.blocks[name] = [
                _Block(
                    coordinates=block.coordinates,
                    index=block.index,
                    moments=Moments.zeros(whole[block.index].shape),
                    rule=_RULES[preconditioner](
                        whole[block.index].shape, block.kinds, rule_settings
                    ),
                )
                for block in blocks_of(
                    view,
                    batches,
                    cap=self.cap,
                    large_dim=large_dim,
                    max_factor_ratio=max_factor_ratio,
                    precondition_1d=precondition_1d,
                )
            ]

    def _view(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        return view_shape(
            shape, batched_3d=self.batched_3d, merge_dims=self.merge_dims, cap=self.cap
        )

    @torch.no_grad()
    def step(self, params: dict[str, Tensor], grads: Mapping[str, Tensor | None]) -> None:
        """Update the parameters (fp64) in place; those with no gradient are left as they are."""
        for name, param in params.items():
            if param.dtype != torch.float64:
                raise TypeError(f"{name} is {param.dtype}; the reference computes in fp64")
            grad = grads.get(name)
            if grad is None:
                continue
            grad = grad.double()
            self.t[name] += 1
            if self.weight_decay_type == "l2":
                grad = grad + self.weight_decay * param
            before = param.clone()
            direction = self._direction(name, grad)
            if self.weight_decay_type == "decoupled":
                param *= 1 - self.lr * self.weight_decay
            elif self.weight_decay_type == "independent":
                param *= 1 - self.weight_decay * self.lr / self.initial_lr
            param -= self.lr * self._scale(name, param.shape) * direction
            if name in self.excluded:
                param.copy_(torch.where(_usable(grad), param, before))

    def _scale(self, name: str, shape: torch.Size) -> float:
        if self.base_width is None or name in self.excluded or _is_vector(shape):
            return 1.0
        n = shape[2] if len(shape) == 3 else torch.Size(shape[1:]).numel()
        return (self.base_width / n) ** 0.5

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
        correction = bias_correction(self.beta2, t, self.use_bias_correction)
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
        moments.momentum = kept_in(self.momentum_dtype, moments.momentum)
        moments.buffer = kept_in(self.momentum_dtype, moments.buffer)
        return direction

    def _refresh_is_due(self, name: str, block: _Block) -> bool:
        t = self.t[name]
        if t < self.start:
            return False
        if not block.rule.has_roots:
            return True
        period = self._period(t)
        if self.refresh_schedule == "together":
            return t % period == 0
        assert self.phase is not None
        return (t + self.phase(name, block.coordinates)) % period == 0

    def _period(self, t: int) -> int:
        """Time between refreshes at step t: p from the step on that is the sum of how long the
        shorter ones are in use, which is `least` steps each, or p + 1/2 if that is more."""
        if not self.warmup:
            return self.frequency
        least = max(1, self.warmup // self.frequency)
        period = 1
        while period < self.frequency:
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
