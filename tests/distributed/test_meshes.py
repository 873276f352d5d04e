"""The mesh never changes the mathematics: the same gradients give the same parameters."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_fsdp import Shampoo
from tests import models
from tests.models import deterministic_gradients, full_parameters, set_gradients, with_shampoo
from tests.ranks import ranks, run_ranks

STEPS = 12
SETTINGS = {"lr": 1e-2, "max_preconditioner_dim": 16, "precondition_frequency": 4}
UNEVEN = {"dim": 10, "hidden": 17, "vocab": 11}
FEWER_ROWS_THAN_RANKS = {"dim": 3, "hidden": 2, "vocab": 5}


def train(layout: str, sizes: dict[str, int] | None = None, **settings) -> dict[str, Tensor]:
    """Full parameters after some steps with given gradients; layer 1's wq has none at times."""
    (model, _), optimizer = with_shampoo(layout, sizes, **{**SETTINGS, **settings})
    for step in range(STEPS):
        gradients: dict[str, Tensor | None] = dict(deterministic_gradients(model, step))
        if step % 5 == 2:
            gradients["layers.1.attention.wq.weight"] = None
        set_gradients(model, gradients)
        optimizer.step()
    return full_parameters(model)


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)


MESHES = {
    2: [("fsdp", None, "all"), ("ddp", None, "all"), ("tp", None, "all")],
    4: [
        ("fsdp", UNEVEN, "all"),
        ("fsdp", FEWER_ROWS_THAN_RANKS, "all"),
        ("ddp", None, "shard"),
        ("hsdp", None, "all"),
        ("hsdp", UNEVEN, "shard"),
        ("tp_fsdp", {"hidden": 53}, "all"),
    ],
}
"""By the number of ranks: layout, sizes and owner_scope."""


def train_all(world: int) -> list[dict[str, Tensor]]:
    return [train(layout, sizes, owner_scope=scope) for layout, sizes, scope in MESHES[world]]


@pytest.mark.parametrize("world", MESHES)
def test_every_mesh_equals_one_process(world):
    found = run_ranks(world, train_all, world=world)
    for mesh, first, *others in zip(MESHES[world], *found, strict=True):
        assert relative_difference(first, train("single", mesh[1])) <= 1e-5, mesh
        for parameters in others:
            assert relative_difference(parameters, first) == 0.0, mesh


HEADS = {"split_heads": [r"\.w[qkv]\."], "head_dim": 6}


def train_with_heads(layout: str) -> tuple[dict[str, Tensor], list[tuple[object, ...]], float]:
    """Parameters, the blocks of each matrix, and the state of all ranks together."""
    built, optimizer = with_shampoo(layout, **SETTINGS, **HEADS)
    models.train(built, optimizer, range(6))
    parts = [part for team in optimizer._parameters.teams for part in team.parts.items()]
    grids = sorted((member.name, part.grid.view_shape, part.grid.cuts) for member, part in parts)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return full_parameters(built.model), grids, ranks * optimizer.summary()["state_mib_mean"]


def test_heads_are_split_alike_on_every_mesh():
    parameters, grids, state = train_with_heads("single")
    rows = {name: cuts[0] for name, _, cuts in grids}
    assert rows["layers.1.attention.wq.weight"] == (0, 6, 12, 18, 24)
    assert rows["layers.1.attention.wk.weight"] == (0, 6, 12)
    assert rows["layers.1.attention.wo.weight"] == (0, 12, 24)
    for layout, world in (("fsdp", 2), ("tp_fsdp", 4)):
        for theirs, their_grids, their_state in run_ranks(world, train_with_heads, layout=layout):
            assert relative_difference(theirs, parameters) <= 1e-5
            assert their_grids == grids and their_state == pytest.approx(state)


def test_blocks_cut_at_shards_are_trained_as_well():
    """Another grid, so another update; but the same one on every replica."""
    replicas = run_ranks(4, train, layout="hsdp", block_alignment="shard")
    for parameters in replicas[1:]:
        assert relative_difference(parameters, replicas[0]) == 0.0
    assert 0.0 < relative_difference(replicas[0], train("single")) < 0.5


@ranks(4)
def test_nothing_crosses_replicas_that_repeat_the_work():
    for layout, groups in (("hsdp", [2]), ("ddp", [])):
        _, collectives = second_step(layout, owner_scope="shard")
        assert sorted(set(collectives.group_sizes)) == groups


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
    models.train(built, optimizer, range(1))  # the first one asks whether anyone has a gradient
    with Collectives() as collectives:
        optimizer.step()
    return optimizer, collectives


def check_bytes(layout: str) -> None:
    optimizer, collectives = second_step(layout)
    names = [name for name, _ in collectives.calls]
    buckets = len(optimizer._parameters.buckets)
    assert len(names) == 2 * buckets <= 6 and all("alltoall_base" in name for name in names), names
    sent = torch.tensor([float(sum(numel for _, numel in collectives.calls))])
    everyone = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, sent)
    mib = torch.cat(everyone) * 4 / 2**20
    summary = optimizer.summary()
    assert mib.max().item() == pytest.approx(summary["mib_sent_per_step_max"])
    assert mib.mean().item() == pytest.approx(summary["mib_sent_per_step_mean"])


@ranks(4)
def test_a_step_is_two_all_to_alls_of_the_bytes_that_the_plan_says():
    for layout in ("fsdp", "hsdp", "tp_fsdp"):
        check_bytes(layout)


@ranks(2)
def test_no_collective_where_nothing_moves():
    _, collectives = second_step("fsdp", block_alignment="shard")
    assert collectives.calls == []
