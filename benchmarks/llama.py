"""A Llama's parameters without its forward pass, sharded by FSDP2, and gradients for them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded
from shampoo_fsdp.plan.totals import Totals
from shampoo_fsdp.rules.layout import block_costs
from shampoo_fsdp.runtime.choice import is_preconditioned
from tests.models import deterministic_gradients, set_gradients


@dataclass(frozen=True)
class Sizes:
    """Of the model; the default has 4.26 M parameters."""

    dim: int = 256
    layers: int = 4
    ffn: int = 704
    vocab: int = 2048


MEASURED = Sizes(dim=1536, layers=20, ffn=4096, vocab=32000)
"""665 million parameters, of which benchmarks/results/h100.json is."""


def add_size_arguments(parser: argparse.ArgumentParser, default: Sizes) -> None:
    """Options for the model."""
    for name, value in vars(default).items():
        parser.add_argument(f"--{name}", type=int, default=value)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The model that the options describe."""
    return Sizes(**{name: getattr(options, name) for name in vars(Sizes())})


class _Layer(nn.Module):
    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        for name in ("wq", "wk", "wv", "wo"):
            self.add_module(name, nn.Linear(dim, dim, bias=False))
        self.w1, self.w3 = (nn.Linear(dim, ffn, bias=False) for _ in range(2))
        self.w2 = nn.Linear(ffn, dim, bias=False)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)


class _Llama(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(sizes.vocab, sizes.dim)
        self.layers = nn.ModuleList([_Layer(sizes.dim, sizes.ffn) for _ in range(sizes.layers)])
        self.norm = nn.RMSNorm(sizes.dim)
        self.output = nn.Linear(sizes.dim, sizes.vocab, bias=False)


def build(sizes: Sizes, device: str = "cpu") -> nn.Module:
    """The model under FSDP2 over all ranks, the same on every call."""
    torch.manual_seed(0)
    with torch.device(device):
        model = _Llama(sizes)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gradient_sets(model: nn.Module, sets: int = 4) -> list[dict[str, Tensor]]:
    """Gradients of the form of the model's parameters, for optimizers to take in turns."""
    found = []
    for step in range(sets):
        set_gradients(model, deterministic_gradients(model, step))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def specs(sizes: Sizes, ranks: int = 1) -> list[ParameterSpec]:
    """The model's parameters under FSDP2."""
    with torch.device("meta"):
        model = _Llama(sizes)
    return [
        ParameterSpec(name, tuple(p.shape), tuple(range(ranks)), (ranks,), (Sharded(0),))
        for name, p in model.named_parameters()
    ]


def least_bytes(sizes: Sizes, exclude: Sequence[str], cap: int, ranks: int) -> float:
    """What a rank has to send per step, on average, if each block is owned by the rank whose shard
    has most of it: the rest travels there as a gradient and back as an update, in fp32.

    Args:
        exclude: regular expressions; matrices whose names match have no blocks.
        cap: the largest side of a block.
    """
    config = ShampooConfig(max_preconditioner_dim=cap, exclude=list(exclude))
    chosen = [s for s in specs(sizes, ranks) if is_preconditioned(s.name, s.shape, config)]
    return 4 * Totals(Assignment(chosen, config, block_costs(config), 0)).least_sent / ranks
