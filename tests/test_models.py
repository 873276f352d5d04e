"""The layouts of the tiny Llama: the same values everywhere, and TorchTitan's placements."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests.models import (
    LAYOUTS,
    TinyLlama,
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
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_4_ranks(layout: str) -> None:
    check_layout(layout)


@ranks(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_2_ranks(layout: str) -> None:
    check_layout(layout)


@ranks(3)
def test_fsdp_with_uneven_and_empty_shards() -> None:
    check_layout("fsdp", dim=4, hidden=7, vocab=5)


@ranks(4)
def test_placements_are_those_of_torchtitan() -> None:
    parameters = dict(build("tp_fsdp").model.named_parameters())

    def placements(name: str) -> tuple[Placement, ...]:
        p = parameters[name]
        assert isinstance(p, DTensor)
        return tuple(p.placements)

    column_wise = (_StridedShard(0, split_factor=2), Shard(0))
    assert placements("layers.0.attention.wq.weight") == column_wise
    assert placements("layers.1.feed_forward.w1.weight") == column_wise
    assert placements("layers.0.attention.wo.weight") == (Shard(0), Shard(1))
    assert placements("layers.1.feed_forward.w2.weight") == (Shard(0), Shard(1))
    assert placements("tok_embeddings.weight") == column_wise
    assert placements("output.weight") == column_wise
    assert placements("layers.0.attention_norm.weight") == (Shard(0), Replicate())
    assert placements("norm.weight") == (Shard(0), Replicate())


@ranks(4)
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(2), Replicate()])
def test_gradients_of_experts(placement: Placement) -> None:
    mesh = init_device_mesh("cpu", (4,))
    shapes = {"experts": (2, 5, 6)}  # Shard(0): ranks 2 and 3 are empty
    gradients = deterministic_gradients(shapes, step=0)
    p = distribute_tensor(torch.zeros(shapes["experts"]), mesh, [placement])
    set_gradients({"experts": p}, gradients)
    assert isinstance(p.grad, DTensor)
    assert torch.equal(whole(p.grad), gradients["experts"])


def test_names_are_those_of_torchtitan() -> None:
    names = {name for name, _ in TinyLlama(n_layers=1).named_parameters()}
    block = {"attention.wq", "attention.wk", "attention.wv", "attention.wo"}
    block |= {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
    block |= {"attention_norm", "ffn_norm"}
    assert names == {f"layers.0.{name}.weight" for name in block} | {
        "tok_embeddings.weight",
        "norm.weight",
        "output.weight",
    }


def test_gradients_depend_on_name_and_step() -> None:
    shapes = {"a": (8, 12), "b": (8, 12), "vector": (5,), "scalar": ()}
    one, again, two = (deterministic_gradients(shapes, step=s) for s in (1, 1, 2))
    for name, shape in shapes.items():
        assert one[name].shape == shape
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], two[name])
    assert not torch.equal(one["a"], one["b"])


def test_missing_gradients_are_none() -> None:
    model, _ = build("single")
    set_gradients(model, deterministic_gradients(model, step=0))
    set_gradients(model, {"norm.weight": torch.ones(24)})
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == ["norm.weight"]
