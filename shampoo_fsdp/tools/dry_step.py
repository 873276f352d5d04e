"""A step of one rank of many, on a GPU and with ranks that are not there.

Optimizers are built as a job would build them, of tensors without values, and take a step; ranks do
not answer, but what is sent to them is known. Counts are exact; times follow from assumed rates.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.optimizer import Shampoo
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded, shape_of, shard_rectangle
from shampoo_fsdp.runtime.exchange import Exchange
from shampoo_fsdp.runtime.ranks import RankSet
from shampoo_fsdp.runtime.rows import Way
from shampoo_fsdp.runtime.streaks import Streaks
from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import TimedTransfer, Work

__all__ = ["dry_optimizer", "dry_step"]

_STEPS = 1000.0  # so many have been taken: the first ones are dearer


@contextmanager
def dry_optimizer(
    specs: Sequence[ParameterSpec], config: ShampooConfig, rank: int
) -> Iterator[Shampoo]:
    """Shampoo, as a rank has it in the long run; for :func:`dry_step` within.

    Args:
        specs: its parameters; all live on this rank.
        config: `compile` is left out: kernels are counted as they are without it.

    Raises:
        ValueError: of Shampoo.
        RuntimeError: if torch.distributed is in use already.
    """
    ranks = 1 + max(max(spec.ranks) for spec in specs)
    settings = dataclasses.asdict(dataclasses.replace(config, compile=False))
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    alone = mock.patch.object(RankSet, "gather", lambda self, mine: [mine] * len(self.ranks))
    unread = mock.patch.object(Streaks, "look")  # there are no values
    try:
        with alone, unread, pretended_gpu():
            meshes: dict[Any, DeviceMesh] = {}
            named = {spec.name: _sharded(spec, rank, meshes) for spec in specs}
            optimizer = Shampoo(named.items(), **settings)
            for state in optimizer.state.values():
                for name, value in (("step", _STEPS), ("factor_step", _STEPS), ("refreshed", 1.0)):
                    if name in state:
                        state[name].fill_(value)
            optimizer._seen_a_gradient = True  # else the step would wait, as the first one does
            for parameter in named.values():
                parameter.grad = _like(parameter)
            yield optimizer
    finally:
        dist.destroy_process_group()


def dry_step(optimizer: Shampoo, machine: Machine) -> Work:
    """What a step of a :func:`dry_optimizer` is."""
    work = Work(machine)
    setting_out: tuple[str, tuple[int, ...]] = "", ()
    lap, set_out = optimizer._ready().watch.lap, Exchange._set_out
    node = optimizer.config.ranks_per_node
    known: dict[Way, tuple[str, tuple[int, ...]]] = {}
    number = 0
    for team in optimizer._parameters.teams:
        for bucket in team.buckets:
            known[bucket._exchange._gather] = f"gradients {number}", team.ranks.ranks
            known[bucket._exchange._scatter] = f"updates {number}", team.ranks.ranks
            number += 1

    def named(exchange: Exchange, way: Way) -> None:
        nonlocal setting_out
        setting_out = known[way]
        set_out(exchange, way)

    def sent(output: Tensor, packed: Tensor, received: Any, sent: list[int], **_: Any) -> Any:
        name, ranks = setting_out
        mine = dist.get_rank() // node
        near = sum(n for rank, n in zip(ranks, sent, strict=True) if rank // node == mine)
        row = packed.element_size() * packed.shape[1]
        return _Travelling(work, work.send(name, near * row, (sum(sent) - near) * row))

    def measured(part: str) -> None:
        lap(part)
        work.belongs(part)

    with (
        mock.patch.object(Exchange, "_set_out", named),
        mock.patch("torch.distributed.all_to_all_single", sent),
        mock.patch.object(optimizer._ready().watch, "lap", measured),
        work,
    ):
        optimizer.step()
    return work


class _Travelling:
    """What `dist.all_to_all_single` returns."""

    def __init__(self, work: Work, transfer: TimedTransfer) -> None:
        self.wait = partial(work.wait, transfer)


def _sharded(spec: ParameterSpec, rank: int, meshes: dict[Any, DeviceMesh]) -> Tensor:
    coordinate, position = list[int](), spec.ranks.index(rank)
    for size in reversed(spec.mesh_shape):
        position, at = divmod(position, size)
        coordinate.insert(0, at)
    rectangle = shard_rectangle(spec.shape, spec.mesh_shape, spec.placements, coordinate)
    local = torch.empty(shape_of(rectangle), device=CUDA)
    if not spec.mesh_shape:
        return torch.nn.Parameter(local)
    where = spec.ranks, spec.mesh_shape
    if where not in meshes:
        with unset_fake_temporarily():
            meshes[where] = DeviceMesh("cuda", torch.tensor(spec.ranks).view(spec.mesh_shape))
    stride = torch.empty(spec.shape, device="meta").stride()
    meta = TensorMeta(torch.Size(spec.shape), stride, local.dtype)
    placements = tuple(map(_placement, spec.placements))
    return _dtensor(local, DTensorSpec(meshes[where], placements, meta), trained=True)


def _placement(placement: Any) -> Placement:
    if not isinstance(placement, Sharded):
        return Replicate()
    if placement.split > 1:
        return _StridedShard(placement.dim, split_factor=placement.split)
    return Shard(placement.dim)


def _like(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter)
    return _dtensor(torch.empty_like(parameter._local_tensor), parameter._spec, trained=False)


def _dtensor(local: Tensor, spec: DTensorSpec, *, trained: bool) -> DTensor:
    return DTensor(local, spec, requires_grad=trained)  # type: ignore[no-untyped-call]
