"""The grafted method itself, for parameters that are not preconditioned: on their shards."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from shampoo_fsdp.bucket import weight_decay
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.grafting import LARGEST_GRADIENT, second_moment_name
from shampoo_fsdp.parameters import local_shard

__all__ = ["ElementwiseMethod"]


class ElementwiseMethod:
    """Adam, RMSprop, AdaGrad or SGD with the settings of the grafted method.

    Entries of the gradients that are not finite, or whose squares would not be, count as zero,
    each by itself: which rank holds them makes no difference. The gradients stay as they are.
    """

    def __init__(self, config: ShampooConfig) -> None:
        self._config = config
        self._method = config.elementwise_method
        self._plain_adamw = (
            self._method == "adam"
            and config.use_bias_correction
            and not config.momentum
            and config.weight_decay_type == "decoupled"
        )

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is kept for a parameter, in its shape and placement, beside `step`."""
        names = ["exp_avg", second_moment_name(self._method)]
        if self._config.momentum:
            names.append("momentum_buffer")
        return {name: torch.zeros_like(parameter) for name in names if name}

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        steps: Sequence[int],
        group: Mapping[str, Any],
    ) -> None:
        """Update parameters of one group, in place.

        Args:
            gradients: this rank's shards.
            states: with `step`, which is counted up, too.
            steps: gradients of each parameter so far, this one included.
        """
        by_type: dict[torch.dtype, list[int]] = defaultdict(list)
        for i, parameter in enumerate(parameters):
            by_type[parameter.dtype].append(i)
        for dtype, members in by_type.items():
            shards = [local_shard(parameters[i]) for i in members]
            # In one piece, so that the number of kernels does not grow with that of the parameters.
            flat = torch.cat([gradients[i].reshape(-1) for i in members]).to(dtype)
            if self._config.weight_decay_type == "l2" and group["weight_decay"]:
                weights = torch.cat([shard.reshape(-1) for shard in shards])
                flat.add_(weights, alpha=group["weight_decay"])
            flat.masked_fill_((flat.abs() < LARGEST_GRADIENT).logical_not_(), 0.0)
            parts = torch.split(flat, [shard.numel() for shard in shards])
            clean = [part.view_as(shard) for part, shard in zip(parts, shards, strict=True)]
            kept = [
                {name: local_shard(value) for name, value in states[i].items()} for i in members
            ]
            # The fused kernel takes memory as it lies, whatever the strides.
            if (
                self._plain_adamw
                and shards[0].device.type in ("cpu", "cuda", "xpu")
                and all(shard.is_contiguous() for shard in shards)
            ):
                self._adamw(shards, clean, kept, group)
            else:
                self._step(shards, clean, kept, [steps[i] for i in members], group)

    def _adamw(
        self,
        shards: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        group: Mapping[str, Any],
    ) -> None:
        beta1, beta2, eps = self._hyperparameters(group)
        adamw(
            shards,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,  # the others read the steps back
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=group["weight_decay"],
        )

    def _step(
        self,
        shards: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        steps: list[int],
        group: Mapping[str, Any],
    ) -> None:
        """The lines of the optimizer's own step for a block, one list of shards at a time."""
        config, (beta1, beta2, eps) = self._config, self._hyperparameters(group)
        exp_avgs = [state["exp_avg"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(exp_avgs, gradients, 1.0 - beta1)
        updates = list(torch._foreach_div(exp_avgs, self._corrections(beta1, steps)))
        if name := second_moment_name(self._method):
            moments = [state[name] for state in states]
            if self._method != "adagrad":
                torch._foreach_mul_(moments, beta2)
            weight = 1.0 if self._method == "adagrad" else 1.0 - beta2
            torch._foreach_addcmul_(moments, gradients, gradients, weight)
            roots = torch._foreach_sqrt(moments)
            if self._method == "adam":
                corrections = self._corrections(beta2, steps)
                torch._foreach_div_(roots, [correction**0.5 for correction in corrections])
            torch._foreach_add_(roots, eps)
            torch._foreach_div_(updates, roots)
        if config.momentum:
            buffers = [state["momentum_buffer"] for state in states]
            weights = [1.0 if step <= 1 else 1.0 - config.dampening for step in steps]
            torch._foreach_mul_(buffers, config.momentum)
            torch._foreach_add_(buffers, torch._foreach_mul(updates, weights))
            if config.nesterov:
                torch._foreach_add_(updates, buffers, alpha=config.momentum)
            else:
                updates = buffers
        if decay := weight_decay(group, config):
            torch._foreach_mul_(shards, 1.0 - decay)
        torch._foreach_add_(shards, updates, alpha=-group["lr"])

    def _hyperparameters(self, group: Mapping[str, Any]) -> tuple[float, float, float]:
        (beta1, beta2), config = group["betas"], self._config
        return (
            beta1,
            beta2 if config.grafting_beta2 is None else config.grafting_beta2,
            group["eps"] if config.grafting_eps is None else config.grafting_eps,
        )

    def _corrections(self, beta: float, steps: Sequence[int]) -> list[float]:
        if not self._config.use_bias_correction:
            return [1.0] * len(steps)
        return [1.0 - beta**step for step in steps]
