"""Inverse roots: the cost and the error of each method.

    python -m benchmarks.roots --sizes 256    # default: all sizes

Errors are those of the method: against an fp64 root of the same fp32 matrix, with the method's own
floor or ridge. "effect" is the error of X g for g = A^(1/2) u, u random, which is distributed as
the gradients that make up A. All methods take turns in one run; times are medians, on the CPU.

What it says: on CPUs "eigh" is the one to take. Matrix products alone take more FLOPs and more
time, the more the larger n. "coupled_newton" is the more exact, 10 times and more from condition
1e4 on, but eigh's error is small beside what 10 steps change, and so is that of "polynomial", which
is asked for no more. A QR step from the last basis takes as long as eigh (0.8 to 1.6 times).

On CUDA, which `python -m benchmarks.gpu` measures, torch.linalg.eigh makes the host wait
(pytorch/pytorch#175585).
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import console, parser_of, table
from shampoo_fsdp.rules.eigenbasis import eigenbasis, warm_eigenbasis
from shampoo_fsdp.rules.roots import ROOT_METHODS, inverse_root, root_from_basis

EPS = 1e-12
RESOLUTION = torch.finfo(torch.float32).eps
EXPONENTS = (-0.25, -0.5)
ELEMENTS = 2**20  # of a stack
ROUNDS, FEWEST_ROUNDS, SECONDS = 9, 2, 3.0  # of timing, per size and exponent

SPECTRA = {"condition 1e4": 4, "condition 1e12": 12}
"""Eigenvalues from 1 to 10^-x, evenly in their logarithms."""

Rows = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("benchmarks.roots", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cost = [
        row
        for n, exponent in product(options.sizes, EXPONENTS)
        for row in measure_cost(n, max(1, ELEMENTS // n**2), exponent)
    ]
    figures = {
        "cost": cost,
        "cost_model": cost_model(cost),
        "error": [
            row for n, name in product(options.sizes, SPECTRA) for row in measure_errors(n, name)
        ],
    }
    for title, rows in figures.items():
        console().print(table(title.replace("_", " "), rows))


def measure_cost(n: int, blocks: int, exponent: float, device: str = "cpu") -> Rows:
    """Time and FLOPs of each method for a stack of n x n matrices."""
    sources = (torch.randn(blocks, n, n) * torch.logspace(0, -3, n)).to(device)
    matrices = sources @ sources.mT
    _, basis = eigenbasis(matrices + 1e-3 * torch.eye(n, device=device))

    def calls(stack: Tensor, q: Tensor) -> dict[str, Callable[[], Tensor]]:
        def warm() -> Tensor:
            return root_from_basis(*warm_eigenbasis(stack, q), exponent, EPS)[0]

        return {m: partial(inverse_root, stack, exponent, EPS, m) for m in ROOT_METHODS} | {
            "qr (warm start)": warm,
            "one product": lambda: stack @ stack,
        }

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = in_turns(calls(matrices, basis), wait)
    eight = torch.eye(8).unsqueeze(0)  # FLOPs grow with n^3
    flops = {name: count_flops(call) / 8**3 for name, call in calls(eight, eight).items()}
    return [
        {
            "n": n,
            "blocks": blocks,
            "exponent": exponent,
            "method": name,
            "ms": 1e3 * seconds[name],
            "time / eigh": seconds[name] / seconds["eigh"],
            "FLOPs / eigh": flops[name] / flops["eigh"],
            "time as n^3 FLOPs of a product": 2.0 * seconds[name] / seconds["one product"],
        }
        for name in flops
        if name != "one product"
    ]


def in_turns(
    calls: Mapping[str, Callable[[], object]], wait: Callable[[], object]
) -> dict[str, float]:
    """Median seconds of each call; `wait` waits for its end."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            wait()
            before = time.perf_counter()
            call()
            wait()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - before)
        if turn >= FEWEST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
    return {name: statistics.median(each) for name, each in times.items()}


def count_flops(call: Callable[[], object]) -> int:
    """Matrix products as they are, decompositions by the usual counts (Golub & Van Loan, sections
    5.2.9 and 8.3.4): 9 n^3 for eigh, 8/3 n^3 for qr with Q."""
    mapping = {
        torch.ops.aten._linalg_eigh: lambda shape, *_, **__: 9 * math.prod(shape) * shape[-1],
        torch.ops.aten.linalg_qr: lambda shape, *_, **__: 8 * math.prod(shape) * shape[-1] // 3,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def cost_model(cost: Rows) -> Rows:
    """Time as FLOPs of a product, a n^3 + b n^2 with a, b >= 0: the least relative errors."""
    rows: Rows = []
    for exponent, method in dict.fromkeys((row["exponent"], row["method"]) for row in cost):
        mine = [row for row in cost if (row["exponent"], row["method"]) == (exponent, method)]
        times = torch.tensor([[row["time as n^3 FLOPs of a product"]] for row in mine]).double()
        design = torch.tensor([[1.0, 1.0 / row["n"]] for row in mine]).double() / times
        fits = []
        for used in ([0, 1], [0], [1]):
            model = torch.zeros(2, 1).double()
            model[used] = torch.linalg.lstsq(design[:, used], torch.ones_like(times)).solution
            if model.min() >= 0.0:
                error = (design @ model - 1.0).square().mean().sqrt().item()
                fits.append((error, *model.flatten().tolist()))
        values = dict(zip(("relative error", "n^3 FLOPs", "n^2 FLOPs"), min(fits), strict=True))
        rows.append({"exponent": exponent, "method": method} | values)
    return rows


def measure_errors(n: int, spectrum: str, device: str = "cpu") -> Rows:
    """Errors of each method for one n x n matrix."""
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64).to(device)).Q
    values = torch.logspace(0, -SPECTRA[spectrum], n, dtype=torch.float64).to(device)
    matrix = ((turn * values) @ turn.mT).float()
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    # All in the basis of A, where A is diagonal.
    white = torch.randn(n, 16).double().to(device)
    gradients = eigenvalues.clamp_min(0.0).sqrt().unsqueeze(1) * white
    rows = []
    for exponent, method in product(EXPONENTS, ROOT_METHODS):
        treated, kept = own_eigenvalues(eigenvalues, method)
        exact = torch.diag(treated**exponent * kept)
        root = inverse_root(matrix.unsqueeze(0), exponent, EPS, method)[0][0].double()
        root = vectors.mT @ root @ vectors
        effect = ((root - exact) @ gradients).norm() / (exact @ gradients).norm()
        what = {"n": n, "spectrum": spectrum, "exponent": exponent, "method": method}
        rows.append(what | {"effect": effect.item()})
    return rows


# What methods by products make of small eigenvalues, in resolutions of the norm, about.
_FLOORS = {"coupled_newton": 3.0, "polynomial": 16.0}


def own_eigenvalues(eigenvalues: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Those whose inverse root a method takes, with its floor or ridge; 0 for those it leaves out,
    and 1 for the others."""
    kept = torch.ones_like(eigenvalues)
    if method in _FLOORS:
        least = _FLOORS[method] * RESOLUTION * eigenvalues.norm().item()
        return eigenvalues.clamp_min(least) + EPS, kept
    if method == "eigh_pseudo_inverse":
        kept = (eigenvalues > len(eigenvalues) * RESOLUTION * eigenvalues.max()).double()
    return eigenvalues.clamp_min(RESOLUTION * eigenvalues.max().item()) + EPS, kept


if __name__ == "__main__":
    main()
