"""What an inverse root costs beside a matrix product, which the planner's cost model is fitted to.

    python -m benchmarks.root_cost

Prints for each size n the time of an inverse root of an n x n factor, as the number of FLOPs times
n^3 that a matrix product of that size makes meanwhile, and the planner's model of it.
"""

import statistics
import time
from collections.abc import Callable

import torch

from shampoo_fsdp.cost import block_flops
from shampoo_fsdp.roots import inverse_root_eigh


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    print("| n | measured, n^3 FLOPs | model, n^3 FLOPs |")
    print("|---|---|---|")
    for n in (64, 128, 256, 512, 1024):
        factors = torch.randn(1, n, n)
        factors = factors @ factors.mT
        product = seconds(lambda f=factors: torch.bmm(f, f), 20)
        root = seconds(lambda f=factors: inverse_root_eigh(f, -0.25, 1e-12), 7)
        model = block_flops((n,))[1] / n**3
        print(f"| {n} | {2.0 * root / product:.0f} | {model:.0f} |")


if __name__ == "__main__":
    main()
