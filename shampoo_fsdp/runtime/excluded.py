"""The grafted method itself, for parameters that are not preconditioned (see
`choice.is_preconditioned`): on their shards."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.rules.grafting import (
    LARGEST_GRADIENT,
    accelerate,
    graft_step,
    second_moment_name,
    update_second_moment,
)
from shampoo_fsdp.runtime.parameters import Member, local_shard

__all__ = ["ExcludedParameters"]

_CHUNK_ELEMENTS = 2**24
_CHUNK_ELEMENTS_ON_CPU = 2**18
"""How much is updated at a time, which bounds the memory of the copies; on CPUs so that they stay
in the cache, elsewhere so that kernels are few."""


@dataclass(frozen=True)
class _Span:
    """A part of a parameter's shard, and what belongs to it."""

    gradient: Tensor
    """Flat; the others may have other shapes and strides, and are changed in place."""
    kept: Mapping[str, Tensor]
    """The state, and the weights as `value`."""


class ExcludedParameters:
    """Adam, RMSprop, AdaGrad or SGD with the settings of the grafted method.

    Where an entry of a gradient is not finite, or its square would not be, the entries of parameter
    and state stay as they are, each by itself: which rank holds them makes no difference. The
    gradients stay as they are.
    """

    def __init__(
        self, members: Sequence[Member], config: ShampooConfig, device: torch.device
    ) -> None:
        """
        Args:
            members: parameters that are not preconditioned.
        """
        self.members = list(members)
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

    def create_entries(self, member: Member) -> dict[str, Tensor]:
        """The state of a parameter before the first step, in its shape, placement and type."""
        return {name: torch.zeros_like(member.parameter) for name in self._names}

    def has_types_of_the_model(self) -> bool:
        """Whether the state has the types of the parameters, which may be cast to others."""
        return all(m.state["exp_avg"].dtype == m.parameter.dtype for m in self.members)

    def step(self, groups: Sequence[Mapping[str, object]]) -> None:
        """Update the members that have a gradient, in place.

        Args:
            groups: of the optimizer.
        """
        # One bias correction for all.
        alike: dict[tuple[int, int, bool, torch.dtype], list[_Span]] = defaultdict(list)
        for member in self.members:
            if member.gradient is not None:
                kept = {name: local_shard(member.state[name]) for name in self._names}
                kept["value"] = member.shard()
                key = member.group, member.step, member.counts, member.parameter.dtype
                alike[key].extend(_pieces(member.gradient.reshape(-1), kept))
        for (number, step, counts, _), pieces in alike.items():
            factor = self._config.excluded_lr_factor
            settings = GroupSettings.of(groups[number], self._config, factor)
            for chunk in _chunks(pieces):
                self._step_chunk(chunk, step, counts, settings)

    def _step_chunk(
        self, chunk: Sequence[_Span], step: int, counts: bool, group: GroupSettings
    ) -> None:
        # In one piece, so that the number of kernels does not grow with that of the parameters; one
        # that is alone needs no copy for that.
        old = {
            name: _joined([piece.kept[name].reshape(-1) for piece in chunk])
            for name in chunk[0].kept
        }
        new = {name: values.clone() for name, values in old.items()}
        gradient = _joined([piece.gradient for piece in chunk]).to(new["value"].dtype)
        if self._config.weight_decay_type == "l2" and group.weight_decay:
            gradient = torch.add(gradient, new["value"], alpha=group.weight_decay)
        usable = gradient.abs() < LARGEST_GRADIENT  # false for NaN
        if counts:
            self.skipped_entries += usable.numel()
            self.skipped_entries -= usable.sum()
        gradient = torch.where(usable, gradient, 0.0)
        sizes = [piece.gradient.numel() for piece in chunk]
        # The fused kernel alone takes the step without reading it back.
        if self._plain_adamw and gradient.device.type in ("cpu", "cuda", "xpu"):
            lists = {name: list(torch.split(values, sizes)) for name, values in new.items()}
            self._adamw(list(torch.split(gradient, sizes)), lists, step, group)
        else:
            self._other(gradient, new, step, group)
        for name, values in old.items():
            torch.where(usable, new.pop(name), values, out=values)
            targets = [piece.kept[name] for piece in chunk]
            if len(chunk) > 1 or not targets[0].is_contiguous():
                torch._foreach_copy_(
                    targets,
                    [
                        v.view_as(t)
                        for v, t in zip(torch.split(values, sizes), targets, strict=True)
                    ],
                )

    def _adamw(
        self,
        gradients: list[Tensor],
        kept: Mapping[str, list[Tensor]],
        step: int,
        group: GroupSettings,
    ) -> None:
        # The kernel counts them up itself.
        steps = torch.full(
            (len(gradients),), step - 1.0, dtype=torch.float32, device=gradients[0].device
        )
        adamw(
            kept["value"],
            gradients,
            kept["exp_avg"],
            kept["exp_avg_sq"],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group.lr,
            beta1=group.betas[0],
            beta2=group.graft_beta2,
            eps=group.graft_eps,
            weight_decay=group.weight_decay,
        )

    def _other(
        self, gradient: Tensor, kept: Mapping[str, Tensor], step: int, group: GroupSettings
    ) -> None:
        """The lines of a block's own step without the preconditioning."""
        config, beta1, beta2 = self._config, group.betas[0], group.graft_beta2
        exp_avg = kept["exp_avg"].lerp_(gradient, 1.0 - beta1)
        moment = kept.get(second_moment_name(self._method) or "")
        if moment is not None:
            update_second_moment(self._method, moment, gradient, beta2, beta2)
        corrected = config.use_bias_correction
        c1, c2 = (1.0 - beta**step if corrected else 1.0 for beta in (beta1, beta2))
        update, factor = graft_step(self._method, exp_avg, moment, c1, c2, group.graft_eps)
        update = update * factor
        if config.momentum:
            first = 1.0 if step <= 1 else 1.0 - config.dampening
            accelerate(config, update, kept["momentum_buffer"], first)
        if group.lost:
            kept["value"].mul_(1.0 - group.lost)
        kept["value"].add_(update, alpha=-group.lr)


def _pieces(gradient: Tensor, kept: Mapping[str, Tensor]) -> Iterator[_Span]:
    if not all(values.is_contiguous() for values in kept.values()):
        yield _Span(gradient, kept)
        return
    most = _most_elements(gradient)
    for start in range(0, len(gradient), most):
        part = slice(start, start + most)
        yield _Span(gradient[part], {name: v.view(-1)[part] for name, v in kept.items()})


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _chunks(pieces: Sequence[_Span]) -> Iterator[list[_Span]]:
    chunk: list[_Span] = []
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
