"""What cheaper arithmetic, smaller state and blocks between heads do to the loss: the study's 1M
model, KL-Shampoo.

    python -m studies.arithmetic run --steps 240 2000     # a killed study goes on where it was
    python -m studies.arithmetic run --size 3M --steps 240 --only "fp32, eigh"
    python -m studies.arithmetic report

Each variant trains with the same weights and batches as the others, for each seed, and is
validated on 65,536 bytes that nothing is trained on. The same variant of two versions of the code,
which round differently, shows what of a difference is chance.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.command import console, parser_of, table
from studies.pretrain.results import Results, Run, complete, versions
from studies.pretrain.toml_files import read_toml

_HERE = Path(__file__).parent
_RESULTS = _HERE / "arithmetic_results"
_SHAMPOO = "optimizer.shampoo."

_FP32 = {"matmul_precision": "highest"}
_EMULATED = {"matmul_precision": "medium", "root_method": "polynomial"}
_HEADS = _FP32 | {"split_heads": [r"attention\.w[qkv]\."]}
_BF16_MOMENTUM = {"momentum_dtype": "bfloat16"}
_BF16_ROOTS = {"root_dtype": "bfloat16"}

# Settings of [optimizer.shampoo] by variant.
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32, eigh": _FP32,
    "products in bf16": {"matmul_precision": "medium"},
    "GPU default, emulated": _EMULATED,
    "GPU default, emulated, momentum in bf16": _EMULATED | _BF16_MOMENTUM,
    "GPU default, emulated, memory low": _EMULATED | {"memory": "low"},
    "fp32, roots kept in bf16": _FP32 | _BF16_ROOTS,
    "fp32, roots, momentum, factors kept in bf16": {
        **_FP32,
        **_BF16_ROOTS,
        **_BF16_MOMENTUM,
        "factor_dtype": "bfloat16",
    },
    # The model has four heads of 32 rows (3M: six), and no matrix is cut otherwise.
    "fp32, blocks of one head": _HEADS | {"head_dim": 32},
    "fp32, blocks of two heads": _HEADS | {"head_dim": 64},
    "fp32, w1 and w3 cut alike": {
        **_FP32,
        "split_heads": [r"feed_forward\.w[13]\."],
        "head_dim": 32,
    },
}


def job(variant: str, steps: int, seed: int, size: str = "1M") -> Run:
    """The run of a variant: the study's job of this size with KL-Shampoo's settings for this
    length."""
    settings = read_toml((_HERE / "pretrain" / "jobs" / f"{size}.toml").read_text())
    settings |= {
        "optimizer.name": "shampoo",
        # Long runs want half the lr of the study's.
        "optimizer.lr": 1.6e-2 if steps <= 480 else 8e-3,
        _SHAMPOO + "excluded_lr_factor": 0.5,
        "training.steps": steps,
        "lr_scheduler.warmup_steps": max(1, steps // 8 if steps <= 480 else steps // 20),
        "validation.dataset": "python_source_validation",
        "validation.steps": 16,
        "validation.freq": steps // 4,
        "debug.seed": seed,
        **{_SHAMPOO + name: value for name, value in VARIANTS[variant].items()},
    }
    return Run(size=size, contestant=variant, stage=f"{steps} steps", settings=settings)


class _Emulated(TorchDispatchMode):
    """Within it, products of 16-bit matrices are sums in fp32 of exact products, rounded once, as
    on GPUs. CPUs without such arithmetic would take thirty times as long."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _PRODUCTS or args[-1].dtype not in _HALVES:
            return func(*args, **kwargs)
        exact = {name: out.float() for name, out in kwargs.items() if name == "out"}
        result = func(*(arg.float() for arg in args), **kwargs | exact)
        return kwargs["out"].copy_(result) if exact else result.to(args[-1].dtype)


_HALVES = (torch.bfloat16, torch.float16)
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def emulate_gpu() -> None:
    """Let the optimizer's products have the precision that a GPU's units would give them."""
    from shampoo_fsdp import Shampoo
    from shampoo_fsdp.kernels import product
    from shampoo_fsdp.rules import polynomial

    def bmm_in_fp32(a: Tensor, b: Tensor) -> Tensor:
        return a.float() @ b.float()

    polynomial.sums_in_fp32 = product.sums_in_fp32 = lambda device_type: True
    product.bmm_in_fp32 = bmm_in_fp32
    step = Shampoo.step

    def emulated(self: Shampoo, closure: Any = None) -> Any:
        with _Emulated():
            return step(self, closure)

    Shampoo.step = emulated  # type: ignore[method-assign]


def report(size: str, steps: list[int], seeds: list[int]) -> list[dict[str, str]]:
    """Final losses by variant and commit, as two versions of the code may round differently."""
    columns = {f"{n} steps, seed {seed}": (n, seed) for n in steps for seed in seeds}
    of_commits = {path.stem: Results(path) for path in sorted(_RESULTS.glob("*.jsonl"))}
    rows = []
    for variant, (commit, results) in itertools.product(VARIANTS, of_commits.items()):
        losses = {head: results.loss(job(variant, *of, size)) for head, of in columns.items()}
        if any(loss is not None for loss in losses.values()):
            shown = {h: "-" if loss is None else f"{loss:.4f}" for h, loss in losses.items()}
            rows.append({"variant": variant, "commit": commit, **shown})
    return rows


def main() -> None:
    """Reads the command line."""
    parser = parser_of("studies.arithmetic", __doc__)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--size", default="1M", choices=("1M", "3M"))
    parser.add_argument("--steps", type=int, nargs="+", default=[240, 2000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    if options.what == "report":
        rows = report(options.size, options.steps, options.seeds)
        console().print(table("Final losses", rows))
        return
    results = Results(_RESULTS / f"{versions()['commit']}.jsonl")
    emulate_gpu()
    from studies.pretrain.job import run as train

    wanted = itertools.product(options.only, options.steps, options.seeds)
    complete((job(*which, options.size) for which in wanted), results, train)


if __name__ == "__main__":
    sys.exit(main())
