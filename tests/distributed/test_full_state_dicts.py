"""Whole tensors on rank 0 from state that is spread over ranks, and back onto any mesh."""

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
from tests.models import train, with_shampoo
from tests.ranks import ranks

OPTIONS = {"lr": 5e-3, "lr_factor": 2.0, "max_preconditioner_dim": 8, "precondition_frequency": 3}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def optimizer_on(layout, **options):
    built, optimizer = with_shampoo(layout, **OPTIONS | options)
    return built.model, optimizer


def plain(value):
    return value.full_tensor() if isinstance(value, DTensor) else value + 0


@ranks(2)
def test_rank_0_gets_whole_tensors(tmp_path):
    """By PyTorch or from the optimizer, whose next state dict alone has them. (What comes of them
    on any mesh: test_fuzz.)"""
    rank, file = dist.get_rank(), tmp_path / "optimizer.pt"
    for layout in ("ddp", "fsdp"):
        model, optimizer = optimizer_on(layout)
        train(model, optimizer, range(4))
        states = [optimizer.state[p].items() for p in model.parameters()]
        expected = [{entry: plain(value) for entry, value in state} for state in states]
        if rank == 0:
            with pytest.raises(TypeError, match=r"\(\) on all ranks .* or save with torch\.dist"):
                torch.save(optimizer.state_dict(), file)
        optimizer.consolidate_state_dict(to=1)
        optimizer.consolidate_state_dict()  # nothing is left of the one before
        if rank == 0:
            torch.save(optimizer.state_dict(), file)
        by_torch = get_optimizer_state_dict(model, optimizer, options=WHOLE)
        if rank == 0:
            for found in (torch.load(file, weights_only=True), by_torch):
                found = [*found["state"].values()]
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
        else:
            assert not by_torch
        # Of the next state dict alone, and of no later step.
        weight = model.layers["0"].attention.wq.weight
        index = [id(p) for p in optimizer.param_groups[0]["params"]].index(id(weight))
        for again in (False, True):
            if again:
                optimizer.consolidate_state_dict()
                train(model, optimizer, range(4, 5))
            assert isinstance(optimizer.state_dict()["state"][index]["factors"], DTensor)


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
