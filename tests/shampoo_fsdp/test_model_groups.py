"""The usual groups of a model's parameters."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shampoo_fsdp import Shampoo, head_settings, param_groups


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4)
        self.down = nn.Linear(4, 8, bias=False)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.block = Block()
        self.scale = nn.Parameter(torch.ones(1, 8))
        self.lm_head = nn.Linear(8, 16, bias=False)
        if tied:
            self.lm_head.weight = self.words.weight


def names(group):
    return [name for name, _ in group["params"]]


def test_vectors_and_embeddings_keep_their_weight():
    matrices, others = param_groups(Model(), weight_decay=0.3, lr=2e-3)
    assert names(matrices) == ["block.q_proj.weight", "block.v_proj.weight", "block.down.weight"]
    assert names(others) == [
        "scale",
        "words.weight",
        "block.q_proj.bias",
        "block.v_proj.bias",
        "block.norm.weight",
        "block.norm.bias",
    ]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert matrices["lr"] == others["lr"] == 2e-3


def test_tied_weights_are_there_once_and_an_output_layer_of_its_own_loses_weight():
    every = [name for group in param_groups(Model()) for name in names(group)]
    assert len(every) == len(set(every)) and "lm_head.weight" not in every
    matrices, _ = param_groups(Model(tied=False))
    assert "lm_head.weight" in names(matrices)


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = Model()
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    model.block.q_proj.bias.requires_grad_(False)
    model.block.v_proj.bias.requires_grad_(False)
    (group,) = param_groups(model)
    assert names(group) == ["block.q_proj.weight", "block.v_proj.weight", "block.down.weight"]
    with pytest.raises(ValueError, match="no parameter of Model requires a gradient"):
        param_groups(model.requires_grad_(False))


def test_an_optimizer_takes_them_and_knows_the_names():
    optimizer = Shampoo(param_groups(Model(tied=False), lr=1e-3), exclude=["words", "lm_head"])
    assert optimizer.matrices_left_to_grafting() == ["lm_head.weight", "scale", "words.weight"]


@pytest.mark.parametrize(
    "config",
    [
        {"head_dim": 2},
        {"num_attention_heads": 4, "hidden_size": 8},
        {"text_config": SimpleNamespace(num_attention_heads=4, hidden_size=8)},
    ],
)
def test_heads_are_found_from_the_config(config):
    model = Model()
    model.config = SimpleNamespace(**config)
    settings = head_settings(model)
    assert settings == {
        "split_heads": [r"(^|\.)q_proj\.", r"(^|\.)v_proj\."],
        "head_dim": 2,
    }
    optimizer = Shampoo(param_groups(model), exclude=["words"], **settings)
    # Four heads and two, and `down`.
    assert optimizer.summary()["blocks"] == 7


def test_where_there_are_no_heads_it_says_so():
    with pytest.raises(ValueError, match="Model has neither head_dim nor"):
        head_settings(Model())
    with pytest.raises(ValueError, match="Linear has no linear layer named q_proj"):
        head_settings(nn.Linear(2, 2))
