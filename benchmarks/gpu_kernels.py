"""Each kernel of our own beside its plain PyTorch, and products of matrices by their types."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.roots import in_turns
from shampoo_fsdp.kernels.adamw import adamw_masked
from shampoo_fsdp.kernels.gram import update_factors
from shampoo_fsdp.kernels.language import kernels, observed_by
from shampoo_fsdp.kernels.momenta import momenta
from shampoo_fsdp.kernels.product import Sum, product
from shampoo_fsdp.kernels.refresh import keep, parts, two_sums
from shampoo_fsdp.rules.precision import full_precision, products_in
from tests.reference import kernels as references

_ELEMENTS = 2**26  # of a stack: 256 MiB in fp32, more than a cache has

_Call = Callable[[], object]


def measure_kernels(n: int, device: str) -> list[dict[str, Any]]:
    """Milliseconds of a stack of [n, n] blocks, with bandwidth and TFLOP/s by each kernel's own
    count, and how much longer plain PyTorch takes. On CPUs both are plain."""
    rows = []
    for name, call in _calls(n, device).items():
        costs = [(0, 0)]
        if device == "cuda":
            with observed_by(lambda *cost, of=costs: of.append(cost)):
                call()
        plain = partial(_plain, call)
        times = in_turns(
            {"ours": call if device == "cuda" else plain, "plain": plain}, _wait(device)
        )
        seconds = times["ours"]
        rows.append(
            {
                "kernel": f"{name}, [{n}, {n}]",
                "ms": 1e3 * seconds,
                "gb_per_s": sum(moved for moved, _ in costs) / seconds / 1e9,
                "tflops": sum(flops for _, flops in costs) / seconds / 1e12,
                "plain": times["plain"] / seconds,
            }
        )
    return rows


def measure_products(n: int, device: str) -> list[dict[str, Any]]:
    """Products of stacks of [n, n] matrices in fp32, TF32 and with 16-bit inputs."""
    a = torch.randn(_blocks(n, device), n, n, device=device) / n**0.5
    sums = {"out_dtype": torch.float32} if device == "cuda" else {}

    def multiply(matrices: Tensor, precision: str = "highest", **into: Any) -> None:
        with full_precision(device), products_in(precision):
            torch.bmm(matrices, matrices, **into)

    calls: dict[str, _Call] = {
        "fp32": partial(multiply, a),
        "TF32": partial(multiply, a, "high"),
        "bf16, sums in fp32": partial(multiply, a.bfloat16(), **sums),
        "fp16, sums in fp32": partial(multiply, a.half(), **sums),
    }
    return [
        {
            "kernel": f"bmm in {name}, [{n}, {n}]",
            "ms": 1e3 * seconds,
            "tflops": 2.0 * a.numel() * n / seconds / 1e12,
        }
        for name, seconds in in_turns(calls, _wait(device)).items()
    ]


def _calls(n: int, device: str) -> dict[str, partial[Any]]:
    """By kernel a call as the optimizer makes it, with 16-bit operands and state in fp32."""
    shape = _blocks(n, device), n, n
    blocks = shape[0]
    g, m, v = (torch.randn(shape, device=device).square_() for _ in range(3))
    mixed = torch.empty_like(g, dtype=torch.bfloat16)
    ones = torch.ones(blocks, device=device)
    halves = (g / n).half()
    bad = torch.zeros(blocks, dtype=torch.bool, device=device)
    changes = torch.empty(blocks, parts(n), 2, device=device)
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    step = {"step_size": 1e-3, "lost": 1e-4, "rate1": 0.1, "rate2": 0.05, "eps": 1e-8, "root": 1.0}
    polynomial = Sum(torch.float16, alpha=0.5, beta=1.0, gamma=0.1)
    return {
        "momenta": partial(momenta, g, ones, m, v, mixed, 0.1, 0.05, 0.9, 1e-8),
        "gram": partial(update_factors, v, mixed, ones * 0.05, 1.0 / n),
        "product, split fp32": partial(product, g, g, Sum(), symmetric=True, squares=True),
        "product, fp16": partial(product, halves, halves, polynomial, c=halves, symmetric=True),
        "two_sums": partial(two_sums, v, m, ones, ones, (0.5, 0.5, 0.1, 0.2, 0.3)),
        "keep": partial(keep, g, mixed, bad, changes),
        "adamw": partial(adamw_masked, m, g, m, v, skipped, 1e30, **step),
    }


def _plain(call: partial[Any]) -> None:
    """The same in plain PyTorch."""
    if reference := getattr(references, f"{call.func.__name__}_reference", None):
        reference(*call.args, **call.keywords)
    else:
        with kernels("off"):
            call()


def _blocks(n: int, device: str) -> int:
    return max(1, _ELEMENTS // n**2) if device == "cuda" else 2


def _wait(device: str) -> _Call:
    return torch.cuda.synchronize if device == "cuda" else lambda: None
