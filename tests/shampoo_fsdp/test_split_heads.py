"""A projection that is cut between its heads is trained as these would be alone."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from shampoo_fsdp import Shampoo
from tests.models import deterministic_gradients, set_gradients

HEAD_DIM, COLUMNS, KV, HEADS_PER_KV = 6, 10, 2, 3
OPTIONS = {"lr": 1e-2, "max_preconditioner_dim": 16, "refresh_schedule": "together"}
HEADS = {"split_heads": [r"wqkv"], "head_dim": HEAD_DIM}


def fused(values: Tensor) -> nn.ParameterDict:
    """[n_kv, heads_per_kv + 2, head_dim, in], as rows."""
    return nn.ParameterDict({"wqkv": values.reshape(-1, COLUMNS).clone()})


def apart(values: Tensor) -> nn.ParameterDict:
    heads = values.reshape(-1, HEAD_DIM, COLUMNS)
    return nn.ParameterDict({f"head{i}": head.clone() for i, head in enumerate(heads)})


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
    one, many = fused(values), apart(values)
    options = OPTIONS | settings
    together = Shampoo(one.named_parameters(), **options, **HEADS)
    # Each alone is a matrix, which merging would make a vector.
    separate = Shampoo(many.named_parameters(), **(options | {"merge_dims": "matrix"}))
    for step in range(6):
        gradient = deterministic_gradients({"w": shape}, step)["w"]
        for model, optimizer, cut in ((one, together, fused), (many, separate, apart)):
            set_gradients(model, dict(cut(gradient).items()))
            optimizer.step()
    found = one["wqkv"].detach().view(-1, HEAD_DIM, COLUMNS)
    expected = torch.stack([p.detach() for p in many.values()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(expected, values.view_as(expected))


@pytest.mark.parametrize("pattern", ["wq$", r"qkv\.bias"])
def test_an_expression_that_matches_nothing_is_told(pattern):
    model = nn.ParameterDict({"wqkv": torch.zeros(12, 4)})
    with pytest.warns(UserWarning, match="'split_heads' has ") as caught:
        Shampoo(model.named_parameters(), split_heads=["wqkv", pattern], head_dim=6)
    assert pattern in str(caught[0].message) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Shampoo(model.named_parameters(), split_heads=["wqkv"], head_dim=6)


def test_other_heads_are_another_grid_for_a_checkpoint():
    model = fused(deterministic_gradients({"w": (60, COLUMNS)}, -1)["w"])
    old = Shampoo(model.named_parameters(), **OPTIONS, **HEADS)
    for step in range(4):
        set_gradients(model, deterministic_gradients(model, step))
        old.step()
    saved = copy.deepcopy(old.state_dict())
    for heads in ({}, HEADS | {"head_dim": 12}):
        with pytest.raises(ValueError, match=r"'wqkv' is cut into .*'split_heads' with"):
            Shampoo(model.named_parameters(), **OPTIONS, **heads).load_state_dict(saved)
        new = Shampoo(model.named_parameters(), **OPTIONS, **heads, on_mismatch="rebuild")
        new.load_state_dict(saved)
        state = new.state[model["wqkv"]]
        assert torch.equal(state["exp_avg"], old.state[model["wqkv"]]["exp_avg"])
        assert state["step"] == 4 and state["factor_step"] == 0
    same = Shampoo(model.named_parameters(), **OPTIONS, **HEADS)
    same.load_state_dict(saved)
    assert same.state[model["wqkv"]]["factor_step"] == 4
