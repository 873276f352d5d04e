"""A step of one rank of many, on a GPU and with ranks that are not there.

Optimizers are built as a job would build them, of tensors without values, and take a step; ranks do
not answer, but what is sent to them is known. Counts are exact; times follow from assumed rates.
"""

import dataclasses
import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shampoo_fsdp.build import build
from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.optimizer import Shampoo
from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.plan.shards import ParameterSpec, Sharded, shape_of, shard_rectangle
from shampoo_fsdp.runtime.bucket import Stopwatch
from shampoo_fsdp.runtime.diagnostics import Streaks
from shampoo_fsdp.runtime.ranks import RankSet
from shampoo_fsdp.state import State
from shampoo_fsdp.tools.machine import Machine
from shampoo_fsdp.tools.plan_figures import JobPlan
from shampoo_fsdp.tools.pretended_gpu import CUDA, pretended_gpu
from shampoo_fsdp.tools.work import Work

__all__ = ["model_step"]

_STEPS = 1000.0  # so many have been taken: the first ones are dearer


_T = TypeVar("_T")


@contextmanager
def dry_optimizer(
    specs: Sequence[ParameterSpec],
    config: ShampooConfig,
    rank: int,
    assignments: Sequence[Assignment] = (),
) -> Iterator[Shampoo]:
    """Shampoo, as a rank has it in the long run; for :func:`dry_step` within.

    Args:
        specs: its parameters; all live on this rank.
        assignments: those that are known already, of these settings.

    Raises:
        ValueError: of Shampoo.
        RuntimeError: if torch.distributed is in use already.
    """
    ranks = 1 + max(max(spec.ranks) for spec in specs)
    settings = dataclasses.asdict(config)
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        with pretended_gpu(), warnings.catch_warnings():
            # A part of a model may lack what an expression is about.
            warnings.filterwarnings("ignore", message=".*which the name of no parameter matches")
            make = _maker(rank)
            named = {spec.name: make(spec).requires_grad_() for spec in specs}
            optimizer = _DryShampoo(named.items(), assignments, **settings)
            for member in optimizer._parameters.members:
                for name, counter in member.counters.items():
                    counter.fill_(1.0 if name == "refreshed" else _STEPS)
            for spec in specs:
                named[spec.name].grad = make(spec)
            yield optimizer
    finally:
        dist.destroy_process_group()


def dry_step(optimizer: Shampoo, machine: Machine, *, by_line: bool = False) -> Work:
    """What a step of a :func:`dry_optimizer` is, by line of our code if that is wanted."""
    assert isinstance(optimizer, _DryShampoo)
    with Work(machine, by_line=by_line) as work:
        optimizer.work = work
        optimizer.step()
    return work


def model_step(job: JobPlan, machine: Machine, sharing: int = 1) -> dict[str, Any]:
    """A step of the rank with the most work, and a training step: plain dicts and numbers.

    "parts" are the ms that the GPU computes for each, "waited" those in which it has nothing to do
    but wait for the network, "ms" is both; "training_ms" is forward and backward, "share" the
    optimizer's time by that; "peak_bytes" are beside parameters, gradients and state.

    Args:
        sharing: GPUs of a data-parallel rank, see :meth:`Machine.training_step`.

    Raises:
        RuntimeError: if torch.distributed is in use already.
    """
    rank = job.figures["worst_rank"]["rank"]
    works = []
    with Console(stderr=True).status("Modelling a step"):  # of large models for some seconds
        for specs in job.models:
            if here := [spec for spec in specs if rank in spec.ranks]:
                with dry_optimizer(here, job.config, rank, job.assignments) as optimizer:
                    works.append(dry_step(optimizer, machine))
    parts = Counter[str]()
    for work in works:
        parts.update(work.busy)
    waited = sum(transfer.waited for work in works for transfer in work.transfers)
    took = sum(parts.values()) + waited
    training = machine.training_step(job.figures["elements"], sharing)
    return {
        "rank": rank,
        "machine": dataclasses.asdict(machine),
        "sharing": sharing,
        "parts": {part: float(of) for part, of in parts.items()},
        "waited": waited,
        "kernels": sum(work.total["launches"] for work in works),
        "peak_bytes": max((work.peak for work in works), default=0),
        "ms": took,
        "training_ms": training,
        "share": took / training,
    }


class _DryShampoo(Shampoo):
    work: Work
    """That the step which is taken is counted in."""

    def __init__(self, named: Any, known: Sequence[Assignment], **settings: Any) -> None:
        self._known = known
        super().__init__(named, **settings)

    def _build(self) -> State:
        return build(
            self.param_groups,
            self.state,
            self._given,
            self._replicas,
            self._is_embedding,
            rank_set=partial(_DryRanks, of=self),
            assign=self._assign,
            watch=partial(_DryWatch, of=self),
            state=_DryState,
        )

    def _assign(self, specs: Sequence[ParameterSpec], *others: Any) -> Assignment:
        known = (of for of in self._known if of.parameters == specs)
        return next(known, None) or Assignment(specs, *others)


class _DryState(State):
    """That of excluded parameters, which their steps look at. What is shown of each block would
    take longest, and nobody looks at it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.streaks = Streaks((), self.parameters.device)  # there is nothing to read back

    def _make_entries(self) -> Iterator[Any]:
        return itertools.islice(super()._make_entries(), len(self.parameters.excluded.members))

    def take_back(self, states: Any) -> None:
        return None


@dataclass(frozen=True)
class _DryRanks(RankSet):
    """Ranks that agree, and of which only this one is there."""

    of: _DryShampoo

    def gather(self, mine: _T) -> list[_T]:
        return [mine] * len(self.ranks)

    def connect(self, *_: object) -> None:
        pass

    def all_to_all(
        self,
        arriving: Any,
        leaving: Tensor,
        received: Any,
        sent: Sequence[int],
        what: str,
        where: str = "",
    ) -> Callable[[], object]:
        work, node = self.of.work, self.of.config.ranks_per_node
        mine = dist.get_rank() // node
        near = sum(n for rank, n in zip(self.ranks, sent, strict=True) if rank // node == mine)
        row = leaving.element_size() * leaving.shape[1]
        # They set out in the order of the buckets.
        number = sum(transfer.name.startswith(what) for transfer in work.transfers)
        transfer = work.send(f"{what} {number}", near * row, (sum(sent) - near) * row)
        return partial(work.wait, transfer)


class _DryWatch(Stopwatch):
    def __init__(self, device: torch.device, of: _DryShampoo) -> None:
        super().__init__(device)
        self._of = of

    def lap(self, part: str) -> None:
        self._of.work.belongs(part)


def _maker(rank: int) -> Callable[[ParameterSpec], Tensor]:
    """A function that makes a parameter, or its gradient, as a rank holds it."""

    @functools.cache
    def mesh_of(ranks: tuple[int, ...], shape: tuple[int, ...]) -> DeviceMesh:
        return DeviceMesh("cuda", torch.tensor(ranks).view(shape))

    @functools.cache
    def layout_of(like: ParameterSpec) -> tuple[tuple[int, ...], DTensorSpec | None]:
        coordinate = list[int]()
        position = like.ranks.index(rank)
        for size in reversed(like.mesh_shape):
            position, at = divmod(position, size)
            coordinate.insert(0, at)
        shard = shard_rectangle(like.shape, like.mesh_shape, like.placements, coordinate)
        if not like.mesh_shape:
            return shape_of(shard), None
        whole = torch.empty(like.shape, device="meta")
        meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
        placements = tuple(map(_placement, like.placements))
        return shape_of(shard), DTensorSpec(mesh_of(like.ranks, like.mesh_shape), placements, meta)

    def make(spec: ParameterSpec) -> Tensor:
        shape, layout = layout_of(dataclasses.replace(spec, name=""))
        local = torch.empty(shape, device=CUDA)
        if layout is None:
            return local
        # (DTensor.from_local takes half a millisecond.)
        return DTensor(local, layout, requires_grad=False)  # type: ignore[no-untyped-call]

    return make


def _placement(placement: Any) -> Placement:
    if not isinstance(placement, Sharded):
        return Replicate()
    if placement.split > 1:
        return _StridedShard(placement.dim, split_factor=placement.split)
    return Shard(placement.dim)
