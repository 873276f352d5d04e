"""Optimizers that TorchTitan does not have and the study compares with."""

import shampoo_torchtitan.train  # noqa: F401  first: it makes TorchTitan run without a GPU

# isort: split

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.optim._muon
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer

from shampoo_fsdp import Shampoo
from shampoo_torchtitan.container import hyperparameters
from studies.pretrain import peers

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

_orthogonalize = torch.optim._muon._zeropower_via_newtonschulz


@dataclass
class Muon:
    """The table `[optimizer.muon]`; lr and weight_decay are those of `[optimizer]`."""

    momentum: float = 0.95
    nesterov: bool = True
    adjust_lr: str = "match_rms_adamw"
    """"match_rms_adamw" gives a matrix's update the size of AdamW's (Liu et al. 2025, 2502.16982,
    eq. 4), so that both share one lr; "original": sqrt(max(1, rows / columns))."""
    adamw_lr: float = 1.0
    """lr of AdamW, for embeddings, output layer and vectors, relative to Muon's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the Newton-Schulz products on CPUs; on GPUs it is bfloat16. CPUs without bf16 arithmetic
    emulate it, 20 times as slow."""


@dataclass
class Peer:
    """The table `[optimizer.peer]`; lr, betas, eps and weight_decay are those of `[optimizer]`."""

    code: str = ""
    """One of `peers.BUILDERS`."""
    adamw_lr: float = 1.0
    """lr of AdamW, for embeddings, output layer and vectors, relative to the peer's."""


class _WithAdamW(OptimizersContainer):  # type: ignore[type-arg]
    """An optimizer for the hidden matrices, `torch.optim.AdamW` for all other parameters."""

    def __init__(
        self,
        model_parts: list[nn.Module],
        config: Any,
        of_matrices: Callable[[list[nn.Parameter]], Optimizer],
        adamw_lr: float,
    ) -> None:
        self.model_parts = model_parts
        self.optimizers = []
        for part in model_parts:
            hidden, others = [], []
            for name, parameter in part.named_parameters():
                matrix = parameter.ndim == 2 and name.startswith("layers.")
                (hidden if matrix else others).append(parameter)
            own = hyperparameters(config) | {"lr": config.lr * adamw_lr}
            adamw = torch.optim.AdamW(others, **own, fused=True)
            self.optimizers += [of_matrices(hidden), adamw]
        self._post_init([p for part in model_parts for p in part.parameters()], {})

    def state_dict(self) -> dict[str, Any]:
        (part,) = self.model_parts
        return get_optimizer_state_dict(part, tuple(self.optimizers), options=_FLAT)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        (part,) = self.model_parts
        set_optimizer_state_dict(part, tuple(self.optimizers), state_dict, options=_FLAT)


class MuonContainer(_WithAdamW):
    """`torch.optim.Muon` for the hidden matrices."""

    def __init__(self, model_parts: list[nn.Module], config: Any) -> None:
        muon = config.muon
        torch.optim._muon._zeropower_via_newtonschulz = (
            _orthogonalize_in_fp32_on_cpu if muon.dtype == "float32" else _orthogonalize
        )
        of_matrices = partial(
            torch.optim.Muon,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=muon.momentum,
            nesterov=muon.nesterov,
            adjust_lr_fn=muon.adjust_lr,
        )
        super().__init__(model_parts, config, of_matrices, muon.adamw_lr)


class PeerContainer(_WithAdamW):
    """A peer's own code for the hidden matrices."""

    def __init__(self, model_parts: list[nn.Module], config: Any) -> None:
        of_matrices = partial(peers.build, config.peer.code, config)
        super().__init__(model_parts, config, of_matrices, config.peer.adamw_lr)


class ShardedShampooContainer(OptimizersContainer):  # type: ignore[type-arg]
    """Shampoo in one process, with the blocks that it would have on several with
    block_alignment = "shard": each shard of a parameter is a parameter of its own."""

    def __init__(self, model_parts: list[nn.Module], config: Any) -> None:
        self.model_parts = model_parts
        self.optimizers = []
        self._shards: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        for part in model_parts:
            named = []
            for name, parameter in part.named_parameters():
                pieces = [nn.Parameter(p) for p in parameter.data.chunk(config.simulated_shards)]
                self._shards.append((parameter, pieces))
                named += [(f"{name}.{i}", piece) for i, piece in enumerate(pieces)]
            of_job = hyperparameters(config)
            self.optimizers.append(Shampoo(named, **of_job, config=config.shampoo))
        self._post_init([p for part in model_parts for p in part.parameters()], {})

    def step(self, *args: Any, **kwargs: Any) -> None:
        for parameter, pieces in self._shards:
            assert parameter.grad is not None
            for piece, grad in zip(pieces, parameter.grad.chunk(len(pieces)), strict=True):
                piece.grad = grad
        super().step(*args, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        for parameter, pieces in self._shards:
            parameter.grad = None
            for piece in pieces:
                piece.grad = None


def _orthogonalize_in_fp32_on_cpu(
    grad: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    if grad.device.type != "cpu":
        return _orthogonalize(grad, coefficients, steps, eps)
    a, b, c = coefficients
    tall = grad.size(0) > grad.size(1)
    x = grad.T if tall else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
