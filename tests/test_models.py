"""The layouts of the tiny Llama: the same values everywhere, and TorchTitan's placements."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tests.models import (
    LAYOUTS,
    build,
    deterministic_gradients,
    full_parameters,
    local_part,
    set_gradients,
    whole,
)
from tests.ranks import ranks


def check_layout(layout: str, dim: int = 24, hidden: int = 52, vocab: int = 40) -> None:
    """Parameters and gradients of the layout are those of the plain model."""
    model, _ = build(layout, dim=dim, hidden=hidden, vocab=vocab)
    expected = full_parameters(build("single", dim=dim, hidden=hidden, vocab=vocab).model)
    gradients = deterministic_gradients(model, step=3)
    set_gradients(model, gradients)
    for name, p in model.named_parameters():
        assert p.grad is not None
        # Shards first: gathering inverts the placements whether or not they mean what p holds.
        if isinstance(p, DTensor):
            assert isinstance(p.grad, DTensor)
            assert p.grad.placements == p.placements
            assert torch.equal(p.to_local(), local_part(expected[name], p)), name
            assert torch.equal(p.grad.to_local(), local_part(gradients[name], p)), name
        assert torch.equal(whole(p.grad), gradients[name]), name
        assert torch.equal(whole(p), expected[name]), name


@ranks(4)
def test_layouts_and_placements_are_those_of_torchtitan() -> None:
    for layout in LAYOUTS:
        check_layout(layout)
    parameters = dict(build("tp_fsdp").model.named_parameters())
    column_wise = (_StridedShard(0, split_factor=2), Shard(0))
    expected: dict[str, tuple[Placement, ...]] = {
        "layers.0.attention.wq.weight": column_wise,
        "layers.0.attention.wo.weight": (Shard(0), Shard(1)),
        "tok_embeddings.weight": column_wise,
        "output.weight": column_wise,
        "norm.weight": (Shard(0), Replicate()),
    }
    for name, placements in expected.items():
        p = parameters[name]
        assert isinstance(p, DTensor) and tuple(p.placements) == placements, name


@ranks(3)
def test_fsdp_with_uneven_and_empty_shards() -> None:
    check_layout("fsdp", dim=4, hidden=7, vocab=5)


def test_gradients_depend_on_name_and_step() -> None:
    shapes = {"a": (8, 12), "b": (8, 12), "vector": (5,), "scalar": ()}
    one, again, two = (deterministic_gradients(shapes, step=s) for s in (1, 1, 2))
    for name, shape in shapes.items():
        assert one[name].shape == shape
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], two[name])
    assert not torch.equal(one["a"], one["b"])
    with pytest.raises(ValueError, match=r"a: a gradient of \(8, 12\)"):
        set_gradients({"a": torch.zeros(2)}, one)
