"""Starts on several nodes: what connects whom, and when; no start hangs beside others' traffic."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shampoo_fsdp import Shampoo
from shampoo_fsdp.runtime import ranks
from tests.ranks import run_ranks

Pairs = set[tuple[tuple[int, ...], int, int]]
"""Ranks of a group, and of these the numbers of one that sends and one that receives."""


@contextlib.contextmanager
def pairs_that_send() -> Iterator[Pairs]:
    found: Pairs = set()
    send = dist.all_to_all_single

    def all_to_all(arriving, leaving, received, sent, *, group, **options):
        of, me = tuple(dist.get_process_group_ranks(group)), dist.get_rank(group)
        found.update((of, me, peer) for peer, rows in enumerate(sent) if rows)
        found.update((of, peer, me) for peer, rows in enumerate(received) if rows)
        return send(arriving, leaving, received, sent, group=group, **options)

    with mock.patch.object(dist, "all_to_all_single", all_to_all):
        yield found


def trained_on(mesh: DeviceMesh, **settings) -> tuple[Shampoo, nn.Parameter]:
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    placed = nn.Parameter(distribute_tensor(weight, mesh, [Replicate(), Shard(0)][-mesh.ndim :]))
    placed.grad = distribute_tensor(weight.sin(), mesh, placed.placements)
    return Shampoo([("w", placed)], max_preconditioner_dim=4, ranks_per_node=2, **settings), placed


def first_step(crowded: bool, **settings) -> tuple[Pairs, Pairs, Tensor]:
    """Two nodes of two ranks. Other groups' sums may be in flight, in another order on each rank.

    Returns:
        the pairs that were connected before the step, those that it uses, and the weight.
    """
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
    others = [dist.new_group(of) for of in ([0, 1], [2, 3], [0, 2], [1, 3], [0, 1, 2, 3])]
    mine = [group for group in others if dist.get_rank(group) >= 0]
    with pairs_that_send() as before:
        optimizer, weight = trained_on(mesh, **settings)
    turn = dist.get_rank() % len(mine)
    flying = [
        dist.all_reduce(torch.ones(2**18), group=group, async_op=True)
        for group in [*mine[turn:], *mine[:turn]]
        if crowded
    ]
    with pairs_that_send() as used:
        optimizer.step()
    for work in flying:
        work.wait()
    return before, used, weight.full_tensor().detach()


SCOPES = ("all", "near", "shard")


def first_steps() -> list[tuple[Pairs, Pairs, Tensor]]:
    return [first_step(crowded=False, owner_scope=scope) for scope in SCOPES]


def test_what_a_step_sends_over_is_connected_before_it():
    for scope, *connected in zip(SCOPES, *run_ranks(4, first_steps), strict=True):
        assert any(used for _, used, _ in connected), scope
        assert all(before == used for before, used, _ in connected), scope


def test_starts_beside_the_traffic_of_other_groups(request):
    expected = run_ranks(4, first_step, crowded=False)[0][2]
    for _ in range(request.config.getoption("--starts")):
        for _, _, weight in run_ranks(4, first_step, crowded=True):
            assert torch.equal(weight, expected)


def groups_of_all() -> int:
    """Four ranks want a group that no mesh has, and a fifth none."""
    meshes = DeviceMesh("cpu", [[0, 1], [2, 3]]), DeviceMesh("cpu", [4])
    made = mock.Mock(side_effect=dist.new_group)
    with (
        mock.patch.object(ranks, "splits_groups", return_value=True),
        mock.patch.object(dist, "new_group", made),
    ):
        optimizer, _ = trained_on(meshes[dist.get_rank() // 4])
    optimizer.step()
    assert made.call_args.kwargs == {"use_local_synchronization": False}
    return made.call_count


def test_where_a_group_needs_all_ranks_they_make_it_together():
    assert run_ranks(5, groups_of_all) == [1] * 5
