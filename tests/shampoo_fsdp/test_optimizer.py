"""Shampoo in one process, as a torch.optim.Optimizer."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from shampoo_fsdp import Shampoo
from tests.models import SMALL, deterministic_gradients, set_gradients, train, with_shampoo


def test_a_closure_is_evaluated_with_gradients():
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = Shampoo([("w", weight)], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_state_and_update_do_not_depend_on_the_default_type_or_autocast():
    def weights_after_steps() -> list[Tensor]:
        (model, _), optimizer = with_shampoo(
            "single", SMALL, lr=1e-2, precondition_frequency=2, exclude=["norm"]
        )
        train(model, optimizer, range(6))
        return list(model.parameters())

    expected = weights_after_steps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, weights_after_steps(), expected))
    parameter = nn.Parameter(torch.randn(6, 6))
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = Shampoo([("w", parameter)], precondition_frequency=2)
        for _ in range(4):
            parameter.grad = torch.randn(6, 6, dtype=torch.float32)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    entries = optimizer.state_dict()["state"][0].values()
    assert {value.dtype for value in entries} == {torch.float32}
    assert parameter.isfinite().all()


def test_gradients_stay_as_they_are():
    (model, _), optimizer = with_shampoo("single", SMALL)
    gradients = deterministic_gradients(model, 0)
    gradients["tok_embeddings.weight"][0, 0] = torch.nan
    gradients["layers.0.attention.wq.weight"][0, 0] = torch.inf
    set_gradients(model, gradients)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=0, equal_nan=True)


def test_a_later_start_at_resume_keeps_the_roots_there_are():
    rare = {"precondition_frequency": 100}
    (model, _), optimizer = with_shampoo("single", SMALL, start_preconditioning_step=2, **rare)
    (other, _), later = with_shampoo("single", SMALL, start_preconditioning_step=50, **rare)
    train(model, optimizer, range(5))
    other.load_state_dict(model.state_dict())
    later.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(5, 7))
    train(other, later, range(5, 7))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("dim", [8, 64])
def test_state_answers_as_tensors_do(dim):
    (model, _), optimizer = with_shampoo("single", SMALL, max_preconditioner_dim=dim)
    train(model, optimizer, range(1))
    weight = model.layers["0"].attention.wq.weight
    momentum = optimizer.state[weight]["exp_avg"]
    expected = weight.grad * 0.1
    torch.testing.assert_close(momentum.clone() + 0.0, expected)
    torch.testing.assert_close(momentum.norm(), expected.norm())
    torch.testing.assert_close(momentum.to(torch.float64) + 0.0, expected.double())
    momentum.mul_(2.0)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"] + 0.0, 2.0 * expected)
    momentum[0] = 0.0
    assert not optimizer.state_dict()["state"][1]["exp_avg"][0].any()
    momentum.zero_()
    assert not momentum.any()


def test_a_copy_of_a_state_dict_is_a_snapshot():
    (model, _), optimizer = with_shampoo("single", SMALL, max_preconditioner_dim=8)
    train(model, optimizer, range(1))
    snapshot = copy.deepcopy(optimizer.state_dict())
    before = {n: v + 0.0 for n, v in snapshot["state"][1].items()}
    train(model, optimizer, range(1, 3))
    assert all(torch.equal(v + 0.0, before[n]) for n, v in snapshot["state"][1].items())
    optimizer.load_state_dict(snapshot)
    state = optimizer.state[model.layers["0"].attention.wq.weight]
    assert all(torch.equal(v + 0.0, before[n]) for n, v in state.items())


def test_what_others_put_into_the_state_is_carried_through():
    (model, _), optimizer = with_shampoo("single", SMALL)
    weight = model.layers["0"].attention.wq.weight
    optimizer.state[weight] |= {"ema": torch.ones(3), "seen": 5, "tags": {"a": [1]}}
    optimizer.state["mine"] = 7
    saved = copy.deepcopy(optimizer.state_dict())
    again = Shampoo(model.named_parameters())
    again.load_state_dict(saved)
    state = again.state[weight]
    assert torch.equal(state["ema"], torch.ones(3)) and state["seen"] == 5
    assert again.state["mine"] == 7
    assert state["tags"] == {"a": [1]} and state["tags"] is not saved["state"][1]["tags"]
    train(model, again, range(1))


def test_a_group_with_its_own_lr_can_be_added_until_there_is_something_to_lose():
    a, b, c = (nn.Parameter(torch.eye(2)) for _ in range(3))
    optimizer = Shampoo([("a", a)], lr=0.0)
    assert set(optimizer.state) == {a}
    optimizer.add_param_group({"params": [("b", b)], "lr": 1e-2})
    for parameter in (a, b):
        parameter.grad = torch.ones(2, 2)
    optimizer.step()
    assert set(optimizer.state) == {a, b}
    assert torch.equal(a, torch.eye(2)) and not torch.equal(b, torch.eye(2))
    with pytest.raises(RuntimeError, match=r"after a step.*Build another one"):
        optimizer.add_param_group({"params": [("c", c)]})
    assert len(optimizer.param_groups) == 2


# ---------------------------------------------------------------------------- bad parameters

WEIGHT = nn.Parameter(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        ([("w", nn.Parameter(torch.zeros(2, dtype=torch.cfloat)))], {}, r"'w' .*complex64"),
        ([("w", WEIGHT), ("w", WEIGHT)], {}, "'w' is there twice"),
        ([("a", WEIGHT), ("b", WEIGHT)], {}, r"'b' is 'a' as well \(tied\)"),
        ([], {}, "empty parameter list"),
        ([{"lr": 1.0}], {}, "the key 'params'"),
        ({WEIGHT}, {}, "ordered collections"),
        (WEIGHT, {}, "non-leaf Tensor"),
        ([{"params": [], "max_preconditioner_dim": 2}], {}, "give it to Shampoo"),
        ([WEIGHT], {"replicas": 2}, r"replicas is 2; allowed: a process group"),
    ],
)
def test_what_cannot_be_trained(params, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Shampoo(params, **settings)


@pytest.mark.parametrize("from_step", [0, 1])
@pytest.mark.parametrize("settings", [{"weight_decay_type": "l2"}, {"exclude": ["conv"]}])
def test_channels_last_is_as_good_as_another(from_step, settings):
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(8, 6, 3, 3, generator=generator))
        optimizer = Shampoo([("conv", weight)], lr=0.1, **settings)
        for step in range(3):
            if step == from_step:
                weight.data = weight.data.to(memory_format=memory_format)
            weight.grad = torch.randn(8, 6, 3, 3, generator=generator)
            optimizer.step()
        assert weight.is_contiguous(memory_format=memory_format)
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("before", [True, False], ids=["before the first step", "later"])
def test_unfrozen(before):
    weight, other = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    weight.requires_grad_(False)
    optimizer = Shampoo([("w", weight), ("v", other)])
    weight.requires_grad_(before)
    weight.grad = other.grad = torch.ones(2, 2)
    refused = pytest.raises(ValueError, match="'w' has a gradient but did not require one")
    with nullcontext() if before else refused:
        optimizer.step()
    assert weight.any() == before and (not before or torch.equal(weight, other))


def test_no_gradient_at_all():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = Shampoo([("w", weight)])
    with pytest.raises(RuntimeError, match=r"built before fully_shard\(\)"):
        optimizer.step()
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    weight.grad = None
    optimizer.step()  # later it may be meant


def test_sparse_gradients_change_nothing():
    embedding = nn.Embedding(10, 4, sparse=True)
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([("w", weight), ("tokens", embedding.weight)])
    weight.grad = torch.ones(4, 4)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"'tokens' is torch.sparse.* sparse=False"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(4, 4))
