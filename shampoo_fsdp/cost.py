"""What a block costs its owner, and a plan a step: FLOPs and modelled time."""

import math
from collections.abc import Sequence

import torch

from shampoo_fsdp.blocks import factor_kinds
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.preconditioners import PRECONDITIONERS

__all__ = ["block_flops", "modelled_seconds"]

# A root or eigenbasis of an n x n factor takes as long as a matrix product of this many FLOPs times
# n^3 and n^2: fitted to n = 64 to 1024 on a CPU (python -m benchmarks.roots).
_REFRESH_FLOPS = {
    "eigh": (10.0, 1900.0),
    "eigh_pseudo_inverse": (10.0, 1900.0),
    "coupled_newton": (84.0, 730.0),
    "newton_db": (110.0, 560.0),
    "qr": (15.0, 1400.0),
}


def block_flops(shape: tuple[int, ...], config: ShampooConfig) -> tuple[float, float]:
    """FLOPs of a block on every step (factors and preconditioning), and of its refresh: as many as
    a matrix product makes in the time."""
    full = [n for n, kind in zip(shape, factor_kinds(shape, config), strict=True) if kind == "full"]
    rule = PRECONDITIONERS[config.preconditioner]
    cubed, squared = _REFRESH_FLOPS[config.basis_method]
    refresh = rule.refresh_cost * sum(cubed * n**3 + squared * n**2 for n in full)
    # Elementwise work counts as one more row of a product.
    return 2.0 * rule.products * math.prod(shape) * (sum(full) + 1), refresh


def modelled_seconds(
    phase_load: Sequence[Sequence[float]],
    sent: Sequence[int],
    across: Sequence[int],
    config: ShampooConfig,
) -> float:
    """Time of a step, on average over a period, if all ranks wait for the slowest.

    Args:
        phase_load: FLOPs of each rank on a step of each phase.
        sent: elements that each rank sends per step.
        across: of these the ones that go to another node.
    """
    flops = [max(loads) for loads in zip(*phase_load, strict=True)]
    width = getattr(torch, config.communication_dtype).itemsize
    sending = max(
        (everywhere - far) * width / (config.intra_node_bandwidth * 1e9)
        + far * width / (config.inter_node_bandwidth * 1e9)
        for everywhere, far in zip(sent, across, strict=True)
    )
    return float(sum(flops) / len(flops) / (config.device_tflops * 1e12) + sending)
