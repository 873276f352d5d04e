"""The optimizers of TorchTitan 0.4, as far as they are known; see this folder's `__init__.py`.

It takes the place of `torchtitan/components/optimizer/optimizer.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer.utils import (
    get_flat_optim_state_dict,
    load_flat_optim_state_dict,
)
from torchtitan.config import Configurable
from torchtitan.tools.logging import logger

__all__ = ["Adam", "AdamW", "BaseOptimizer", "OptimizersContainer", "default_adamw"]


class BaseOptimizer(Optimizer, Configurable):
    """What all optimizers are that a job can name."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pattern: str


class _Adam(BaseOptimizer):
    """Takes its configuration, all but the pattern, as torch's own does."""

    def __init__(self, config: BaseOptimizer.Config, *, params: Any) -> None:
        settings = asdict(config)
        del settings["pattern"]
        super().__init__(params, **settings)


class Adam(_Adam, torch.optim.Adam):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseOptimizer.Config):
        lr: float = 1e-3
        betas: tuple[float, float] = (0.9, 0.999)
        eps: float = 1e-8
        weight_decay: float = 0.0
        fused: bool | None = True


class AdamW(_Adam, torch.optim.AdamW):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseOptimizer.Config):
        lr: float = 8e-4
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = 1e-8
        weight_decay: float = 0.1
        foreach: bool | None = None
        fused: bool | None = True


class OptimizersContainer(Optimizer, Stateful, Configurable):
    """One optimizer for each configuration and part of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        optimizers: Annotated[list[BaseOptimizer.Config], tyro.conf.Suppress] = field(
            default_factory=list
        )

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers: list[Optimizer] = []
        taken: list[nn.Parameter] = []
        for number, part in enumerate(model_parts):
            claimed: set[str] = set()
            for of in config.optimizers:
                group = _group(part, of.pattern, claimed)
                self.optimizers.append(of.build(params=[group]))
                logger.info(
                    f"Optimizer {type(self.optimizers[-1]).__name__} (model_part={number}): "
                    f"[{of.pattern}] { {'lr': of.lr, 'weight_decay': of.weight_decay} }"
                )
                taken += group["params"]
        trained = {p for part in model_parts for p in part.parameters() if p.requires_grad}
        if trained != set(taken) or len(taken) != len(trained):
            raise ValueError(f"{len(trained)} parameters are trained, {len(taken)} in optimizers")
        Optimizer.__init__(self, taken, {})  # for step hooks

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self.optimizers)

    def __len__(self) -> int:
        return len(self.optimizers)

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            init_optim_state(optimizer)
            flat |= get_flat_optim_state_dict(optimizer)
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            init_optim_state(optimizer)
            load_flat_optim_state_dict(optimizer, state_dict)

    def init_cache_state_dict(self) -> None:
        pass


def _group(part: nn.Module, pattern: str, claimed: set[str]) -> dict[str, Any]:
    """The parameters that the pattern finds and no pattern before it has."""
    found = {
        name: p
        for name, p in part.named_parameters()
        if p.requires_grad and name not in claimed and re.search(pattern, name)
    }
    if not found:
        raise ValueError(f"pattern {pattern!r} matches no parameters")
    claimed.update(found)
    return {"params": [*found.values()], "param_names": [*map(canonical_fqn, found)]}


def init_optim_state(optimizer: Optimizer) -> None:
    """A step with zeros and lr 0 for the parameters that have no state."""
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    without = [p for p in everything if p.requires_grad and not optimizer.state.get(p)]
    if not without:
        return
    gradients = [p.grad for p in everything]
    lrs = [group["lr"] for group in optimizer.param_groups]
    for p in everything:
        p.grad = None
    for p in without:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        is_tensor = isinstance(group["lr"], torch.Tensor)
        group["lr"] = torch.tensor(0.0) if is_tensor else 0.0
    optimizer.step(closure=None)
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        for p in without:
            for name in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[p][name].zero_()
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    for p, gradient in zip(everything, gradients, strict=True):
        p.grad = gradient


def default_adamw(lr: float = 8e-4, **settings: Any) -> OptimizersContainer.Config:
    """For the registries of TorchTitan 0.3.0, which ask for it."""
    adamw = AdamW.Config(pattern=".*", lr=lr, **settings)
    return OptimizersContainer.Config(optimizers=[adamw])
