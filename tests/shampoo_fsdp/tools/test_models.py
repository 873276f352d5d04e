"""The built-in shapes are those of the models they are named after."""

import math

import pytest

from shampoo_fsdp.tools.models import MODELS, model_specs


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama3-8b", 8.03), ("llama3-70b", 70.55), ("llama3-405b", 405.9), ("deepseek-v3-like", 671)],
)
def test_models_have_the_parameters_that_they_are_known_for(model, billions):
    elements = sum(math.prod(spec.shape) for spec in model_specs(model, {}))
    assert elements == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_lives_on_all_ranks(model):
    for mesh in ({"dp_shard": 4}, {"dp_replicate": 2, "dp_shard": 3, "tp": 2}):
        for spec in model_specs(model, mesh):
            assert sorted(spec.ranks) == list(range(math.prod(mesh.values())))
            assert math.prod(spec.mesh_shape) == len(spec.ranks)


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        ("llama3-9b", {}, r"'llama3-9b'.*llama3-8b"),
        ("llama3-8b", {"fsdp": 2}, r"'fsdp'.*dp_shard"),
        ("llama3-8b", {"tp": 0}, "'tp' of 0"),
        ("llama3-8b", {"dp_shard": 2, "ep": 2}, "the 0 experts of llama3-8b"),
        ("deepseek-v3-like", {"dp_shard": 4, "ep": 8}, r"ep = 8 must divide dp_shard \* tp = 4"),
    ],
)
def test_a_mesh_or_model_that_cannot_be_is_named(model, mesh, message):
    with pytest.raises(ValueError, match=message):
        model_specs(model, mesh)
