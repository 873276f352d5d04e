"""The plan: every piece arrives, once; owners are where the data is; work is balanced."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.planner import ParameterSpec, Plan, make_plan

COLUMN_WISE = (_StridedShard(0, split_factor=2), Shard(0))
MESHES = {
    "one": ((1,), {"a": (Replicate(),), "b": (Replicate(),)}),
    "ddp": ((3,), {"a": (Replicate(),), "b": (Replicate(),)}),
    "fsdp": ((4,), {"a": (Shard(0),), "b": (Shard(0),)}),
    "more ranks than rows": ((12,), {"a": (Shard(0),), "b": (Shard(0),)}),
    "hsdp": ((2, 3), {"a": (Replicate(), Shard(0)), "b": (Replicate(), Shard(0))}),
    "fsdp and tp": ((3, 2), {"a": COLUMN_WISE, "b": (Shard(0), Shard(1))}),
    "hsdp and tp": (
        (2, 2, 2),
        {"a": (Replicate(), *COLUMN_WISE), "b": (Replicate(), Shard(0), Shard(1))},
    ),
}
SHAPES = {"a": (13, 9), "b": (7, 22), "experts": (3, 8, 5)}
CONFIG = ShampooConfig(max_preconditioner_dim=5, precondition_frequency=3)


def specs(mesh: str) -> list[ParameterSpec]:
    mesh_shape, placements = MESHES[mesh]
    ranks = tuple(range(10, 10 + torch.Size(mesh_shape).numel()))
    placements = {**placements, "experts": placements["a"]}
    return [ParameterSpec(n, SHAPES[n], ranks, mesh_shape, placements[n]) for n in SHAPES]


def plans_of_all_ranks(mesh: str, config: ShampooConfig = CONFIG) -> list[Plan]:
    parameters = specs(mesh)
    return [make_plan(parameters, config, rank) for rank in sorted(parameters[0].ranks)]


def deliver(plans: list[Plan], shards: list[list[Tensor]], back: bool) -> list[list[Tensor]]:
    """Carry out all ranks' transfers, by hand: shards -> blocks, or blocks -> shards."""
    blocks = [
        [torch.full([stop - start for start, stop in b.rectangle], torch.nan) for b in plan.blocks]
        for plan in plans
    ]
    if back:
        blocks, shards = shards, [[torch.full(s, torch.nan) for s in p.shard_shapes] for p in plans]
    for me, plan in enumerate(plans):
        for t in plan.local:
            block = blocks[me][t.block][t.block_slices]
            shard = shards[me][t.parameter][t.shard_slices]
            shard.copy_(block) if back else block.copy_(shard)
        for peer in range(len(plans)):
            if back:
                sent = [t for t in plan.scatter_out if t.peer == peer]
                received = [t for t in plans[peer].scatter_in if t.peer == me]
            else:
                sent = [t for t in plan.gather_out if t.peer == peer]
                received = [t for t in plans[peer].gather_in if t.peer == me]
            for source, target in zip(sent, received, strict=True):
                if back:
                    value = blocks[me][source.block][source.block_slices]
                    shards[peer][target.parameter][target.shard_slices] = value
                else:
                    value = shards[me][source.parameter][source.shard_slices]
                    blocks[peer][target.block][target.block_slices] = value
    return shards if back else blocks


def shards_of(plans: list[Plan], mesh: str, full: dict[str, Tensor]) -> list[list[Tensor]]:
    from shampoo_fsdp.layout import shard_rectangle

    result = []
    parameters = specs(mesh)
    for coordinate in itertools.product(*map(range, parameters[0].mesh_shape)):
        rectangles = [
            shard_rectangle(p.shape, p.mesh_shape, p.placements, coordinate) for p in parameters
        ]
        result.append(
            [
                full[p.name][tuple(slice(*i) for i in r)].clone()
                for p, r in zip(parameters, rectangles, strict=True)
            ]
        )
    return result


@pytest.mark.parametrize("alignment", ["logical", "shard"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_piece_arrives_at_its_place_and_back(mesh, alignment):
    config = ShampooConfig(
        max_preconditioner_dim=5, precondition_frequency=3, block_alignment=alignment
    )
    plans = plans_of_all_ranks(mesh, config)
    full = {n: torch.arange(float(torch.Size(s).numel())).view(s) for n, s in SHAPES.items()}
    shards = shards_of(plans, mesh, full)
    blocks = deliver(plans, shards, back=False)
    for plan, mine in zip(plans, blocks, strict=True):
        for block, values in zip(plan.blocks, mine, strict=True):
            name = list(SHAPES)[block.parameter]
            expected = full[name][tuple(slice(*interval) for interval in block.rectangle)]
            assert torch.equal(values, expected)
    for mine, expected in zip(deliver(plans, blocks, back=True), shards, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_every_block_has_one_owner(mesh):
    plans = plans_of_all_ranks(mesh)
    owned = Counter((b.parameter, b.index) for plan in plans for b in plan.blocks)
    assert set(owned.values()) == {1}
    assert sum(owned.values()) == sum(len(grid) for grid in plans[0].grids)
    assert len({plan.fingerprint for plan in plans}) == 1


@pytest.mark.parametrize("mesh", MESHES)
def test_the_plan_knows_what_each_rank_sends(mesh):
    plans = plans_of_all_ranks(mesh)
    for me, plan in enumerate(plans):
        sent = sum(t.numel for t in (*plan.gather_out, *plan.scatter_out))
        assert plans[0].elements_sent[me] == sent


def test_gradients_do_not_cross_replicas():
    plans = plans_of_all_ranks("hsdp")
    for me, plan in enumerate(plans):
        assert all(t.peer // 3 == me // 3 for t in plan.gather_out)
    assert any(t.peer // 3 != me // 3 for me, plan in enumerate(plans) for t in plan.scatter_out)


def test_nothing_travels_where_blocks_lie_in_shards():
    # 4 shards of 2 x 2 blocks each, of equal cost: the owner can be the rank that holds them.
    spec = ParameterSpec("w", (64, 16), (0, 1, 2, 3), (4,), (Shard(0),))
    config = ShampooConfig(max_preconditioner_dim=8, refresh_schedule="together")
    plans = [make_plan([spec], config, rank) for rank in range(4)]
    assert plans[0].elements_sent == (0, 0, 0, 0)
    assert [len(plan.blocks) for plan in plans] == [4, 4, 4, 4]


def test_shard_alignment_sends_nothing_on_uneven_shards():
    spec = ParameterSpec("w", (22, 16), (0, 1, 2), (3,), (Shard(0),))
    config = ShampooConfig(max_preconditioner_dim=8, block_alignment="shard")
    assert make_plan([spec], config, 0).elements_sent == (0, 0, 0)


def llama3_8b(ranks: int) -> list[ParameterSpec]:
    shapes = {
        "attention.wq": (4096, 4096), "attention.wk": (1024, 4096), "attention.wv": (1024, 4096),
        "attention.wo": (4096, 4096), "feed_forward.w1": (14336, 4096),
        "feed_forward.w2": (4096, 14336), "feed_forward.w3": (14336, 4096),
    }  # fmt: skip
    return [
        ParameterSpec(f"layers.{i}.{n}.weight", s, tuple(range(ranks)), (ranks,), (Shard(0),))
        for i in range(32)
        for n, s in shapes.items()
    ]


@pytest.mark.parametrize("ranks", [8, 64])
def test_llama3_8b_is_balanced_in_total_and_in_every_phase(ranks):
    plan = make_plan(llama3_8b(ranks), ShampooConfig(), 0)
    assert max(plan.load) * ranks / sum(plan.load) <= 1.05
    assert max(plan.state_elements) * ranks / sum(plan.state_elements) <= 1.05
    for loads in zip(*plan.phase_load, strict=True):
        assert max(loads) * ranks / sum(loads) <= 1.05


def test_an_unsupported_placement_names_the_parameter():
    from torch.distributed.tensor import Partial

    spec = ParameterSpec("layers.0.w", (8, 8), (0, 1), (2,), (Partial(),))
    with pytest.raises(ValueError, match=r"'layers\.0\.w'.*Partial"):
        make_plan([spec], CONFIG, 0)
