"""The matrix products of a step beside those of forward and backward, on GPUs, by a model.

    python -m benchmarks.gemm_share
    python -m benchmarks.gemm_share --model llama3-70b --ranks 256 --tokens 4096

Nothing is measured but FLOPs and bytes: the code of the step runs on tensors without memory, on a
GPU that is not there. Products are counted by their precision, and what all other operators of the
blocks' step read and write. Rates are assumptions, see the options. Communication, launches and the
excluded parameters are left out.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.pretended_gpu import CUDA, Work, pretended_gpu
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import GroupSettings
from shampoo_fsdp.plan.grid import make_grid
from shampoo_fsdp.rules.clock import Clock
from shampoo_fsdp.rules.device import on_device
from shampoo_fsdp.rules.stack import BlockStack

__all__ = ["main", "shares", "work_of_block"]

# dim, hidden, dim of keys and values, layers, vocabulary
MODELS = {
    "llama3-8b": (4096, 14336, 1024, 32, 128256),
    "llama3-70b": (8192, 28672, 1024, 80, 128256),
    "llama3-405b": (16384, 53248, 1024, 126, 128256),
}
_LAST_OF_EARLY_PHASE = 100


def work_of_block(shape: Sequence[int], config: ShampooConfig) -> tuple[Counter[str], Counter[str]]:
    """Of a step without a refresh and of a refresh, by precision, from the code of the step."""
    counts = {}
    group = GroupSettings.of(
        {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}, config
    )
    with pretended_gpu():
        stack = BlockStack(shape, [0], config, torch.empty(1, *shape, device=CUDA))
        # The refresh period's phase is 0: a step of its multiple refreshes.
        step = 1000 * config.precondition_frequency
        clock = Clock([step], [step], [True], [True], [False])
        with Work() as work:
            for part in stack.step(clock, group):
                counts[part] = work.counts.copy()
                work.counts.clear()
    return counts["factors"] + counts["direction"], counts["roots"]


def shares(model: str, ranks: int, tokens: int, options: Any, config: ShampooConfig) -> Any:
    """Figures of one row: milliseconds per rank and step, and their share of a training step."""
    dim, hidden, kv, layers, vocabulary = MODELS[model]
    matrices = [(dim, dim)] * 2 + [(kv, dim)] * 2 + [(hidden, dim)] * 2 + [(dim, hidden)]
    blocks: Counter[tuple[int, ...]] = Counter()
    for matrix in matrices:
        grid = make_grid(matrix, config)
        for block in grid.coordinates():
            blocks[tuple(grid.block_shape(block))] += layers
    every: Counter[str] = Counter()
    refresh: Counter[str] = Counter()
    for shape, number in blocks.items():
        of_step, of_refresh = work_of_block(shape, config)
        for total, one in ((every, of_step), (refresh, of_refresh)):
            for kind, flops in one.items():
                total[kind] += flops * number
    rates = {"bf16": options.bf16, "tf32": options.tf32, "fp32": options.fp32}

    def milliseconds(flops: Counter[str]) -> float:
        return sum(flops[kind] / (rate * 1e9) for kind, rate in rates.items()) / ranks

    def traffic(work: Counter[str]) -> float:
        return work["bytes"] / (options.bandwidth * 1e9) / ranks

    parameters = layers * sum(m * n for m, n in matrices) + 2 * vocabulary * dim
    training = 6 * parameters * tokens / (options.training * 1e9)
    muon = sum(5 * layers * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in matrices)
    early = sum(1.0 / config.refresh_period(t) for t in range(2, _LAST_OF_EARLY_PHASE + 1))
    step = milliseconds(every) + milliseconds(refresh) / config.precondition_frequency
    first = milliseconds(every) + milliseconds(refresh) * early / _LAST_OF_EARLY_PHASE
    return {
        "model": model,
        "ranks": ranks,
        "tokens per rank": tokens,
        "training step, ms": training,
        "products of a step, ms": step,
        "of these roots, ms": milliseconds(refresh) / config.precondition_frequency,
        "elementwise, ms": traffic(every) + traffic(refresh) / config.precondition_frequency,
        "share": step / training,
        "share of the first 100 steps": first / training,
        "roots' share of these": milliseconds(refresh) * early / _LAST_OF_EARLY_PHASE / training,
        "Muon's share": muon / (options.bf16 * 1e9) / ranks / training,
        "decompositions on a step": refresh["decompositions"]
        / ranks
        / config.precondition_frequency,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemm_share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama3-8b"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=8192, help="per rank and step")
    parser.add_argument("--bf16", type=float, default=650.0, help="TFLOP/s of products in bf16")
    parser.add_argument("--tf32", type=float, default=350.0, help="in TF32")
    parser.add_argument("--fp32", type=float, default=50.0, help="in fp32")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of device memory")
    parser.add_argument("--training", type=float, default=400.0, help="of forward and backward")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    settings = dict(pair.split("=", 1) for pair in options.set)
    config = ShampooConfig(
        **{name: json.loads(v) if v[:1] in "[{0123456789tf" else v for name, v in settings.items()}
    )
    config = on_device(config, CUDA)
    rows = [
        shares(model, ranks, options.tokens, options, config)
        for model in options.model
        for ranks in options.ranks
    ]
    if options.json:
        print(json.dumps(rows))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *(
                f"{value:.2%}"
                if "share" in name
                else f"{value:,.1f}"
                if isinstance(value, float)
                else str(value)
                for name, value in row.items()
            )
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    sys.exit(main())
