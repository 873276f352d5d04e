"""Parameters on meshes that share some of their ranks, as experts and the rest of a model may."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from shampoo_fsdp import Shampoo
from tests.ranks import run_ranks

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
