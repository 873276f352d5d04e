"""A checkpoint belongs to no mesh: saved on one, loaded on any other."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from shampoo_fsdp import Shampoo
from tests.distributed.test_meshes import Collectives, relative_difference
from tests.models import (
    Built,
    build,
    deterministic_gradients,
    full_parameters,
    set_gradients,
)
from tests.ranks import run_ranks

SETTINGS = {"lr": 1e-2, "max_preconditioner_dim": 16, "precondition_frequency": 4}
SAVED_AT, END = 7, 14  # in the middle of a period


def make(layout: str, **settings) -> tuple[Built, Shampoo]:
    built = build(layout)
    replicas = built.mesh if layout == "ddp" else None
    named = built.model.named_parameters()
    return built, Shampoo(named, replicas=replicas, **{**SETTINGS, **settings})


def train(built: Built, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(built.model, deterministic_gradients(built.model, step))
        optimizer.step()


def states(built: Built, optimizer: torch.optim.Optimizer, flat: bool) -> dict[str, object]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(built.model),
        "optimizer": get_optimizer_state_dict(built.model, optimizer, options=options),
    }


def save_and_go_on(
    layout: str, folder: Path, flat: bool, asynchronous: bool, **settings
) -> dict[str, Tensor]:
    """Save in the middle; the parameters at the end of the uninterrupted run."""
    built, optimizer = make(layout, **settings)
    train(built, optimizer, range(SAVED_AT))
    if asynchronous:
        # Saving communicates in the background: on a group of its own, as TorchTitan does.
        pending = dcp.async_save(
            states(built, optimizer, flat), checkpoint_id=folder, process_group=dist.new_group()
        )
        train(built, optimizer, range(SAVED_AT, SAVED_AT + 1))  # must not leak into the checkpoint
        pending.result()
        train(built, optimizer, range(SAVED_AT + 1, END))
    else:
        with Collectives() as collectives:
            state = states(built, optimizer, flat)
        assert collectives.calls == []  # no tensor is gathered
        dcp.save(state, checkpoint_id=folder)
        train(built, optimizer, range(SAVED_AT, END))
    return full_parameters(built.model)


def resume(layout: str, folder: Path, flat: bool, **settings) -> dict[str, Tensor]:
    built, optimizer = make(layout, **settings)
    saved = states(built, optimizer, flat)
    dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(built.model, saved["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(built.model, optimizer, saved["optimizer"], options=options)
    train(built, optimizer, range(SAVED_AT, END))
    return full_parameters(built.model)


@pytest.mark.parametrize(
    ("flat", "asynchronous"), [(True, False), (True, True), (False, False), (False, True)]
)
def test_saved_on_two_ranks_it_resumes_on_any_mesh(tmp_path, flat, asynchronous):
    folder = tmp_path / "checkpoint"
    uninterrupted, _ = run_ranks(
        2, save_and_go_on, layout="fsdp", folder=folder, flat=flat, asynchronous=asynchronous
    )
    meshes = [(2, "fsdp"), (4, "fsdp"), (1, "single"), (1, "fsdp")]
    if flat and not asynchronous:
        meshes += [(2, "ddp"), (4, "hsdp"), (4, "tp_fsdp"), (2, "tp")]
    for world, layout in meshes:
        for resumed in run_ranks(world, resume, layout=layout, folder=folder, flat=flat):
            difference = relative_difference(resumed, uninterrupted)
            assert difference == 0.0 if (world, layout) == (2, "fsdp") else difference <= 1e-5


@pytest.mark.parametrize(("world", "layout"), [(1, "single"), (4, "hsdp"), (4, "tp_fsdp")])
def test_saved_on_any_mesh_it_resumes_on_two_ranks(tmp_path, world, layout):
    folder = tmp_path / "checkpoint"
    uninterrupted, *_ = run_ranks(
        world, save_and_go_on, layout=layout, folder=folder, flat=True, asynchronous=False
    )
    for resumed in run_ranks(2, resume, layout="fsdp", folder=folder, flat=True):
        assert relative_difference(resumed, uninterrupted) <= 1e-5


@pytest.mark.parametrize("layout", ["hsdp", "ddp"])
def test_state_that_replicas_repeat_is_saved_once(tmp_path, layout):
    sizes = {}
    resumes = {"shard": [(4, layout, "all"), (2, "fsdp", "shard")], "all": [(4, layout, "shard")]}
    for scope, meshes in resumes.items():
        folder = tmp_path / scope
        kept = {"folder": folder, "flat": True}
        uninterrupted, *_ = run_ranks(
            4, save_and_go_on, layout=layout, asynchronous=False, owner_scope=scope, **kept
        )
        sizes[scope] = sum(file.stat().st_size for file in folder.glob("*.distcp"))
        for world, other, now in meshes:
            for resumed in run_ranks(world, resume, layout=other, owner_scope=now, **kept):
                assert relative_difference(resumed, uninterrupted) <= 1e-5
    assert sizes["shard"] <= 1.05 * sizes["all"]


def refusal(layout: str, folder: Path, **settings) -> str:
    try:
        resume(layout, folder, flat=True, **settings)
    except BaseException as error:  # distributed checkpointing's error is no Exception
        return str(error)
    return "nothing was refused"


def test_another_block_size_is_refused_by_name_on_every_rank(tmp_path):
    folder = tmp_path / "checkpoint"
    run_ranks(2, save_and_go_on, layout="fsdp", folder=folder, flat=True, asynchronous=False)
    for message in run_ranks(2, refusal, layout="fsdp", folder=folder, max_preconditioner_dim=8):
        assert "saved torch.Size([16, 0]) and current: torch.Size([8, 0])" in message
        assert "max_preconditioner_dim" in message


def test_a_truncated_file_is_refused_and_the_next_load_works(tmp_path):
    folder = tmp_path / "checkpoint"
    run_ranks(2, save_and_go_on, layout="fsdp", folder=folder, flat=True, asynchronous=False)
    file = sorted(folder.glob("*.distcp"))[0]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "nothing was refused" not in run_ranks(2, refusal, layout="fsdp", folder=folder)
    file.unlink()
    assert all(
        file.name in message for message in run_ranks(2, refusal, layout="fsdp", folder=folder)
    )
    file.write_bytes(content)
    assert run_ranks(2, refusal, layout="fsdp", folder=folder) == ["nothing was refused"] * 2


def test_a_checkpoint_holds_only_tensors_and_numbers(tmp_path):
    folder, file = tmp_path / "checkpoint", tmp_path / "whole.pt"
    run_ranks(2, save_and_go_on, layout="fsdp", folder=folder, flat=True, asynchronous=False)
    dcp_to_torch_save(folder, file)
    saved = torch.load(file, weights_only=True)["optimizer"]
    prefix = "state.layers.0.attention.wq.weight"
    assert saved[f"{prefix}.exp_avg"].shape == (24, 24)
    assert saved[f"{prefix}.factor_0"].shape == (4 * 12 * 12,)
    assert saved[f"{prefix}.step"] == SAVED_AT
    assert saved["param_groups.layers.0.attention.wq.weight.lr"] == 1e-2
