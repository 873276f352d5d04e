"""What a step asks of one GPU of many, without any of them, beside AdamW's and Muon's.

    python -m benchmarks.dry_run --model llama3-8b --mesh dp_shard=64
    python -m benchmarks.dry_run 405b-on-1024 --json
    python -m benchmarks.dry_run 665m --by-line --set kernels=off

The optimizer is built for one rank as a job would build it, of tensors without memory on a GPU that
is not there, and takes a step; ranks do not answer, but what is sent to them is known. Counts are
exact; times follow from the rates below. In the timeline a GPU's kernels follow each other, and so
do the network's transfers. All cases, and how far the model is off: benchmarks.dry_run_tables.
"""

import dataclasses
import json
import linecache
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks import llama
from benchmarks.command import console, parser_of, table
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.hyperparameters import settings_from_keywords
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ParameterSpec
from shampoo_fsdp.plan.totals import Totals
from shampoo_fsdp.rules.device import on_device
from shampoo_fsdp.rules.layout import block_costs
from shampoo_fsdp.runtime.choice import is_preconditioned
from shampoo_fsdp.runtime.parameters import local_shard
from shampoo_fsdp.tools.command import mesh_of, value_of
from shampoo_fsdp.tools.dry_step import dry_optimizer, dry_step
from shampoo_fsdp.tools.machine import Machine, add_rates, machine_of
from shampoo_fsdp.tools.models import MODELS, model_specs
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import Work

CASES = {
    "8b-on-8": ("llama3-8b", "dp_shard=8"),
    "665m": ("665m", "dp_shard=1"),
    "8b-on-64": ("llama3-8b", "dp_shard=64"),
    "70b-on-256": ("llama3-70b", "dp_shard=256"),
    "405b-on-1024": ("llama3-405b", "dp_shard=128,tp=8"),
}
"""Models and their meshes. Steps of that of 665 million parameters were measured on one GPU."""


def dry_run_of(
    model: str, mesh: str, config: ShampooConfig, machine: Machine, *, by_line: bool = False
) -> dict[str, Any]:
    """A dry run of a well-known model on a mesh such as "dp_shard=64,tp=8", of the rank with the
    most work."""
    sizes = mesh_of(mesh)
    specs = llama.specs(llama.MEASURED) if model == "665m" else model_specs(model, sizes)
    return dry_run(
        specs, config, machine, _busiest(specs, config), sizes.get("tp", 1), by_line=by_line
    )


def dry_run(
    specs: Sequence[ParameterSpec],
    config: ShampooConfig,
    machine: Machine,
    rank: int = 0,
    sharing: int = 1,
    *,
    by_line: bool = False,
) -> dict[str, Any]:
    """Figures of a step of one rank in the long run; "elements" are those of its blocks.

    Args:
        specs: parameters of a model; all are on the same ranks.
        rank: whose step it is.
        sharing: GPUs of a data-parallel rank, see `Machine.training_step`.
        by_line: whether "lines" are wanted: the same by line of our code, the dearest first.
    """
    with dry_optimizer(specs, config, rank) as optimizer:
        work = dry_step(optimizer, machine, by_line=by_line)
        stacks = [stack for bucket in optimizer._parameters.buckets for stack in bucket.stacks]
        parameters_here = [local_shard(p) for p in optimizer.param_groups[0]["params"]]
        baseline = _adamw_step(parameters_here, machine)
    training = machine.training_step(sum(math.prod(spec.shape) for spec in specs), sharing)
    muon = _muon_step(specs, machine)
    return {
        "rank": rank,
        "elements": sum(stack.gradient.numel() for stack in stacks),
        "parts": {
            part: {**counts, "ms": work.busy[part], "peak bytes": work.peaks[part]}
            for part, counts in work.counts.items()
        },
        "total": dict(work.total),
        "timeline": [dataclasses.asdict(transfer) for transfer in work.transfers],
        "ms waited": sum(t.waited for t in work.transfers),
        "ms": work.now,
        "peak bytes": work.peak,
        "AdamW": {**baseline.total, "ms": baseline.now, "peak bytes": baseline.peak},
        "Muon": muon,
        "training step, ms": training,
        "lines": [
            {"place": f"{Path(file).name}:{number}", **done}
            | {"source": escape(linecache.getline(file, number).strip()[:60])}
            for (file, number), done in sorted(work.lines.items(), key=lambda of: -of[1]["ms"])
        ],
        "share": work.now / training,
        "AdamW's share": baseline.now / training,
        "Muon's share": muon["ms"] / training,
    }


def _adamw_step(parameters: list[Tensor], machine: Machine) -> Work:
    """torch's own, fused."""
    gradients, means, squares = ([torch.empty_like(p) for p in parameters] for _ in range(3))
    steps = [torch.empty((), device=CUDA) for _ in parameters]
    with Work(machine) as work:
        adamw(
            parameters, gradients, means, squares, [], steps, fused=True, amsgrad=False,
            maximize=False, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
        )  # fmt: skip
    return work


def _muon_step(specs: Sequence[ParameterSpec], machine: Machine) -> dict[str, float]:
    """torch's own on whole matrices, with an even share of them for each rank; without what their
    way to it takes, or what AdamW does for the others."""
    ranks = math.prod(specs[0].mesh_shape)
    total: Counter[str] = Counter()
    took = peak = 0.0
    matrices = Counter(spec.shape for spec in specs if _is_muons(spec))
    for shape, number in matrices.items():
        share = number * math.prod(shape[:-2]) / ranks
        with pretended_gpu():
            weight = torch.nn.Parameter(torch.empty(shape[-2:], device=CUDA))
            optimizer = torch.optim.Muon([weight])
            weight.grad = torch.empty_like(weight)
            optimizer.step()  # makes its state
            with Work(machine) as work:
                optimizer.step()
        total.update({name: share * n for name, n in work.total.items()})
        took, peak = took + share * work.now, max(peak, work.peak)
    return {**total, "ms": took, "peak bytes": peak}


def _is_muons(spec: ParameterSpec) -> bool:
    return len(spec.shape) > 1 and "embeddings" not in spec.name and "output" not in spec.name


def main(arguments: Sequence[str] | None = None) -> None:
    """Print."""
    parser = parser_of("benchmarks.dry_run", __doc__)
    parser.add_argument("case", nargs="?", choices=CASES, help="in the place of model and mesh")
    parser.add_argument("--model", default="llama3-8b", choices=MODELS)
    parser.add_argument("--mesh", default="dp_shard=8", help="as in dp_shard=64,tp=8")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument(
        "--by_line", action="store_true", help="what each line of our code asks for"
    )
    parser.add_argument("--json", action="store_true")
    add_rates(parser)
    options = vars(parser.parse_args(arguments))
    machine = machine_of(options)
    settings = dict(pair.split("=", 1) for pair in options["set"])
    config = settings_from_keywords({name: value_of(text) for name, text in settings.items()})
    model, mesh = CASES.get(options["case"], (options["model"], options["mesh"]))
    by_line = options["by_line"]
    figures = dry_run_of(model, mesh, config, machine, by_line=by_line)
    if options["json"]:
        print(json.dumps(figures, indent=2))
        return
    say = console().print
    title = f"{model} on {mesh}, rank {figures['rank']}"
    if by_line:
        title += f": by line, of {figures['elements']:,} preconditioned elements"
        lines = [line for line in figures["lines"] if line["ms"] >= _LEAST * figures["ms"]]
        say(table(title, lines, {"line": ("place", ""), "": ("source", ""), **_COLUMNS}))
        return
    whole = {"Shampoo": figures["total"] | {n: figures[n] for n in ("ms", "peak bytes")}}
    rows = figures["parts"] | whole | {name: figures[name] for name in ("AdamW", "Muon")}
    named = [{"part": part, **counts} for part, counts in rows.items()]
    say(table(title, named, {"": ("part", ""), **_COLUMNS, "peak, bytes": ("peak bytes", _EXACT)}))
    if timeline := figures["timeline"]:
        say(table("What is on its way: bytes in the node and to others, ms", timeline))
    shares = {"Shampoo": "share", "AdamW": "AdamW's share", "Muon": "Muon's share"}
    shown = ", ".join(f"{name} {figures[key]:.2%}" for name, key in shares.items())
    say(
        f"Of a training step of {figures['training step, ms']:,.0f} ms: {shown} (without its "
        f"communication). The GPU waits for {figures['ms waited']:.2f} ms. Assumed: {machine}."
    )


_LEAST = 0.001
"""Lines that take less of a step are not shown."""

_EXACT = "{:,.0f}"
_COLUMNS = {
    "kernels": ("launches", _EXACT),
    **{f"{kind}, FLOP": (kind, "{:.3g}") for kind in ("bf16", "tf32", "fp32")},
    "memory moved, bytes": ("bytes", "{:.3g}"),
    "of it operands": ("operands", "{:.3g}"),
    "ms": ("ms", "{:.2f}"),
}
"""Of a part of a step, of a whole one or of a line."""


def _busiest(specs: Sequence[ParameterSpec], config: ShampooConfig) -> int:
    config = on_device(config, CUDA)
    chosen = [spec for spec in specs if is_preconditioned(spec.name, spec.shape, config)]
    totals = Totals(Assignment(chosen, config, block_costs(config), 0))
    return totals.ranks[totals.load.index(max(totals.load))]


if __name__ == "__main__":
    sys.exit(main())
