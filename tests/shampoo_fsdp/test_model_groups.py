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


def test_vectors_and_embeddings_keep_their_weight_and_an_output_layer_that_is_tied_to_them():
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
    matrices, _ = param_groups(Model(tied=False))
    assert "lm_head.weight" in names(matrices)


def test_a_frozen_model_and_a_misspelt_setting_are_refused():
    with pytest.raises(ValueError, match="no parameter of Model requires a gradient"):
        param_groups(Model().requires_grad_(False))
    with pytest.raises(TypeError, match=r"'weight_decy'.*Allowed: lr, betas, eps"):
        param_groups(Model(), weight_decy=0.1)


class Renamed(nn.Module):
    """A language model whose embeddings are called as in T5, BART, CTRL, and nothing."""

    def __init__(self):
        super().__init__()
        self.shared, self.w, self.position = (nn.Embedding(n, 8) for n in (40, 24, 16))
        self.layers = nn.ModuleList([Block(), Block()])
        self.unembed = nn.Linear(8, 40, bias=False)
        self.unembed.weight = self.shared.weight
        self.bag = nn.EmbeddingBag(12, 8)


EMBEDDINGS = ["shared.weight", "w.weight", "position.weight", "bag.weight"]


def test_embeddings_and_what_is_tied_to_them_are_known_by_their_type():
    optimizer = Shampoo(param_groups(Renamed()))
    assert optimizer.matrices_left_to_grafting() == EMBEDDINGS
    # In groups that are made of ours, added later, and in names that wrappers have changed.
    model = nn.ModuleDict({"_orig_mod": Renamed()})
    group, others = param_groups(model)
    halves = [{"params": [pair for pair in others["params"] if "w." in pair[0]]}, group]
    optimizer = Shampoo(halves)
    left = [pair for pair in others["params"] if "w." not in pair[0]]
    optimizer.add_param_group({"params": iter(left)})
    assert sorted(optimizer.matrices_left_to_grafting()) == sorted(EMBEDDINGS)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["default", "v_proj"], ["layers.0.v_proj.weight", "layers.1.v_proj.weight", *EMBEDDINGS]),
        (["^shared"], ["shared.weight"]),
        ([], []),
    ],
)
def test_an_expression_beside_the_default_adds_to_it_and_alone_it_takes_its_place(exclude, left):
    optimizer = Shampoo(param_groups(Renamed()), exclude=exclude)
    assert optimizer.matrices_left_to_grafting() == left


@pytest.mark.filterwarnings("ignore:.*preconditioned, but by")
def test_a_checkpoint_in_which_such_an_embedding_was_preconditioned_is_told_apart():
    model = Renamed()
    before = Shampoo(model.named_parameters())  # by name there are none
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before.step()
    saved = before.state_dict()
    said = r"'shared\.weight' is preconditioned in the checkpoint, .*'exclude' \(.*by type\)"
    with pytest.raises(ValueError, match=said):
        Shampoo(param_groups(model)).load_state_dict(saved)
    rebuilt = Shampoo(param_groups(model), on_mismatch="rebuild")
    rebuilt.load_state_dict(saved)
    assert rebuilt.state[model.shared.weight]["exp_avg"].any()
    as_it_was = Shampoo(param_groups(model), exclude=[])
    as_it_was.load_state_dict(saved)
    assert as_it_was.matrices_left_to_grafting() == []


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 4, "hidden_size": 8},
        {"text_config": SimpleNamespace(num_attention_heads=4, hidden_size=8)},
    ],
)
def test_heads_are_found_from_the_config(config):
    model = Model()
    model.config = SimpleNamespace(**config)
    settings = head_settings(model)
    assert settings == {"split_heads": [r"(^|\.)q_proj\.", r"(^|\.)v_proj\."], "head_dim": 2}
    optimizer = Shampoo(param_groups(model), exclude=["words"], **settings)
    # Four heads and two, and `down`.
    assert optimizer.summary()["blocks"] == 7


@pytest.mark.parametrize("model", [Model(), nn.Linear(2, 2)])
def test_where_there_are_no_heads_it_says_so(model):
    with pytest.raises(ValueError, match=r"has no linear layer named q_proj.* or its config"):
        head_settings(model)
