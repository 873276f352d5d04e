"""What a block costs its owner, and a plan a step: FLOPs, memory and modelled time."""

import math
from collections.abc import Sequence

import torch

from shampoo_fsdp.config import ShampooConfig

__all__ = ["block_flops", "modelled_seconds", "state_elements"]

# An inverse root of an n x n factor takes as long as a matrix product of this many FLOPs times n^3
# and n^2: fitted to n = 64 to 1024 on a CPU (python -m benchmarks.root_cost).
_ROOT_FLOPS_CUBED, _ROOT_FLOPS_SQUARED = 11.0, 5500.0


def block_flops(shape: tuple[int, ...]) -> tuple[float, float]:
    """FLOPs of a block on every step (factors and preconditioning), and of its refresh: as many as
    a matrix product makes in the time."""
    refresh = sum(_ROOT_FLOPS_CUBED * n**3 + _ROOT_FLOPS_SQUARED * n**2 for n in shape)
    return 4.0 * math.prod(shape) * sum(shape), refresh


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
