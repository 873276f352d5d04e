"""Whole tensors on rank 0 from state that is spread over ranks, and back onto any mesh."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import CheckpointMismatch, ShampooLoadPlanner
from tests.models import full_parameters, train, with_shampoo
from tests.ranks import ranks, run_ranks

OPTIONS = {"lr": 1e-2, "max_preconditioner_dim": 8, "precondition_frequency": 3}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def optimizer_on(layout, **options):
    built, optimizer = with_shampoo(layout, **OPTIONS | options)
    return built.model, optimizer


def plain(value):
    return value.full_tensor() if isinstance(value, DTensor) else value + 0


def whole_state_after_four_steps(layout, options):
    model, optimizer = optimizer_on(layout, **options)
    train(model, optimizer, range(4))
    # Pieces, put together by hand.
    expected = {}
    for name, parameter in model.named_parameters():
        expected[name] = {e: plain(v) for e, v in optimizer.state[parameter].items()}
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if dist.is_initialized() and dist.get_rank():
        assert not state
        return None
    for name, entries in expected.items():
        found = state["state"][name]
        assert found.keys() == entries.keys()
        for entry, value in entries.items():
            assert not isinstance(found[entry], DTensor), (name, entry)
            assert torch.equal(found[entry] + 0, value), (name, entry)
    tensors = {n: {e: v + 0 for e, v in es.items()} for n, es in state["state"].items()}
    return {"state": tensors, "param_groups": state["param_groups"]}


def goes_on_as_the_original(layout, state, options, expected):
    """Args:
    state: a full state dict, or the file of what one rank has saved alone.
    """
    model, optimizer = optimizer_on(layout, **options)
    train(model, optimizer, range(4))  # for the weights
    replicas = dist.group.WORLD if layout == "ddp" else None
    other = Shampoo(model.named_parameters(), replicas=replicas, **OPTIONS | options)
    names = [name for name, _ in model.named_parameters()]
    if isinstance(state, Path):
        state = torch.load(state, weights_only=True)
        other.load_state_dict(state)
        names = [*range(len(names))]
    elif layout == "single":
        set_optimizer_state_dict(model, other, state)
    else:
        given = state if dist.get_rank() == 0 else {}
        spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, other, given, options=spread)
    for name, parameter in zip(names, model.parameters(), strict=True):
        for entry, value in other.state[parameter].items():
            assert torch.equal(plain(value), state["state"][name][entry]), (name, entry)
    train(model, other, range(4, 7))
    for name, value in full_parameters(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def alone_after_seven_steps(options):
    model, optimizer = optimizer_on("single", **options)
    train(model, optimizer, range(7))
    return full_parameters(model)


IN_BF16 = dict.fromkeys(("factor_dtype", "root_dtype", "momentum_dtype"), "bfloat16")
SMALL = {"preconditioner": "shampoo", "symmetric_packing": True, **IN_BF16}
MOVES = [("fsdp", "hsdp", SMALL), ("hsdp", "tp_fsdp", {}), ("tp_fsdp", "ddp", {})]


def moves_on_four_ranks(alone, expected):
    """Args:
    alone: the state of one process; expected: what it comes to.

    Returns:
        the last state, in other settings, on rank 0.
    """
    for source, target, options in MOVES:
        state = [whole_state_after_four_steps(source, options)]
        dist.broadcast_object_list(state)
        goes_on_as_the_original(target, state[0], options, expected[bool(options)])
    goes_on_as_the_original("fsdp", alone, {}, expected[False])
    return whole_state_after_four_steps("ddp", SMALL)


def test_a_full_state_dict_moves_between_meshes():
    expected = [alone_after_seven_steps(options) for options in ({}, SMALL)]
    given = {"alone": whole_state_after_four_steps("single", {}), "expected": expected}
    last = run_ranks(4, moves_on_four_ranks, **given)[0]
    goes_on_as_the_original("single", last, SMALL, expected[True])


def rank_0_saves_alone(layout, file):
    model, optimizer = optimizer_on(layout)
    train(model, optimizer, range(4))
    rank = dist.get_rank()
    if rank == 0:
        with pytest.raises(TypeError, match=r"\(\) on all ranks .* or save with torch\.dist"):
            torch.save(optimizer.state_dict(), file)
    optimizer.consolidate_state_dict(to=1)
    optimizer.consolidate_state_dict()  # nothing is left of the one before
    if rank == 0:
        torch.save(optimizer.state_dict(), file)
    # Of the next state dict alone, and of no later step.
    weight = model.layers["0"].attention.wq.weight
    index = [id(p) for p in optimizer.param_groups[0]["params"]].index(id(weight))
    for again in (False, True):
        if again:
            optimizer.consolidate_state_dict()
            train(model, optimizer, range(4, 5))
        assert isinstance(optimizer.state_dict()["state"][index]["factors"], DTensor)


@pytest.mark.parametrize(("source", "n", "target"), [("ddp", 2, "fsdp"), ("fsdp", 4, "ddp")])
def test_what_rank_0_saves_alone_goes_on_anywhere(source, n, target, tmp_path):
    file = tmp_path / "optimizer.pt"
    run_ranks(2, rank_0_saves_alone, layout=source, file=file)
    given = {"state": file, "options": {}, "expected": alone_after_seven_steps({})}
    goes_on_as_the_original("single", **given)
    run_ranks(n, goes_on_as_the_original, layout=target, **given)


@ranks(2)
def test_replicas_that_share_no_work_need_no_other_rank_to_save(tmp_path):
    model, optimizer = optimizer_on("ddp", owner_scope="shard")
    train(model, optimizer, range(2))
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    dist.barrier()
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@ranks(2)
def test_a_part_that_one_rank_saved_alone_is_refused(tmp_path):
    model, optimizer = optimizer_on("fsdp")
    train(model, optimizer, range(2))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    blocks = {k: v for k, v in state.items() if "attention.wq" in k or "param_groups" in k}
    if dist.get_rank() == 0:
        dcp.save(blocks, checkpoint_id=tmp_path, no_dist=True)
    dist.barrier()
    with pytest.raises(dcp.api.CheckpointException) as error:
        dcp.load(blocks, checkpoint_id=tmp_path, planner=ShampooLoadPlanner())
    failures = [failure for failure, _ in error.value.failures.values()]
    assert all(isinstance(failure, CheckpointMismatch) for failure in failures)
    assert "attention.wq.weight" in str(failures[0]) and "no_dist" in str(failures[0])
    before = plain(optimizer.state[model.layers["0"].attention.wq.weight]["exp_avg"])
    assert before.isfinite().all()

    # The default planner does not look; then the optimizer does, on all ranks.
    dcp.load(blocks, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"attention\.wq\.weight.*not read completely"):
        set_optimizer_state_dict(model, optimizer, state, options=options)


@ranks(2)
def test_a_snapshot_of_sharded_state_can_be_restored():
    model, optimizer = optimizer_on("fsdp")
    train(model, optimizer, range(3))
    weight = model.layers["0"].attention.wq.weight
    with torch.no_grad():
        snapshot = {
            k: {e: v.detach().clone() for e, v in es.items()}
            for k, es in optimizer.state_dict()["state"].items()
        }
    before: Tensor = plain(optimizer.state[weight]["factors"])
    groups = optimizer.state_dict()["param_groups"]
    train(model, optimizer, range(3, 5))
    assert not torch.equal(plain(optimizer.state[weight]["factors"]), before)
    optimizer.load_state_dict({"state": snapshot, "param_groups": groups})
    assert torch.equal(plain(optimizer.state[weight]["factors"]), before)


@ranks(2)
def test_a_full_state_dict_of_other_settings_is_refused_on_all_ranks():
    model, optimizer = optimizer_on("fsdp")
    train(model, optimizer, range(2))
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for other in ({"preconditioner": "shampoo"}, {"max_preconditioner_dim": 16}):
        target = Shampoo(model.named_parameters(), **OPTIONS | other)
        with pytest.raises(ValueError, match="saved with other settings"):
            set_optimizer_state_dict(model, target, dict(state), options=options)
