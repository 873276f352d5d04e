"""The grafted method itself, for parameters that are not preconditioned (see
`choice.is_preconditioned`): on their shards."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.kernels.adamw import adamw_masked
from shampoo_fsdp.kernels.language import can_run
from shampoo_fsdp.rules.grafting import (
    LARGEST_GRADIENT,
    accelerate,
    graft_step,
    second_moment_name,
    update_second_moment,
)
from shampoo_fsdp.runtime.parameters import Member

_CHUNK_ELEMENTS = 2**24
_CHUNK_ELEMENTS_ON_CPU = 2**18
"""How much is updated at a time, which bounds the memory of the copies; on CPUs so that they stay
in the cache, elsewhere so that kernels are few."""


_ALONE = 16
"""Pieces of at least this part of it are updated alone, without a copy."""

_Span = dict[str, Tensor]
"""A part of a parameter's shard: its `gradient`, flat, which stays as it is; its state and, as
`value`, the weights, which may have other shapes and strides, and are changed in place."""


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
        names = "exp_avg", second_moment_name(self._method), "momentum_buffer"
        self._names = [name for name in names[: 3 if config.momentum else 2] if name]
        self.skipped_entries = torch.zeros((), dtype=torch.int64, device=device)

    def create_entries(self, member: Member) -> dict[str, Tensor]:
        """The state of a parameter before the first step, in its shape, placement and type."""
        return {name: torch.zeros_like(member.parameter) for name in self._names}

    def step(self, groups: Sequence[Mapping[str, object]]) -> None:
        """Update the members that have a gradient, in place.

        Args:
            groups: of the optimizer.
        """
        # One bias correction for all.
        alike: dict[tuple[int, int, bool, torch.dtype], list[_Span]] = defaultdict(list)
        for member in self.members:
            if member.gradient is not None:
                span = member.shards(self._names) | {"gradient": member.gradient.reshape(-1)}
                key = member.group, member.step, member.counts, member.parameter.dtype
                alike[key].append(span)
        for (number, step, counts, _), spans in alike.items():
            factor = self._config.excluded_lr_factor
            settings = GroupSettings.of(groups[number], self._config, factor)
            for chunk in _chunks(spans):
                self._step_chunk(chunk, step, counts, settings)

    def _step_chunk(
        self, chunk: Sequence[_Span], step: int, counts: bool, group: GroupSettings
    ) -> None:
        # In one piece, so that the number of kernels does not grow with that of the parameters; one
        # that is alone needs no copy for that.
        parts = {name: [span[name].reshape(-1) for span in chunk] for name in chunk[0]}
        old = {name: torch.cat(of) if len(of) > 1 else of[0] for name, of in parts.items()}
        gradient = old.pop("gradient")
        sizes = [span["gradient"].numel() for span in chunk]
        beta1, beta2 = group.betas[0], group.graft_beta2
        fits = gradient.numel() < 2**31 and all(
            t.is_contiguous() for t in (gradient, *old.values())
        )
        if self._plain_adamw and fits and can_run(gradient, *old.values()):
            adamw_masked(
                *(old["value"], gradient, old["exp_avg"], old["exp_avg_sq"]),
                self.skipped_entries if counts else torch.zeros_like(self.skipped_entries),
                LARGEST_GRADIENT,
                step_size=group.lr / (1.0 - beta1**step),
                lost=group.lost,
                rate1=1.0 - beta1,
                rate2=1.0 - beta2,
                eps=group.graft_eps,
                root=(1.0 - beta2**step) ** 0.5,
            )
        else:
            self._step_copies(gradient, old, sizes, step, counts, group)
        for name, values in old.items():
            targets = [span[name] for span in chunk]
            if len(chunk) > 1 or not targets[0].is_contiguous():
                pairs = zip(torch.split(values, sizes), targets, strict=True)
                torch._foreach_copy_(targets, [part.view_as(target) for part, target in pairs])

    def _step_copies(
        self,
        gradient: Tensor,
        old: Mapping[str, Tensor],
        sizes: list[int],
        step: int,
        counts: bool,
        group: GroupSettings,
    ) -> None:
        """Take the step on copies, and keep of it the entries whose gradients are usable."""
        gradient = gradient.to(old["value"].dtype)
        new = {name: values.clone() for name, values in old.items()}
        if self._config.weight_decay_type == "l2" and group.weight_decay:
            gradient = torch.add(gradient, new["value"], alpha=group.weight_decay)
        usable = gradient.abs() < LARGEST_GRADIENT  # false for NaN
        if counts:
            self.skipped_entries += usable.numel() - usable.sum()
        gradient = torch.where(usable, gradient, 0.0)
        # The fused kernel alone takes the step without reading it back.
        if self._plain_adamw and gradient.device.type in ("cpu", "cuda", "xpu"):
            names = "value", "exp_avg", "exp_avg_sq"
            weights, first, second = (list(torch.split(new[name], sizes)) for name in names)
            # The kernel counts them up itself.
            steps = gradient.new_full((len(sizes),), step - 1.0, dtype=torch.float32)
            adamw(
                weights, list(torch.split(gradient, sizes)), first, second, [],
                list(steps.unbind()), fused=True, amsgrad=False, maximize=False,
                lr=group.lr, beta1=group.betas[0], beta2=group.graft_beta2, eps=group.graft_eps,
                weight_decay=group.weight_decay,
            )  # fmt: skip
        else:
            self._other(gradient, new, step, group)
        for name, values in old.items():
            torch.where(usable, new.pop(name), values, out=values)

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


def _chunks(spans: Sequence[_Span]) -> Iterator[list[_Span]]:
    """The spans in lists of about as many elements as are updated at a time; large ones are cut,
    unless they are strided."""
    chunk: list[_Span] = []
    elements = 0
    for span in spans:
        size, on_cpu = span["gradient"].numel(), span["gradient"].device.type == "cpu"
        most = _CHUNK_ELEMENTS_ON_CPU if on_cpu else _CHUNK_ELEMENTS
        parts = [span]
        if all(values.is_contiguous() for values in span.values()):
            flat = {name: values.view(-1) for name, values in span.items()}
            parts = [
                {name: values[start : start + most] for name, values in flat.items()}
                for start in range(0, size, most)
            ]
        for part in parts:
            if part["gradient"].numel() >= most // _ALONE:
                yield [part]
                continue
            if chunk and elements + part["gradient"].numel() > most:
                yield chunk
                chunk, elements = [], 0
            chunk.append(part)
            elements += part["gradient"].numel()
    if chunk:
        yield chunk
