"""The optimizers that are compared: ours and torch's; peers.py has the others."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shampoo_fsdp import Shampoo, ShampooConfig

__all__ = ["LR", "Row", "matrices_and_vectors", "our_rows", "shampoo_row", "torch_rows"]

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
HYPERPARAMETERS: dict[str, Any] = {
    "lr": LR,
    "betas": BETAS,
    "eps": EPS,
    "weight_decay": WEIGHT_DECAY,
}


@dataclass(frozen=True)
class Row:
    """An optimizer of the comparison."""

    name: str
    build: Callable[[nn.Module], list[Optimizer]]
    """The optimizers whose steps make a step of the model's."""
    period: int = 1
    """Steps after which its cost repeats."""
    together: bool = False
    """Whether all refreshes of a period are on one step, whose number is a multiple of it."""
    sharded: bool = True
    """Whether it works on FSDP2 parameters; otherwise every rank does all of the work."""
    preconditioner: str | None = None
    """Which of ours has the same products, if any, ..."""
    cap: int = 0
    """... the largest side of a block, ..."""
    exclude: tuple[str, ...] = ()
    """... and the matrices that are left out."""


_LIKE_PEERS: dict[str, Any] = {
    "preconditioner": "shampoo",
    "exclude": [],
    "max_preconditioner_dim": 256,
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
        together=config.refresh_schedule == "together",
        preconditioner=config.preconditioner,
        cap=config.max_preconditioner_dim,
        exclude=tuple(config.excluded_names),
    )


# Settings that this version does not have are left out, with their rows.
_VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("256, every 10", {}),
    ("1024, every 10", {"max_preconditioner_dim": 1024}),
    ("256, every step", {"precondition_frequency": 1}),
    ("256, every 10, together", {"refresh_schedule": "together"}),
    ("256, every 10, one bucket", {"buckets": 1}),
    ("256, every 10, compiled", {"compile": True}),
    ("SOAP, 256, every 10", {"preconditioner": "soap"}),
    ("KL-Shampoo, 256, every 10", {"preconditioner": "kl_shampoo"}),
    (
        "256, every 10, low memory",
        {
            "symmetric_packing": True,
            "momentum_dtype": "bfloat16",
            "root_dtype": "bfloat16",
            "factor_dtype": "bfloat16",
        },
    ),
]


def our_rows() -> list[Row]:
    """Shampoo as it is by default, and with every matrix preconditioned in several ways."""
    known = {field.name for field in dataclasses.fields(ShampooConfig)}
    default = ShampooConfig()
    rows = [
        shampoo_row(
            "Shampoo, default settings", **{name: getattr(default, name) for name in _LIKE_PEERS}
        )
    ]
    return rows + [
        shampoo_row(f"Shampoo {name}", **settings)
        for name, settings in _VARIANTS
        if settings.keys() <= known
    ]


def matrices_and_vectors(
    model: nn.Module, exclude: Sequence[str] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """For optimizers that take matrices alone; matrices whose names the patterns find are among the
    others."""
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, p in model.named_parameters():
        other = p.ndim != 2 or any(re.search(pattern, name) for pattern in exclude)
        found[other].append(p)
    return found


def torch_rows(exclude: Sequence[str] = ()) -> list[Row]:
    """torch.optim's; Muon leaves vectors to AdamW, and matrices whose names these patterns find."""
    return [
        Row("AdamW, fused", lambda m: [_adamw(list(m.parameters()))]),
        Row("AdamW, foreach", lambda m: [_adamw(list(m.parameters()), foreach=True)]),
        Row("torch.optim.Muon", partial(_muon, exclude=exclude)),
    ]


def _adamw(parameters: list[nn.Parameter], *, foreach: bool = False) -> Optimizer:
    return torch.optim.AdamW(parameters, foreach=foreach, fused=not foreach, **HYPERPARAMETERS)


def _muon(model: nn.Module, exclude: Sequence[str]) -> list[Optimizer]:
    matrices, others = matrices_and_vectors(model, exclude)
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=WEIGHT_DECAY)
    return [muon, _adamw(others)]
