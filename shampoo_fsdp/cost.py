"""What a block costs its owner, and a plan a step: FLOPs, memory and modelled time."""

import math
from collections.abc import Sequence

import torch

from shampoo_fsdp.config import ShampooConfig

__all__ = ["block_flops", "modelled_seconds", "state_elements"]

# One n x n symmetric eigendecomposition with its inverse root takes as long as a matrix product
# of this many FLOPs times n^3 (fp32, LAPACK syevd against GEMM, n = 128 to 1024).
_ROOT_FLOPS = 50.0


def block_flops(shape: tuple[int, ...]) -> tuple[float, float]:
    """FLOPs of a block on every step (factors and preconditioning), and of its refresh."""
    return 4.0 * math.prod(shape) * sum(shape), _ROOT_FLOPS * sum(n**3 for n in shape)


def state_elements(shape: tuple[int, ...]) -> int:
    """Numbers kept for a block: momentum, graft statistics, factors and inverse roots."""
    return 2 * math.prod(shape) + 2 * sum(n * n for n in shape)


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
