"""Parameters that others put in the place of those that the optimizer was built with."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo_fsdp import Shampoo, param_groups
from tests.models import TinyLlama, deterministic_gradients, full_parameters, set_gradients, train
from tests.ranks import ranks

SMALL = {"dim": 12, "hidden": 20, "vocab": 16}


def model(sharded=False):
    torch.manual_seed(0)
    model = TinyLlama(**SMALL)
    model.token = model.tok_embeddings  # an embedding by its type alone
    del model.tok_embeddings
    if sharded:
        shard(model)
    return model


def shard(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def put_in(optimizer, model):
    """As Accelerate does it."""
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[name] for name in group["param_names"]]


@ranks(2)
def test_the_next_step_trains_the_new_ones():
    after = model(sharded=True)
    expected = Shampoo(param_groups(after), lr=1e-2)
    train(after, expected, range(4))

    before = model()
    optimizer = Shampoo(param_groups(before), lr=1e-2)
    shard(before)
    put_in(optimizer, before)
    train(before, optimizer, range(4))
    found = full_parameters(before)
    for name, value in full_parameters(after).items():
        assert torch.equal(found[name], value), name
    assert optimizer.summary() == expected.summary()
    assert "token.weight" in optimizer.matrices_left_to_grafting()


@ranks(2)
def test_state_is_not_made_for_a_whole_model_that_is_still_to_be_sharded():
    whole = model()
    optimizer = Shampoo(param_groups(whole), lr=1e-2)
    # Accelerate moves its state dict to the device and loads it again, before it shards the model.
    state_dict = optimizer.state_dict()
    assert state_dict["state"] == {}
    for group in state_dict["param_groups"]:
        group["lr"] = 2e-2
    optimizer.load_state_dict(state_dict)
    assert optimizer._built is None
    assert {group["lr"] for group in optimizer.param_groups} == {2e-2}
    shard(whole)
    put_in(optimizer, whole)
    # Without state torch would take a step to make some.
    saved = get_optimizer_state_dict(whole, optimizer)
    assert {float(state["step"]) for state in saved["state"].values()} == {0.0}
    assert set(saved["state"]) == {name for name, _ in whole.named_parameters()}
    train(whole, optimizer, range(1))
    assert optimizer.state_dict()["state"]


@ranks(2)
def test_state_of_steps_is_not_lost_in_silence():
    sharded = model(sharded=True)
    optimizer = Shampoo(param_groups(sharded), lr=1e-2)
    train(sharded, optimizer, range(1))
    other = model(sharded=True)
    put_in(optimizer, other)
    set_gradients(other, deterministic_gradients(other, 1))
    for use in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"no longer those.*load_state_dict\(\)"):
            use()


@ranks(2)
def test_a_rank_may_be_without_gradients():
    """All of them on the first step, or of one matrix later."""
    sharded = model(sharded=True)
    optimizer = Shampoo(param_groups(sharded), lr=1e-2, precondition_frequency=2)
    for step in range(4):
        set_gradients(sharded, deterministic_gradients(sharded, step))
        if dist.get_rank() == 1 and step == 0:
            sharded.zero_grad()
        if dist.get_rank() == 1 and step == 2:
            sharded.layers["0"].attention.wq.weight.grad = None
        optimizer.step()
    assert all(p.to_local().isfinite().all() for p in sharded.parameters())
