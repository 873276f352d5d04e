"""The optimizer's state in the hands of others: moved, and replaced."""

import weakref
from collections import Counter, defaultdict
from typing import ClassVar

import pytest
import torch

from tests.models import SMALL, train, with_shampoo

OPTIONS = {"lr": 1e-2, "max_preconditioner_dim": 8, "precondition_frequency": 2}


def built(**options):
    (model, _), optimizer = with_shampoo("single", SMALL, **OPTIONS | options)
    return model, optimizer


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def weights_after(steps, **options):
    model, optimizer = built(**options)
    train(model, optimizer, range(steps))
    return weights(model)


def move(optimizer):
    """As veRL, OpenRLHF and many a loop."""
    for entries in optimizer.state.values():
        for name, value in entries.items():
            if torch.is_tensor(value):
                entries[name] = value.clone()


def move_as_lightning(optimizer):
    for parameter, entries in optimizer.state.items():
        moved = {name: value.to("cpu", copy=True) for name, value in entries.items()}
        optimizer.state[parameter] = moved


def numbers(optimizer):
    """Steps as Python's numbers."""
    for entries in optimizer.state.values():
        entries["step"] = int(entries["step"])


@pytest.mark.parametrize("others", [move, move_as_lightning, numbers])
@pytest.mark.parametrize("grafting", ["adam", "rmsprop"])
def test_it_goes_on_with_state_that_others_put_back(others, grafting):
    model, optimizer = built(grafting=grafting)
    train(model, optimizer, range(3))
    others(optimizer)
    train(model, optimizer, range(3, 4))
    others(optimizer)
    others(optimizer)
    train(model, optimizer, range(4, 6))
    assert all(map(torch.equal, weights(model), weights_after(6, grafting=grafting)))


def memory_of(optimizer):
    stacks = [stack for bucket in optimizer._parameters.buckets for stack in bucket.stacks]
    return [weakref.ref(tensor) for stack in stacks for tensor in stack.saved.values()]


def test_state_that_was_moved_away_frees_its_memory():
    model, optimizer = built()
    train(model, optimizer, range(2))
    memory = memory_of(optimizer)
    held = [dict(entries) for entries in optimizer.state.values()]  # and so has the memory
    move(optimizer)
    assert memory and not [tensor for tensor in memory if tensor() is None]
    del held
    assert not [tensor for tensor in memory if tensor() is not None]


@pytest.mark.parametrize("how", ["dict", "defaultdict", "clear"])
def test_state_that_is_thrown_away_starts_anew(how):
    model, optimizer = built()
    train(model, optimizer, range(3))
    other_model, other = built()
    other_model.load_state_dict(model.state_dict())
    if how == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict) if how == "defaultdict" else {}
    train(model, optimizer, range(3, 6))
    assert {float(entries["step"]) for entries in optimizer.state_dict()["state"].values()} == {3.0}

    train(other_model, other, range(3, 6))
    assert all(map(torch.equal, weights(model), weights(other_model)))


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (lambda state: state.pop("exp_avg"), "'exp_avg' .*'tok_embeddings.weight' is missing"),
        (lambda state: state.update(exp_avg=torch.ones(3)), r"is shape \(3,\), but .*\(16, 12\)"),
        (lambda state: state.update(step="many"), "'step' .* is 'many'"),
        (lambda state: state.update(exp_avg=None), "'exp_avg' .* is None"),
    ],
)
@pytest.mark.parametrize(("excluded", "moved"), [(True, False), (False, True)])
def test_what_cannot_be_used_is_named_and_changes_nothing(put, said, excluded, moved):
    exclude = ["tok_embeddings" if excluded else "output"]
    model, optimizer = built(exclude=exclude)
    train(model, optimizer, range(2))
    before = weights(model)
    if moved:  # and nothing is left of the memory of before
        move(optimizer)
    entries = optimizer.state[model.tok_embeddings.weight]
    kept = dict(entries)
    put(entries)
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            train(model, optimizer, range(2, 3))
        with pytest.raises(ValueError, match=said):
            optimizer.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, weights(model), before))
    entries.update(kept)
    del kept
    train(model, optimizer, range(2, 4))
    assert all(map(torch.equal, weights(model), weights_after(4, exclude=exclude)))


class Elsewhere(torch.Tensor):
    """Counts how often it is read, as a tensor on a GPU makes the host wait."""

    reads: ClassVar = Counter()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        reads = ("copy_", "item", "tolist", "__int__", "__float__", "__bool__", "cpu")
        if name in reads and args[0].device.type != "meta":
            cls.reads[name] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_the_host_reads_counters_that_were_moved_once():
    model, optimizer = built()
    train(model, optimizer, range(2))
    counters = 0
    for entries in optimizer.state.values():
        for name in entries.keys() & {"step", "factor_step", "refreshed"}:
            entries[name] = entries[name].clone().as_subclass(Elsewhere)
            counters += 1
    Elsewhere.reads.clear()
    train(model, optimizer, range(2, 5))
    assert Elsewhere.reads == {"copy_": counters}
