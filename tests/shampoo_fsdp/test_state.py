"""The optimizer's state in the hands of others: moved, replaced, read into and left half read."""

import weakref
from collections import Counter, defaultdict
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shampoo_fsdp import Shampoo
from tests.models import TinyLlama, deterministic_gradients, set_gradients

OPTIONS = {"lr": 1e-2, "max_preconditioner_dim": 8, "precondition_frequency": 2}


def built(**options):
    torch.manual_seed(0)
    model = TinyLlama(dim=12, hidden=20, vocab=16, n_layers=2)
    return model, Shampoo(model.named_parameters(), **OPTIONS | options)


def train(model, optimizer, steps):
    for step in steps:
        set_gradients(model, deterministic_gradients(model, step))
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def move(optimizer, to=torch.Tensor.clone):
    """As veRL, OpenRLHF and many a loop; `to` gives a tensor on another device."""
    for entries in optimizer.state.values():
        for name, value in entries.items():
            if torch.is_tensor(value):
                entries[name] = to(value)


def to_a_device(value):
    return value.to("cpu", copy=True)


def move_as_lightning(optimizer, to=to_a_device):
    for parameter, entries in optimizer.state.items():
        optimizer.state[parameter] = {name: to(value) for name, value in entries.items()}


def numbers(optimizer):
    """Steps as Python's numbers."""
    for entries in optimizer.state.values():
        entries["step"] = int(entries["step"])


@pytest.mark.parametrize("others", [move, move_as_lightning, numbers])
@pytest.mark.parametrize("grafting", ["adam", "rmsprop"])
def test_it_goes_on_with_state_that_others_put_back(others, grafting):
    model, optimizer = built(grafting=grafting)
    train(model, optimizer, range(6))
    expected = weights(model)

    model, optimizer = built(grafting=grafting)
    train(model, optimizer, range(3))
    others(optimizer)
    train(model, optimizer, range(3, 4))
    others(optimizer)
    others(optimizer)
    train(model, optimizer, range(4, 6))
    assert all(map(torch.equal, weights(model), expected))


@pytest.mark.parametrize("load", [False, True])
def test_what_was_put_there_is_saved_and_loaded(load):
    model, optimizer = built()
    train(model, optimizer, range(3))
    move(optimizer, lambda value: value.clone() + 1.0)
    saved = {
        p: {name: value + 0.0 for name, value in optimizer.state_dict()["state"][k].items()}
        for k, p in enumerate(model.parameters())
    }
    if load:
        state_dict = optimizer.state_dict()
        move(optimizer)
        optimizer.load_state_dict(state_dict)
    else:
        with torch.no_grad():
            optimizer._ready().state.take_back(optimizer._state)
    for parameter, entries in saved.items():
        for name, value in entries.items():
            assert torch.equal(optimizer.state[parameter][name] + 0.0, value), name


def memory_of(optimizer):
    stacks = [owned.stack for bucket in optimizer._parameters.buckets for owned in bucket.stacks]
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
    train(model, optimizer, range(2, 4))
    expected_model, expected = built()
    train(expected_model, expected, range(4))
    assert all(map(torch.equal, weights(model), weights(expected_model)))


@pytest.mark.parametrize("how", ["dict", "defaultdict", "clear"])
def test_state_that_is_thrown_away_starts_anew(how):
    model, optimizer = built()
    train(model, optimizer, range(3))
    start = weights(model)
    if how == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict) if how == "defaultdict" else {}
    train(model, optimizer, range(3, 6))
    assert {float(entries["step"]) for entries in optimizer.state_dict()["state"].values()} == {3.0}

    other_model, other = built()
    with torch.no_grad():
        for parameter, value in zip(other_model.parameters(), start, strict=True):
            parameter.copy_(value)
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
    model, optimizer = built(exclude=["tok_embeddings" if excluded else "output"])
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
    expected_model, expected = built(exclude=["tok_embeddings" if excluded else "output"])
    train(expected_model, expected, range(4))
    assert all(map(torch.equal, weights(model), weights(expected_model)))


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
    for entries in optimizer.state.values():
        for name in entries.keys() & {"step", "factor_step", "refreshed"}:
            entries[name] = entries[name].clone().as_subclass(Elsewhere)
    counters = sum(map(len, (entries.keys() & {"step", "factor_step", "refreshed"}
                             for entries in optimizer.state.values())))  # fmt: skip
    Elsewhere.reads.clear()
    train(model, optimizer, range(2, 5))
    assert Elsewhere.reads == {"copy_": counters}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three steps."""
    model, optimizer = built()
    train(model, optimizer, range(3))
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)
    return tmp_path


def tear(folder, keep):
    for file in folder.glob("*.distcp"):
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content))])


@pytest.mark.parametrize(
    ("steps", "moved", "keep"), [(0, False, 0.5), (2, False, 0.0), (2, True, 0.5)]
)
def test_no_step_is_taken_with_half_of_a_checkpoint(folder, steps, moved, keep):
    model, optimizer = built()
    train(model, optimizer, range(steps))
    if moved:
        move(optimizer)
    whole = {file: file.read_bytes() for file in folder.glob("*.distcp")}
    tear(folder, keep)
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load({"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    before = weights(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a checkpoint was read.*load another checkpoint"):
            train(model, optimizer, range(2, 3))
    assert all(map(torch.equal, weights(model), before))
    with pytest.raises(dcp.api.CheckpointException, match="a checkpoint was read"):
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder / "half")
    with pytest.raises(RuntimeError, match="a checkpoint was read"):
        torch.save(optimizer.state_dict(), folder / "half.pt")
    with pytest.raises(RuntimeError, match="a checkpoint was read"):
        optimizer.consolidate_state_dict()

    for file, content in whole.items():
        file.write_bytes(content)
    state = {"optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, range(3, 5))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
