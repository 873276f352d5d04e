"""Expressions for names that miss what they are meant for are told, once."""

import warnings

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.runtime.choice import what_names_miss
from tests.ranks import run_ranks

SIZES = {"q": (8, 8), "up": (16, 8)}
LAYERS = {f"layers.{i}.{name}.weight": size for i in range(2) for name, size in SIZES.items()}


def told(shapes, embeddings=None, **settings):
    return list(what_names_miss(shapes, [], embeddings or {}, ShampooConfig(**settings)))


def doubted(shapes, embeddings=None, **settings):
    said = told(shapes, embeddings, **settings)
    assert len(said) <= 1
    return [name for name in shapes if said and f"'{name}'" in said[0].partition(":")[0]]


def test_by_names_alone_what_is_first_or_tall_or_last_is_doubted(name="token.weight"):
    assert doubted({name: (20, 8), **LAYERS}) == [name]
    assert doubted({"tok_embeddings.weight": (20, 8), name: (65, 8), **LAYERS}) == [name]
    assert doubted({**LAYERS, "norm.weight": (8,), name: (20, 8)}) == [name]
    assert doubted({name: (65, 8), "proj.weight": (8, 8)}) == [name]


@pytest.mark.parametrize(
    "shapes",
    [
        {"tok_embeddings.weight": (20, 8), **LAYERS, "output.weight": (20, 8)},
        LAYERS,  # a stage of a pipeline
        {"conv1.weight": (8, 3, 7, 7), "layer1.0.conv.weight": (8, 8, 3, 3), "fc.bias": (8,)},
        {"fc1.weight": (32, 16), "fc2.weight": (16, 32), "fc2.bias": (16,)},
        {"0.weight": (32, 16), "2.weight": (160, 32), "4.weight": (1, 160)},
        {"layers.0.q.lora_A.weight": (2, 64), "layers.0.q.lora_B.weight": (64, 2)},
    ],
)
def test_ordinary_models_are_not(shapes):
    assert told(shapes) == []


def test_where_types_are_known_doubt_is_of_a_last_matrix_with_the_rows_of_an_embedding():
    shapes = {"token.weight": (20, 8), "fc.weight": (65, 4), "first.up.weight": (20, 8), **LAYERS}
    shapes["unembed.weight"] = (20, 8)
    embeddings = {name: name == "token.weight" for name in shapes}
    assert doubted(shapes, embeddings, exclude=["default", "^token"]) == ["unembed.weight"]
    assert doubted(shapes, embeddings, exclude=["unembed"]) == ["token.weight"]
    assert doubted(shapes, embeddings, exclude=[]) == []


@pytest.mark.parametrize(
    ("exclude", "said"),
    [
        (["default", "^token"], "'exclude' has '^token', which the name of no parameter matches"),
        (["layers"], "'exclude' matches every matrix (4): none is preconditioned"),
        (["default", r"\.q\."], ""),
    ],
)
def test_what_matches_nothing_or_everything(exclude, said):
    assert [message.partition(said)[1] for message in told(LAYERS, exclude=exclude)] == (
        [said] if said else []
    )


def test_where_there_are_no_matrices_it_is_said():
    (said,) = told({"flat": (4096,), "norm.weight": (8,)}, grafting="rmsprop")
    assert "none of 2 parameters is a matrix ('flat', 'norm.weight')" in said and "rmsprop" in said
    assert told({"flat": (4096,)}, precondition_1d=True) == told({}) == []


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


def warned() -> list[str]:
    model = Renamed()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Shampoo(model.named_parameters(), exclude=["default", "nothing"])
    return [str(one.message) for one in caught]


def test_the_first_of_the_ranks_says_it_and_no_other():
    first, second = run_ranks(2, warned)
    assert len(first) == 2 and second == []
    assert "'nothing'" in first[0] and "'token.weight': preconditioned, but" in first[1]
