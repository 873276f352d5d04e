"""The mesh does not change the training where gradients have far fewer ranks than rows.

Other tests give all meshes the same gradients. Here each rank has its own few rows of the batch:
summed over ranks, gradients are others by rounding, which fills what they lack.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp import Shampoo
from tests.models import full_parameters
from tests.ranks import run_ranks

WORLD = 3
STEPS = 10
MEMBERS = {
    "kl_shampoo": {},
    "soap": {"preconditioner": "soap"},
    "soap, eigh": {"preconditioner": "soap", "root_method": "eigh"},
    "soap, no grafting": {"preconditioner": "soap", "grafting": "none"},
}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))


def train(rank: int | None) -> dict[str, Tensor]:
    """How far the weights move, by rows per rank, member and weight; rank None has all rows."""
    moved = {}
    for rows, (member, options) in itertools.product((1, 2, 4), MEMBERS.items()):
        mine = slice(None) if rank is None else slice(rank * rows, (rank + 1) * rows)
        model = build()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        if rank is not None:
            fully_shard(model)
        optimizer = Shampoo(model.named_parameters(), lr=1e-2, lr_factor=1, exclude=[], **options)
        generator = torch.Generator().manual_seed(rows)
        for _ in range(STEPS):
            inputs = torch.randn(WORLD * rows, 64, generator=generator)
            targets = torch.randn(WORLD * rows, 64, generator=generator)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs[mine]), targets[mine]).backward()
            optimizer.step()
        for name, p in full_parameters(dict(model.named_parameters())).items():
            moved[f"{rows} rows, {member}: {name}"] = p - start[name]
    return moved


def train_on_a_rank() -> dict[str, Tensor]:
    return train(torch.distributed.get_rank())


def test_few_rows_on_each_rank_train_as_all_in_one_process():
    alone = train(None)
    for found in run_ranks(WORLD, train_on_a_rank):
        errors = {
            name: ((found[name] - moved).norm() / moved.norm()).item()
            for name, moved in alone.items()
        }
        assert max(errors.values()) <= 3e-3, errors
