"""The optimizers that are compared: ours, torch's, and Meta's where it is installed.

    git clone https://github.com/facebookresearch/optimizers
    PYTHONPATH=optimizers python -m benchmarks.step_time

Where the same setting exists it has the same value as in ours. Vectors, which ours leaves to AdamW
as well, are AdamW's.
"""

import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.runtime.choice import excluded_names

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
HYPERPARAMETERS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


@dataclass(frozen=True)
class Row:
    """An optimizer of the comparison."""

    name: str
    build: Callable[[nn.Module], list[Optimizer]]
    """The optimizers whose steps make a step of the model's."""
    period: int = 1
    """Steps after which its cost repeats."""
    cap: int = 0
    """The largest side of a block, if it has blocks, ..."""
    exclude: tuple[str, ...] = ()
    """... and the matrices that have none."""


_CAP = 256
_LIKE_PEERS: dict[str, Any] = {
    "preconditioner": "shampoo",
    "exclude": [],
    "max_preconditioner_dim": _CAP,
    "beta3": BETAS[0],
}


def shampoo_row(name: str, **settings: Any) -> Row:
    """A row of ours, doing what the peers do unless settings say otherwise: Shampoo of all matrices
    in 256-blocks, without Nesterov's momentum."""
    # What is measured is what a step costs in the long run.
    settings = _LIKE_PEERS | {"refresh_warmup_steps": 0} | settings
    config = ShampooConfig(**settings)
    return Row(
        name,
        lambda model: [Shampoo(model.named_parameters(), **HYPERPARAMETERS, **settings)],
        period=config.precondition_frequency,
        cap=config.max_preconditioner_dim,
        exclude=tuple(excluded_names(config)),
    )


_VARIANTS: dict[str, dict[str, Any]] = {
    "256, every 10": {},
    "256, every step": {"precondition_frequency": 1},
    "SOAP, 256, every 10": {"preconditioner": "soap"},
    "KL-Shampoo, 256, every 10": {"preconditioner": "kl_shampoo"},
    "256, every 10, low memory": {
        "symmetric_packing": True,
        "momentum_dtype": "bfloat16",
        "root_dtype": "bfloat16",
        "factor_dtype": "bfloat16",
    },
}


def our_rows() -> list[Row]:
    """Shampoo as it is by default, and with every matrix preconditioned in several ways."""
    default = {name: getattr(ShampooConfig(), name) for name in _LIKE_PEERS}
    rows = [shampoo_row(f"Shampoo {name}", **settings) for name, settings in _VARIANTS.items()]
    return [shampoo_row("Shampoo, default settings", **default), *rows]


def torch_rows(exclude: Sequence[str] = ()) -> list[Row]:
    """torch.optim's; Muon leaves vectors to AdamW, and matrices whose names these patterns find."""
    return [
        Row("AdamW, fused", lambda model: [_adamw(list(model.parameters()))]),
        Row("torch.optim.Muon", partial(_with_adamw, _muon, exclude=exclude)),
    ]


def _adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **HYPERPARAMETERS)


def _muon(matrices: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Muon(matrices, lr=LR, weight_decay=WEIGHT_DECAY)


def _with_adamw(
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    model: nn.Module,
    exclude: Sequence[str] = (),
) -> list[Optimizer]:
    """AdamW for what is no matrix, or has a name that these patterns find."""
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, p in model.named_parameters():
        other = p.ndim != 2 or any(re.search(pattern, name) for pattern in exclude)
        (others if other else matrices).append(p)
    return [optimizer(matrices), _adamw(others)]


def meta_rows() -> list[Row]:
    """Distributed Shampoo in its lossless mode; none where it is not installed."""
    if importlib.util.find_spec("distributed_shampoo") is None:
        return []
    logging.getLogger("distributed_shampoo").setLevel(logging.ERROR)
    _let_meta_use_gloo()
    return [
        _meta_row("Meta 256, every 10", 10),
        _meta_row("Meta 256, every step", 1),
        _meta_row("Meta SOAP, 256, every 10", 10, "DefaultSOAPConfig"),
    ]


def _meta_row(name: str, frequency: int, method: str = "DefaultShampooConfig") -> Row:
    meta = importlib.import_module("distributed_shampoo")
    soap = "SOAP" in method

    def build(matrices: list[nn.Parameter]) -> Optimizer:
        optimizer: Optimizer = meta.DistributedShampoo(
            matrices,
            lr=LR,
            betas=BETAS,
            # Its SOAP uses this one as Adam's; its Shampoo as the ridge.
            epsilon=EPS if soap else 1e-12,
            weight_decay=WEIGHT_DECAY,
            weight_decay_type=meta.WeightDecayType.DECOUPLED,
            max_preconditioner_dim=_CAP,
            precondition_frequency=frequency,
            grafting_config=None
            if soap
            else meta.AdamPreconditionerConfig(beta2=BETAS[1], epsilon=EPS),
            preconditioner_config=getattr(meta, method),
            distributed_config=meta.FullyShardDistributedConfig(
                target_parameter_dimensionality=2,
                param_assignment_strategy=meta.FSDPParamAssignmentStrategy.ROUND_ROBIN,
            ),
        )
        return optimizer

    return Row(name, partial(_with_adamw, build), period=frequency, cap=_CAP)


def _let_meta_use_gloo() -> None:
    """Its lists of slices of two buffers are sent as the two buffers, which gloo can."""
    utils: Any = importlib.import_module("distributed_shampoo.utils.shampoo_fully_shard_utils")

    def execute(self: Any) -> None:
        dist.all_to_all_single(
            self._recv_buffer,
            self._send_buffer,
            self._recv_sizes,
            self._send_sizes,
            group=self._dist_group,
        )

    utils.AllToAllContext._execute_all_to_all = execute
