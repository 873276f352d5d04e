"""The grafted method itself, for parameters that are not preconditioned: on their shards."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from shampoo_fsdp.bucket import weight_decay
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.grafting import LARGEST_GRADIENT, second_moment_name
from shampoo_fsdp.parameters import local_shard

__all__ = ["ElementwiseMethod"]

_CHUNK_ELEMENTS = 2**23
_CHUNK_ELEMENTS_ON_CPU = 2**18
"""How much is updated at a time, which bounds the memory of the copies; on CPUs so that they stay
in the cache, elsewhere so that kernels are few."""


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter's shard, and what belongs to it."""

    gradient: Tensor
    """Flat; the others may have other shapes and strides, and are changed in place."""
    kept: Mapping[str, Tensor]
    """The state, and the weights as `value`."""
    step: Tensor
    """Gradients before this one."""
    steps: int
    """The same with this one, for the host."""


class ElementwiseMethod:
    """Adam, RMSprop, AdaGrad or SGD with the settings of the grafted method.

    Where an entry of a gradient is not finite, or its square would not be, the entries of parameter
    and state stay as they are, each by itself: which rank holds them makes no difference. The
    gradients stay as they are.
    """

    def __init__(self, config: ShampooConfig, device: torch.device | None) -> None:
        self._config = config
        self._method = config.elementwise_method
        self._plain_adamw = (
            self._method == "adam"
            and config.use_bias_correction
            and not config.momentum
            and config.weight_decay_type == "decoupled"
        )
        names = ["exp_avg", second_moment_name(self._method)]
        if config.momentum:
            names.append("momentum_buffer")
        self._names = [name for name in names if name]
        self.skipped_entries = torch.zeros((), dtype=torch.int64, device=device)

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is kept for a parameter, in its shape and placement, beside `step`."""
        return {name: torch.zeros_like(parameter) for name in self._names}

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        steps: Sequence[int],
        counted: Sequence[bool],
        group: Mapping[str, Any],
    ) -> None:
        """Update parameters of one group, in place.

        Args:
            gradients: this rank's shards.
            states: with `step`, which is counted up, too.
            steps: gradients of each parameter so far, this one included.
            counted: whether this rank counts the entries that it skips, not another replica.
        """
        alike: dict[tuple[torch.dtype, bool], list[_Piece]] = defaultdict(list)
        for i, parameter in enumerate(parameters):
            kept = {name: local_shard(states[i][name]) for name in self._names}
            kept["value"] = local_shard(parameter)
            alike[parameter.dtype, counted[i]].extend(
                _pieces(gradients[i].reshape(-1), kept, states[i]["step"], steps[i])
            )
        for (_, is_counted), members in alike.items():
            for chunk in _chunks(members):
                self._step_chunk(chunk, is_counted, group)
        torch._foreach_add_([state["step"] for state in states], 1)

    def _step_chunk(self, chunk: Sequence[_Piece], counted: bool, group: Mapping[str, Any]) -> None:
        # In one piece, so that the number of kernels does not grow with that of the parameters.
        sizes = [piece.gradient.numel() for piece in chunk]
        old = {
            name: torch.cat([piece.kept[name].reshape(-1) for piece in chunk])
            for name in chunk[0].kept
        }
        gradient = torch.cat([piece.gradient for piece in chunk]).to(old["value"].dtype)
        if self._config.weight_decay_type == "l2" and group["weight_decay"]:
            gradient.add_(old["value"], alpha=group["weight_decay"])
        usable = gradient.abs() < LARGEST_GRADIENT  # false for NaN
        bad = usable.logical_not()
        if counted:
            self.skipped_entries += bad.sum()
        gradient.masked_fill_(bad, 0.0)
        new = {name: values.clone() for name, values in old.items()}
        kept = {name: list(torch.split(values, sizes)) for name, values in new.items()}
        split = list(torch.split(gradient, sizes))
        # The fused kernel alone takes the steps without reading them back.
        if self._plain_adamw and gradient.device.type in ("cpu", "cuda", "xpu"):
            self._adamw(split, kept, [piece.step for piece in chunk], group)
        else:
            self._step(split, kept, [piece.steps for piece in chunk], group)
        for name, values in new.items():
            torch.where(usable, values, old.pop(name), out=values)
            targets = [piece.kept[name] for piece in chunk]
            torch._foreach_copy_(
                targets, [v.view_as(t) for v, t in zip(kept[name], targets, strict=True)]
            )

    def _adamw(
        self,
        gradients: list[Tensor],
        kept: Mapping[str, list[Tensor]],
        steps: list[Tensor],
        group: Mapping[str, Any],
    ) -> None:
        beta1, beta2, eps = self._hyperparameters(group)
        adamw(
            kept["value"],
            gradients,
            kept["exp_avg"],
            kept["exp_avg_sq"],
            [],
            list(torch._foreach_add(steps, 0)),  # copies, which it counts up
            fused=True,
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
        gradients: list[Tensor],
        kept: Mapping[str, list[Tensor]],
        steps: list[int],
        group: Mapping[str, Any],
    ) -> None:
        """The lines of the optimizer's own step for a block, one list of pieces at a time."""
        config, (beta1, beta2, eps) = self._config, self._hyperparameters(group)
        exp_avgs = kept["exp_avg"]
        torch._foreach_lerp_(exp_avgs, gradients, 1.0 - beta1)
        updates = list(torch._foreach_div(exp_avgs, self._corrections(beta1, steps)))
        if name := second_moment_name(self._method):
            moments = kept[name]
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
            buffers = kept["momentum_buffer"]
            weights = [1.0 if step <= 1 else 1.0 - config.dampening for step in steps]
            torch._foreach_mul_(buffers, config.momentum)
            torch._foreach_add_(buffers, torch._foreach_mul(updates, weights))
            if config.nesterov:
                torch._foreach_add_(updates, buffers, alpha=config.momentum)
            else:
                updates = buffers
        if decay := weight_decay(group, config):
            torch._foreach_mul_(kept["value"], 1.0 - decay)
        torch._foreach_add_(kept["value"], updates, alpha=-group["lr"])

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


def _pieces(
    gradient: Tensor, kept: Mapping[str, Tensor], step: Tensor, steps: int
) -> Iterator[_Piece]:
    if not all(values.is_contiguous() for values in kept.values()):
        yield _Piece(gradient, kept, step, steps)
        return
    most = _most_elements(gradient)
    for start in range(0, len(gradient), most):
        part = slice(start, start + most)
        views = {name: values.view(-1)[part] for name, values in kept.items()}
        yield _Piece(gradient[part], views, step, steps)


def _chunks(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    chunk: list[_Piece] = []
    elements = 0
    for piece in pieces:
        if chunk and elements + piece.gradient.numel() > _most_elements(piece.gradient):
            yield chunk
            chunk, elements = [], 0
        chunk.append(piece)
        elements += piece.gradient.numel()
    if chunk:
        yield chunk


def _most_elements(tensor: Tensor) -> int:
    return _CHUNK_ELEMENTS_ON_CPU if tensor.device.type == "cpu" else _CHUNK_ELEMENTS
