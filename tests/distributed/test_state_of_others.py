"""Checkpoints that cannot be read to the end, and state that others spoil, on several ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from shampoo_fsdp.checkpoint import ShampooLoadPlanner
from tests.distributed.test_checkpoints import make, states
from tests.models import full_parameters, train
from tests.ranks import ranks


@ranks(2)
def test_half_a_checkpoint_stops_all_ranks(tmp_path):
    """The file of one rank ends early: that one cannot read on, the other one has read its part."""
    built, optimizer = make("fsdp")
    train(built, optimizer, range(3))
    dcp.save(states(built, optimizer, True), checkpoint_id=tmp_path)
    torn = tmp_path / "__1_0.distcp"
    content = torn.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        torn.write_bytes(content[: len(content) // 2])
    dist.barrier()
    for planner in (None, ShampooLoadPlanner("rebuild")):
        built, optimizer = make("fsdp", on_mismatch="rebuild")
        with pytest.raises(dcp.api.CheckpointException):
            dcp.load(states(built, optimizer, True), checkpoint_id=tmp_path, planner=planner)
        before = full_parameters(built.model)
        with pytest.raises(RuntimeError, match="load another checkpoint"):
            train(built, optimizer, range(1))
        after = full_parameters(built.model)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    dist.barrier()
    if dist.get_rank() == 0:
        torn.write_bytes(content)
    dist.barrier()
    saved = states(built, optimizer, True)
    dcp.load(saved, checkpoint_id=tmp_path)
    with pytest.raises(RuntimeError, match=r"call load_state_dict\(\)"):
        train(built, optimizer, range(3, 4))
    optimizer.load_state_dict(optimizer.state_dict())
    train(built, optimizer, range(3, 5))
    assert all(p.isfinite().all() for p in full_parameters(built.model).values())


class Gone(dcp.FileSystemReader):
    """Of a folder of which the second rank cannot read the metadata, or nothing else."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(path)
        self.what = what if dist.get_rank() == 1 else ""

    def read_metadata(self, *args, **kwargs):
        if self.what == "metadata":
            raise OSError("the mount of this node is gone")
        return super().read_metadata(*args, **kwargs)

    def read_data(self, *args, **kwargs):
        if self.what == "data":
            raise OSError("the mount of this node is gone")
        return super().read_data(*args, **kwargs)


@ranks(2)
def test_one_rank_that_can_read_nothing_stops_all_ranks_or_none(tmp_path):
    built, optimizer = make("fsdp")
    train(built, optimizer, range(3))
    dcp.save(states(built, optimizer, True), checkpoint_id=tmp_path)
    expected = full_parameters(built.model)

    built, optimizer = make("fsdp")
    train(built, optimizer, range(1))
    for _ in range(2):
        with pytest.raises(dcp.api.CheckpointException, match="mount"):
            dcp.load(states(built, optimizer, True), storage_reader=Gone(tmp_path, "metadata"))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(dcp.api.CheckpointException, match="mount"):
        dcp.load(states(built, optimizer, True), storage_reader=Gone(tmp_path, "metadata"))
    train(built, optimizer, range(1, 3))
    after = full_parameters(built.model)
    assert all(torch.equal(value, after[name]) for name, value in expected.items())

    with pytest.raises(dcp.api.CheckpointException, match="mount"):
        dcp.load(states(built, optimizer, True), storage_reader=Gone(tmp_path, "data"))
    with pytest.raises(RuntimeError, match="load another checkpoint"):
        optimizer.consolidate_state_dict()
    with pytest.raises(dcp.api.CheckpointException, match="a checkpoint was read"):
        dcp.save(states(built, optimizer, True), checkpoint_id=tmp_path / "half")
    with pytest.raises(ValueError, match="not read completely"):
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="load another checkpoint"):
        train(built, optimizer, range(3, 4))
    saved = states(built, optimizer, True)
    dcp.load(saved, checkpoint_id=tmp_path)
    optimizer.load_state_dict(optimizer.state_dict())
    train(built, optimizer, range(3, 4))


@ranks(2)
def test_what_cannot_be_used_raises_after_the_step_and_hangs_nobody():
    built, optimizer = make("fsdp")
    train(built, optimizer, range(2))
    if dist.get_rank() == 0:
        optimizer.state[built.model.output.weight]["exp_avg"] = "lost"
        with pytest.raises(ValueError, match=r"'exp_avg' .*'output.weight' is 'lost'"):
            train(built, optimizer, range(2, 3))
    else:
        train(built, optimizer, range(2, 3))
    train(built, optimizer, range(3, 4))
    if dist.get_rank() == 1:
        optimizer.state[built.model.output.weight].pop("step")
    with pytest.raises(ValueError, match=r"'step' .*'output.weight' is missing"):
        optimizer.load_state_dict(optimizer.state_dict())
