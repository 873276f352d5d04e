"""A Llama's parameters without its forward pass, sharded by FSDP2, and gradients for them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp.config import RULES
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded
from tests.models import deterministic_gradients, set_gradients

__all__ = [
    "Sizes",
    "block_flops",
    "build",
    "gradient_sets",
    "least_bytes",
    "matrix_shapes",
    "specs",
]


@dataclass(frozen=True)
class Sizes:
    """Of the model; the default has 4.26 M parameters."""

    dim: int = 256
    layers: int = 4
    ffn: int = 704
    vocab: int = 2048


class _Layer(nn.Module):
    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        for name in ("wq", "wk", "wv", "wo"):
            self.add_module(name, nn.Linear(dim, dim, bias=False))
        self.w1 = nn.Linear(dim, ffn, bias=False)
        self.w2 = nn.Linear(ffn, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn, bias=False)
        self.attention_norm = nn.RMSNorm(dim)
        self.ffn_norm = nn.RMSNorm(dim)


class _Llama(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(sizes.vocab, sizes.dim)
        self.layers = nn.ModuleList([_Layer(sizes.dim, sizes.ffn) for _ in range(sizes.layers)])
        self.norm = nn.RMSNorm(sizes.dim)
        self.output = nn.Linear(sizes.dim, sizes.vocab, bias=False)


def build(sizes: Sizes, *, sharded: bool = True, device: str = "cpu") -> nn.Module:
    """The model, the same on every call; FSDP2 over all ranks, or a whole copy on each."""
    torch.manual_seed(0)
    with torch.device(device):
        model = _Llama(sizes)
    if sharded:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def gradient_sets(model: nn.Module, sets: int = 4) -> list[dict[str, Tensor]]:
    """Gradients of the form of the model's parameters (their shards, if they are sharded), for
    optimizers to take in turns."""
    found = []
    for step in range(sets):
        set_gradients(model, deterministic_gradients(model, step))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def matrix_shapes(sizes: Sizes, exclude: Sequence[str] = ()) -> list[tuple[int, int]]:
    """Shapes of the model's matrices whose names match none of the regular expressions."""
    with torch.device("meta"):
        model = _Llama(sizes)
    return [
        (p.shape[0], p.shape[1])
        for name, p in model.named_parameters()
        if p.ndim == 2 and not any(re.search(pattern, name) for pattern in exclude)
    ]


def specs(sizes: Sizes) -> list[ParameterSpec]:
    """The model's parameters under FSDP2 on one rank."""
    with torch.device("meta"):
        model = _Llama(sizes)
    return [
        ParameterSpec(name, tuple(p.shape), (0,), (1,), (Sharded(0),))
        for name, p in model.named_parameters()
    ]


def block_flops(shapes: Sequence[tuple[int, int]], cap: int, preconditioner: str) -> float:
    """What a step multiplies, without roots: for a block of m x n a product of 2 m n m and one of
    2 m n n FLOPs for the factors, for the direction, and for what else the preconditioner does."""
    products = RULES[preconditioner].products
    total = 0.0
    for rows, columns in shapes:
        tall, wide = math.ceil(rows / cap), math.ceil(columns / cap)
        total += 2.0 * products * rows * columns * (rows / tall + columns / wide)
    return total


def least_bytes(shapes: Sequence[tuple[int, int]], cap: int, ranks: int) -> float:
    """What a rank has to send per step, on average, if each block is owned by the rank whose shard
    has most of it: the rest travels there as a gradient and back as an update, in fp32."""
    elements = 0
    for rows, columns in shapes:
        shard = math.ceil(rows / ranks)  # as FSDP2 cuts
        tiles = math.ceil(rows / cap)
        for tile in range(tiles):
            start, stop = tile * rows // tiles, (tile + 1) * rows // tiles
            held = [
                max(0, min(stop, (rank + 1) * shard) - max(start, rank * shard))
                for rank in range(ranks)
            ]
            elements += (stop - start - max(held)) * columns
    return 2 * 4 * elements / ranks
