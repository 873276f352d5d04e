"""Trains one model by several optimizers, on the same batches, from the same initial weights."""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.model_groups import param_groups
from shampoo_fsdp.optimizer import Shampoo
from shampoo_fsdp.tools.compare.muon import Muon

_AVERAGED = 10
"""Steps whose losses are one point of a curve."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer, with the settings that the study of this project chose for its Llama of 1 M
    parameters and 240 steps of 2,048 tokens."""

    lr: float
    make: Callable[[nn.Module, float], list[torch.optim.Optimizer]]
    """Of a model and lr."""


@dataclass
class Run:
    """How a training went."""

    name: str
    lr: float
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """The mean of the losses of 10 batches that had not been seen before, up to each of `steps`."""
    seconds: list[float] = field(default_factory=list)
    """Since the start, at each of `steps`."""
    optimizer_seconds: float = 0.0
    """All of its steps, without the first, which makes what is kept."""
    state_bytes: int = 0
    """On this rank."""

    def reached(self, loss: float, along: list[float] | list[int]) -> float | None:
        """Where the curve is at a loss for the first time; None if it never is.

        Args:
            along: steps or seconds, at each point; linear between two.
        """
        before: tuple[float, float] | None = None
        for place, here in zip(along, self.losses, strict=True):
            if here <= loss:
                if before is None:
                    return place
                return before[0] + (before[1] - loss) / (before[1] - here) * (place - before[0])
            before = place, here
        return None


def _adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.03)]


def _muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    left = Shampoo(param_groups(model)).matrices_left_to_grafting()
    named = dict(model.named_parameters())
    hidden = {n: p for n, p in named.items() if p.ndim == 2 and n not in left}  # Shampoo's
    others = [p for n, p in named.items() if n not in hidden]
    adamw = torch.optim.AdamW(others, lr, (0.9, 0.95), weight_decay=0.03)
    return [Muon(hidden.values(), lr, weight_decay=0.03, momentum=0.8), adamw]


def _shampoo(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    groups = param_groups(model)
    config = ShampooConfig(lr_factor=2.0, excluded_lr_factor=0.5)  # half a million tokens want 2
    return [Shampoo(groups, lr, (0.9, 0.95), weight_decay=0.1, config=config)]


CONTESTANTS = {
    "AdamW": Contestant(8e-3, _adamw),
    "Muon": Contestant(3.2e-2, _muon),
    "KL-Shampoo": Contestant(8e-3, _shampoo),
}


def train(
    name: str,
    lr: float,
    build: Callable[[], nn.Module],
    batches: Callable[[], Iterable[Any]],
    steps: int,
    device: torch.device,
    passed: Callable[[Run], None],
) -> Run:
    """Train a model once; lr rises over the first eighth of the steps and falls to zero.

    Args:
        build, batches: see :mod:`shampoo_fsdp.tools.compare.command`.
        passed: is called after each point of the curve.

    Raises:
        ValueError: there are fewer batches than steps.
    """
    torch.manual_seed(0)
    model = build().to(device)
    if dist.is_initialized():
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    fully_shard(layer)
        fully_shard(model)
    optimizers = CONTESTANTS[name].make(model, lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    run, losses, start = Run(name, lr), [], time.perf_counter()
    for step, batch in enumerate(itertools.islice(batches(), steps), 1):
        for group in groups:
            group["lr"] = lr * _schedule(step, steps)
        loss = _loss(model, batch, device)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        began = _now(device)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.optimizer_seconds += _now(device) - began if step > 1 else 0.0
        losses.append(loss.detach())
        if step % _AVERAGED == 0 or step == steps:
            mean = torch.stack(losses).mean()
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            run.steps.append(step)
            run.losses.append(float(mean))
            run.seconds.append(_now(device) - start)
            losses = []
            passed(run)
    if not run.steps or run.steps[-1] < steps:
        raise ValueError(f"--data has fewer than the {steps:,} batches that --steps asks for.")
    run.state_bytes = sum(map(_bytes, optimizers))
    return run


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, steps // 8)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def _loss(model: nn.Module, batch: Any, device: torch.device) -> Tensor:
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
    if isinstance(moved, dict):
        output = model(**moved)
    else:
        output = model(*moved) if isinstance(moved, (tuple, list)) else model(moved)
    loss = getattr(output, "loss", output)
    if not (isinstance(loss, Tensor) and loss.ndim == 0):
        raise ValueError("--model: its forward must return the loss, or an object with `loss`.")
    return loss


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _bytes(optimizer: torch.optim.Optimizer) -> int:
    if isinstance(optimizer, Shampoo):
        return int(optimizer.summary()["state_mib_max"] * 2**20)
    local = (
        value.to_local() if isinstance(value, DTensor) else value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return sum(tensor.numel() * tensor.itemsize for tensor in local)
