"""A projection that is cut between its heads is trained as these would be alone."""

import pytest
import torch
from torch import Tensor, nn

from shampoo_fsdp import Shampoo
from tests.models import deterministic_gradients, set_gradients

HEAD_DIM, COLUMNS, KV, HEADS_PER_KV = 6, 10, 2, 3
OPTIONS = {"lr": 1e-2, "max_preconditioner_dim": 16, "refresh_schedule": "together"}
HEADS = {"split_heads": [r"wqkv"], "head_dim": HEAD_DIM}


def cut_apart(values: Tensor) -> dict[str, Tensor]:
    """[n_kv, heads_per_kv + 2, head_dim, in], head by head; fused they are rows."""
    return {f"head{i}": head for i, head in enumerate(values.reshape(-1, HEAD_DIM, COLUMNS))}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preconditioner": "soap"},
        {"merge_dims": "small"},
        {"max_preconditioner_dim": 4},
        {"large_dim": "diagonal", "max_preconditioner_dim": 8},
    ],
)
def test_heads_of_a_fused_projection_are_trained_as_if_each_were_alone(settings):
    shape = (KV, HEADS_PER_KV + 2, HEAD_DIM, COLUMNS)
    values = deterministic_gradients({"w": shape}, -1)["w"]
    one = {"wqkv": nn.Parameter(values.reshape(-1, COLUMNS).clone())}
    many = {name: nn.Parameter(head.clone()) for name, head in cut_apart(values).items()}
    options = OPTIONS | settings
    together = Shampoo(one.items(), **options, **HEADS)
    # Each alone is a matrix, which merging would make a vector.
    separate = Shampoo(many.items(), **(options | {"merge_dims": "matrix"}))
    for step in range(6):
        gradient = deterministic_gradients({"w": shape}, step)["w"]
        set_gradients(one, {"wqkv": gradient.reshape(-1, COLUMNS)})
        set_gradients(many, cut_apart(gradient))
        together.step()
        separate.step()
    found = one["wqkv"].detach().view(-1, HEAD_DIM, COLUMNS)
    expected = torch.stack([p.detach() for p in many.values()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(expected, values.view_as(expected))
