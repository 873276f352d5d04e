"""What a step sends on a mesh, and which blocks there are. (That a mesh changes no parameter:
test_fuzz.)"""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp import Shampoo
from tests.models import full_parameters, train, with_shampoo
from tests.ranks import ranks, run_ranks

SETTINGS = {"lr": 1e-2, "lr_factor": 1.0, "max_preconditioner_dim": 16, "precondition_frequency": 4}
# 53 rows are uneven parts of tensor parallelism, and of FSDP in it.
SIZES = {"hidden": 53}


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)


def trained(layout: str, **settings) -> dict[str, Tensor]:
    built, optimizer = with_shampoo(layout, SIZES, **SETTINGS, **settings)
    train(built, optimizer, range(12))
    return full_parameters(built.model)


def trained_on_ranks() -> list[dict[str, Tensor]]:
    return [trained("tp_fsdp"), trained("hsdp"), trained("hsdp", block_alignment="shard")]


def test_uneven_parts_and_blocks_cut_at_shards_are_trained_as_well():
    """Another grid gives another update; but the same one on every replica."""
    alone, (first, *others) = trained("single"), run_ranks(4, trained_on_ranks)
    for same in first[:2]:
        assert relative_difference(same, alone) <= 1e-5
    for theirs in others:
        assert max(map(relative_difference, theirs, first)) == 0.0
    assert 0.0 < relative_difference(first[2], alone) < 0.5


class Collectives(TorchDispatchMode):
    """Records the name and the elements of each collective that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.group_sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in str(func):
            tensors = [a for a in args if isinstance(a, Tensor)]
            # What goes to the rank itself is not sent.
            splits = args[4] if "alltoall_base" in str(func) else []
            own = splits[dist.get_rank()] if len(splits) == dist.get_world_size() else 0
            self.calls.append((str(func), tensors[-1].numel() - own))
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            self.group_sizes.append(dist.ProcessGroup.unbox(group).size())
        return func(*args, **(kwargs or {}))


def second_step(layout: str, **settings) -> tuple[Shampoo, Collectives]:
    built, optimizer = with_shampoo(layout, **SETTINGS, **settings)
    train(built, optimizer, range(1))  # the first one asks whether anyone has a gradient
    with Collectives() as collectives:
        optimizer.step()
    return optimizer, collectives


@ranks(4)
def test_what_a_step_sends():
    """Two all-to-alls for each bucket, of the bytes that the plan says; nothing crosses replicas
    that repeat the work, and nothing leaves a rank whose blocks are its own."""
    for layout in ("fsdp", "hsdp", "tp_fsdp"):
        optimizer, collectives = second_step(layout)
        names = [name for name, _ in collectives.calls]
        assert len(names) == 2 * len(optimizer._parameters.buckets) <= 6, names
        assert all("alltoall_base" in name for name in names), names
        sent = sum(numel for _, numel in collectives.calls) * 4 / 2**20
        everyone = [sent] * 4
        dist.all_gather_object(everyone, sent)
        summary = optimizer.summary()
        assert max(everyone) == pytest.approx(summary["mib_sent_per_step_max"])
        assert sum(everyone) / 4 == pytest.approx(summary["mib_sent_per_step_mean"])
    for layout, groups in (("hsdp", [2]), ("ddp", [])):
        _, collectives = second_step(layout, owner_scope="shard")
        assert sorted(set(collectives.group_sizes)) == groups
    _, collectives = second_step("fsdp", block_alignment="shard")
    assert collectives.calls == []


# ------- parameters on meshes that share some of their ranks, as experts and the rest may be on

# In the first of them rank 2 waits for updates that rank 3 must not hold back until it has the
# gradients of rank 2.
OVERLAPPING = [((0, 1, 2, 3), (0, 2), (2, 3)), ((0, 1, 2, 3), (0, 1), (0, 2), (1, 3), (2, 3))]
Meshes = Sequence[Sequence[int]]


def steps_on_overlapping_meshes(several: Sequence[Meshes]) -> list[dict[str, Tensor]]:
    return [steps(meshes) for meshes in several]


def steps(meshes: Meshes) -> dict[str, Tensor]:
    torch.manual_seed(0)
    named = []
    for i, chosen in enumerate(meshes):
        mesh, weight = DeviceMesh("cpu", list(chosen)), torch.randn(16, 8)
        if dist.get_rank() in chosen:
            placed = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
            named.append((f"layers.{i}.weight", placed))
    optimizer = Shampoo(named, lr=1e-2, max_preconditioner_dim=4)
    for step in range(3):
        for name, parameter in named:
            generator = torch.Generator().manual_seed(100 * step + int(name.split(".")[1]))
            gradient = torch.randn(16, 8, generator=generator)
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, [Shard(0)])
        optimizer.step()
    return {name: parameter.full_tensor().detach() for name, parameter in named}


def test_meshes_may_overlap():
    given = [[(0,)] * len(meshes) for meshes in OVERLAPPING]
    (alone,) = run_ranks(1, steps_on_overlapping_meshes, several=given)
    on_ranks = run_ranks(4, steps_on_overlapping_meshes, several=OVERLAPPING)
    for expected, *found in zip(alone, *on_ranks, strict=True):
        assert set().union(*found) == expected.keys()
        for of_rank in found:
            of_one = {name: expected[name] for name in of_rank}
            torch.testing.assert_close(of_rank, of_one, rtol=1e-5, atol=1e-6)
