"""What a step asks of one GPU of many, without any of them.

    python -m benchmarks.dry_run --model llama3-8b --mesh dp_shard=64
    python -m benchmarks.dry_run --model llama3-405b --mesh dp_shard=128,tp=8 --json

The optimizer is built for one rank as a job would build it, of tensors without memory on a GPU that
is not there, and takes a step; ranks do not answer, but what is sent to them is known. Counts are
exact; times follow from the rates below, which are assumed. In the timeline a GPU's kernels follow
each other, and so do the network's transfers.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.optim.adamw import adamw
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.dry_run_tables import print_tables
from shampoo_fsdp import Shampoo
from shampoo_fsdp.config import settings_from_keywords
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded, shape_of, shard_rectangle
from shampoo_fsdp.plan.totals import Totals
from shampoo_fsdp.rules.costs import BlockCosts
from shampoo_fsdp.rules.device import on_device
from shampoo_fsdp.runtime.exchange import Exchange
from shampoo_fsdp.runtime.parameters import is_preconditioned, local_shard
from shampoo_fsdp.runtime.ranks import RankSet
from shampoo_fsdp.runtime.rows import Way
from shampoo_fsdp.tools.command import mesh_of, value_of
from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.models import MODELS, model_specs
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import Transfer, Work

__all__ = ["dry_run", "main"]

_STEPS = 1000.0


def dry_run(
    specs: Sequence[ParameterSpec],
    settings: Mapping[str, Any],
    machine: Machine,
    rank: int = 0,
) -> dict[str, Any]:
    """Figures of a step of one rank in the long run.

    Args:
        specs: parameters of a model; all are on the same ranks.
        settings: of Shampoo.
        rank: whose step it is.
    """
    ranks = math.prod(specs[0].mesh_shape)
    with _ranks_that_do_not_answer(ranks, rank), pretended_gpu():
        named = {spec.name: _sharded(spec, rank) for spec in specs}
        optimizer = Shampoo(named.items(), **settings)
        _as_after_many_steps(optimizer)
        for parameter in named.values():
            parameter.grad = _like(parameter)
        work = _step(optimizer, machine)
        baseline = _adamw_step(list(map(local_shard, named.values())), machine)
        buckets = [bucket.stacks for bucket in optimizer._parameters.buckets]
        rows = sum(
            tensor.nbytes
            for bucket in optimizer._parameters.buckets
            for way in (bucket._exchange._gather, bucket._exchange._scatter)
            for tensor in (way.staying, way.leaving, way.arrived)
        )
    parameters = sum(math.prod(spec.shape) for spec in specs)
    training = machine.training_step(parameters)
    muon = _muon_step(specs, machine)
    return {
        "ranks": ranks,
        "rank": rank,
        "buckets": len(buckets),
        "stacks": sum(map(len, buckets)),
        "blocks": sum(len(owned.blocks) for stacks in buckets for owned in stacks),
        "parts": {part: dict(counts) for part, counts in work.counts.items()},
        "total": dict(work.total),
        "ms of parts": dict(work.busy),
        "timeline": [dataclasses.asdict(transfer) for transfer in work.transfers],
        "bytes sent": sum(t.near + t.far for t in work.transfers),
        "ms waited": sum(t.waited for t in work.transfers),
        "ms": work.now,
        "peak bytes": work.peak,
        "peak bytes of parts": dict(work.peaks),
        "bytes of row numbers": rows,
        "AdamW": {
            **baseline.total,
            "ms": baseline.now,
            "peak bytes": max(baseline.peaks.values(), default=0),
        },
        "Muon": muon,
        "training step, ms": training,
        "share": work.now / training,
        "AdamW's share": baseline.now / training,
        "Muon's share": muon["ms"] / training,
        "machine": dataclasses.asdict(machine),
        "chosen by device": optimizer.chosen_by_device,
    }


@contextmanager
def _ranks_that_do_not_answer(ranks: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    agreeing = mock.patch.object(RankSet, "gather", lambda self, mine: [mine] * len(self.ranks))
    try:
        with agreeing:
            yield
    finally:
        dist.destroy_process_group()


def _sharded(spec: ParameterSpec, rank: int) -> Tensor:
    coordinate = []
    for size in reversed(spec.mesh_shape):
        rank, position = divmod(rank, size)
        coordinate.insert(0, position)
    rectangle = shard_rectangle(spec.shape, spec.mesh_shape, spec.placements, coordinate)
    local = torch.empty(shape_of(rectangle), device=CUDA)
    if not spec.mesh_shape:
        return torch.nn.Parameter(local)
    stride = torch.empty(spec.shape, device="meta").stride()
    meta = TensorMeta(torch.Size(spec.shape), stride, local.dtype)
    placements = tuple(map(_placement, spec.placements))
    return DTensor(local, DTensorSpec(_mesh(spec.mesh_shape), placements, meta), requires_grad=True)


def _placement(placement: Any) -> Placement:
    if not isinstance(placement, Sharded):
        return Replicate()
    if placement.split > 1:
        return _StridedShard(placement.dim, split_factor=placement.split)
    return Shard(placement.dim)


_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def _mesh(shape: tuple[int, ...]) -> DeviceMesh:
    if shape not in _meshes:
        with unset_fake_temporarily():
            _meshes[shape] = DeviceMesh("cuda", torch.arange(math.prod(shape)).view(shape))
    return _meshes[shape]


def _like(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter)
    return DTensor(torch.empty_like(parameter._local_tensor), parameter._spec, requires_grad=False)


def _as_after_many_steps(optimizer: Shampoo) -> None:
    for state in optimizer.state.values():
        for name, value in (("step", _STEPS), ("factor_step", _STEPS), ("refreshed", 1.0)):
            if name in state:
                state[name].fill_(value)


class _Travelling:
    """What `dist.all_to_all_single` returns."""

    def __init__(self, work: Work, transfer: Transfer) -> None:
        self.wait = partial(work.wait, transfer)


def _step(optimizer: Shampoo, machine: Machine) -> Work:
    work, name = Work(machine), ""
    names = {}
    for k, bucket in enumerate(optimizer._parameters.buckets):
        names[bucket._exchange._gather] = f"gradients {k}"
        names[bucket._exchange._scatter] = f"updates {k}"
    set_out, lap = Exchange._set_out, optimizer._watch.lap
    node = optimizer.config.ranks_per_node

    def named(exchange: Exchange, way: Way) -> None:
        nonlocal name
        name = names[way]
        set_out(exchange, way)

    def sent(output: Tensor, packed: Tensor, received: Any, sent: list[int], **_: Any) -> Any:
        me = dist.get_rank()
        near = sum(sent[r] for r in range(len(sent)) if r // node == me // node and r != me)
        far = sum(sent) - near - sent[me]
        size = packed.element_size() * packed.shape[1]
        return _Travelling(work, work.send(name, near * size, far * size))

    def measured(part: str) -> None:
        lap(part)
        work.belongs(part)

    with (
        mock.patch.object(Exchange, "_set_out", named),
        mock.patch("torch.distributed.all_to_all_single", sent),
        mock.patch.object(optimizer._watch, "lap", measured),
        work,
    ):
        optimizer.step()
    return work


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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dry_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="llama3-8b", choices=MODELS)
    parser.add_argument("--mesh", default="dp_shard=8", help="as in dp_shard=64,tp=8")
    parser.add_argument("--rank", type=int, help="default: the one with the most work")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--json", action="store_true")
    rates = parser.add_argument_group("what is assumed")
    for field in dataclasses.fields(Machine):
        rates.add_argument(f"--{field.name}", type=float, default=field.default)
    options = vars(parser.parse_args(arguments))
    machine = Machine(**{field.name: options[field.name] for field in dataclasses.fields(Machine)})
    settings = dict(pair.split("=", 1) for pair in options["set"])
    settings = {name: value_of(text) for name, text in settings.items()}
    specs = model_specs(options["model"], mesh_of(options["mesh"]))
    rank = options["rank"]
    if rank is None:
        rank = _busiest(specs, settings)
    title = f"{options['model']} on {options['mesh']}"
    figures = {"title": title, **dry_run(specs, settings, machine, rank)}
    if options["json"]:
        print(json.dumps(figures, indent=2))
    else:
        print_tables(figures, Console(width=None if Console().is_terminal else 130))


def _busiest(specs: Sequence[ParameterSpec], settings: Mapping[str, Any]) -> int:
    config = on_device(settings_from_keywords(dict(settings)), CUDA)
    chosen = [spec for spec in specs if is_preconditioned(spec.name, spec.shape, config)]
    totals = Totals(Assignment(chosen, config, BlockCosts(config), 0))
    return totals.ranks[totals.load.index(max(totals.load))]


if __name__ == "__main__":
    sys.exit(main())
