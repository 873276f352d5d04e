"""Rows for optimizers that others publish, where they are installed.

    git clone https://github.com/facebookresearch/optimizers
    PYTHONPATH=optimizers python -m benchmarks.step_time

Where the same setting exists it has the same value as in ours. Vectors, which ours leaves to AdamW
as well, are AdamW's.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from benchmarks.rows import BETAS, EPS, HYPERPARAMETERS, LR, WEIGHT_DECAY, Row, matrices_and_vectors

__all__ = ["peer_rows"]


def peer_rows() -> tuple[list[Row], list[str]]:
    """The rows of the peers that can be imported, and a line for each that cannot."""
    rows: list[Row] = []
    missing = []
    for module, install, make in _PEERS:
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(f"No rows for {module} ({error}); to get them: {install}")
            continue
        rows += make()
    return rows, missing


def _with_adamw_for_vectors(
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
) -> Callable[[nn.Module], list[Optimizer]]:
    def build(model: nn.Module) -> list[Optimizer]:
        matrices, vectors = matrices_and_vectors(model)
        return [optimizer(matrices), torch.optim.AdamW(vectors, fused=True, **HYPERPARAMETERS)]

    return build


# ----------------------------------------------------------------- Meta's, in its lossless mode


def _meta_rows() -> list[Row]:
    logging.getLogger("distributed_shampoo").setLevel(logging.ERROR)
    _let_meta_use_gloo()
    return [
        _meta_row("Meta 256, every 10", 256, 10),
        _meta_row("Meta 1024, every 10", 1024, 10),
        _meta_row("Meta 256, every step", 256, 1),
        _meta_row("Meta SOAP, 256, every 10", 256, 10, "DefaultSOAPConfig"),
    ]


def _meta_row(name: str, cap: int, frequency: int, method: str = "DefaultShampooConfig") -> Row:
    meta = importlib.import_module("distributed_shampoo")

    def build(matrices: list[nn.Parameter]) -> Optimizer:
        optimizer: Optimizer = meta.DistributedShampoo(
            matrices,
            lr=LR,
            betas=BETAS,
            # Its SOAP uses this one as Adam's; its Shampoo as the ridge.
            epsilon=EPS if "SOAP" in method else 1e-12,
            weight_decay=WEIGHT_DECAY,
            weight_decay_type=meta.WeightDecayType.DECOUPLED,
            max_preconditioner_dim=cap,
            precondition_frequency=frequency,
            grafting_config=None
            if "SOAP" in method
            else meta.AdamPreconditionerConfig(beta2=BETAS[1], epsilon=EPS),
            preconditioner_config=getattr(meta, method),
            distributed_config=meta.FullyShardDistributedConfig(
                target_parameter_dimensionality=2,
                param_assignment_strategy=meta.FSDPParamAssignmentStrategy.ROUND_ROBIN,
            ),
        )
        return optimizer

    return Row(
        name,
        _with_adamw_for_vectors(build),
        period=frequency,
        together=frequency > 1,
        preconditioner="soap" if "SOAP" in method else "shampoo",
        cap=cap,
    )


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


_PEERS: list[tuple[str, str, Callable[[], list[Row]]]] = [
    (
        "distributed_shampoo",
        "git clone https://github.com/facebookresearch/optimizers; PYTHONPATH=optimizers",
        _meta_rows,
    ),
]
