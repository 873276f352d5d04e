"""Matrices whose inverse roots the tests take, and one that is trained."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shampoo_fsdp import Shampoo


def random_basis(n: int, blocks: int = 3, seed: int = 0) -> Tensor:
    """Orthonormal columns in fp64, [blocks, n, n]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(blocks, n, n, generator=generator, dtype=torch.float64)).Q


def from_basis(eigenvalues: Tensor, vectors: Tensor) -> Tensor:
    """In fp64, the matrices that have these."""
    return (vectors * eigenvalues.double()) @ vectors.mT


def with_spectrum(eigenvalues: Tensor, blocks: int = 3, seed: int = 0) -> Tensor:
    """[blocks, n, n] in fp64 with the given eigenvalues."""
    return from_basis(eigenvalues, random_basis(len(eigenvalues), blocks, seed))


def long_average(blocks: int, n: int, *, rank: int, steps: int, decay: float) -> Tensor:
    """[blocks, n, n] in fp32, an average of gradients that all lack the same directions."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.zeros(blocks, n, n)
    directions = torch.randn(blocks, n, rank, generator=generator)
    for _ in range(steps):
        gradients = directions @ torch.randn(blocks, rank, 2 * rank, generator=generator)
        factors.mul_(decay).baddbmm_(gradients, gradients.mT, alpha=1.0 - decay)
    return factors


def trained(
    steps: Iterable[int],
    state: dict[str, object] | None = None,
    name: str = "w",
    **settings: object,
) -> tuple[Tensor, Shampoo]:
    """[24, 16], from zeros, on the gradients of these steps; and its optimizer."""
    weight = nn.Parameter(torch.zeros(24, 16))
    common = {"lr": 1e-2, "lr_factor": 1.0, "precondition_frequency": 2}
    optimizer = Shampoo([(name, weight)], **common, **settings)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        mixing = torch.linspace(0.1, 1.0, 16)
        weight.grad = torch.randn(24, 16, generator=generator) * mixing
        optimizer.step()
    return weight.detach(), optimizer
