"""What the study's jobs need beside `shampoo_torchtitan`: model sizes, Muon, simulated shards.

A job file names this module as `experimental.custom_import` and as `job.custom_config_module`; it
then runs under the study, or by itself:

    torchrun --nproc_per_node 2 -m shampoo_torchtitan.train --job.config_file JOB.toml
"""

import shampoo_torchtitan.train  # noqa: F401  first: it makes TorchTitan run without a GPU

# isort: split

from dataclasses import dataclass, field
from typing import Any

import torch
import torchtitan.models.llama3 as llama3
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from shampoo_fsdp import ShampooConfig
from shampoo_torchtitan.demo import VOCABULARY
from studies.pretrain import data
from studies.pretrain.contestants import (
    Muon,
    MuonContainer,
    Peer,
    PeerContainer,
    ShardedShampooContainer,
)


@dataclass
class Optimizer:
    """What is added to TorchTitan's `[optimizer]`."""

    shampoo: ShampooConfig = field(default_factory=ShampooConfig)
    muon: Muon = field(default_factory=Muon)
    peer: Peer = field(default_factory=Peer)
    simulated_shards: int = 1
    """For Shampoo in one process: every parameter is cut into this many pieces along its first
    dimension, and no block crosses a cut, as with block_alignment = "shard" on as many ranks."""


@dataclass
class JobConfig:
    """What is added to TorchTitan's JobConfig."""

    optimizer: Optimizer = field(default_factory=Optimizer)


def register() -> None:
    """Adds `study_1M`, ..., `study_w64`, ... to `llama3`, and the study's optimizers."""
    sizes = {"0.3M": (64, 5), "1M": (128, 5), "3M": (192, 6), "10M": (256, 13)}
    # Of fixed depth and size of heads, as widths are compared.
    sizes |= {f"w{dim}": (dim, 2) for dim in (64, 128, 256, 512)}
    common = {"vocab_size": VOCABULARY, "multiple_of": 32, "rope_theta": 10000}
    for name, (dim, layers) in sizes.items():
        model = llama3.TransformerModelArgs(dim=dim, n_layers=layers, n_heads=dim // 32, **common)
        llama3.llama3_args.setdefault(f"study_{name}", model)
    data.register()
    _attention_in_fp32_on_cpu()
    build = llama3.build_optimizers
    if build is _build_optimizers:
        return
    _others.append(build)
    llama3.build_optimizers = _build_optimizers


_others: list[Any] = []


def _build_optimizers(
    model_parts: list[Any], config: Any, parallel_dims: Any, ft_manager: Any = None
) -> Any:
    if config.name.lower() == "muon":
        return MuonContainer(model_parts, config)
    if config.name.lower() == "peer":
        return PeerContainer(model_parts, config)
    if config.name.lower() == "shampoo" and config.simulated_shards > 1:
        return ShardedShampooContainer(model_parts, config)
    return _others[0](model_parts, config, parallel_dims, ft_manager)


def _attention_in_fp32_on_cpu() -> None:
    """Its backward pass takes three times as long in bf16 there, where all else is faster in it."""
    forward = ScaledDotProductAttentionWrapper.forward
    if forward.__name__ == "_attend":
        return

    def _attend(self: Any, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        if q.device.type != "cpu":
            return forward(self, q, k, v, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return forward(self, q.float(), k.float(), v.float(), **kwargs)

    ScaledDotProductAttentionWrapper.forward = _attend


register()
