"""A checkpoint belongs to no mesh: saved on one, loaded on any other."""

from pathlib import Path
from typing import Any

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
from tests.models import Built, build, full_parameters, train, with_shampoo
from tests.ranks import run_ranks

SETTINGS = {"lr": 5e-3, "lr_factor": 2.0, "max_preconditioner_dim": 16, "precondition_frequency": 4}
SAVED_AT, END = 6, 10  # in the middle of a period


def make(layout: str, **settings) -> tuple[Built, Shampoo]:
    return with_shampoo(layout, {"n_layers": 1}, **{**SETTINGS, **settings})


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


def load(built: Built, optimizer: Shampoo, folder: Path, flat: bool) -> None:
    saved = states(built, optimizer, flat)
    dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(built.model, saved["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(built.model, optimizer, saved["optimizer"], options=options)


def resume(layout: str, folder: Path, flat: bool, **settings) -> dict[str, Tensor]:
    built, optimizer = make(layout, **settings)
    load(built, optimizer, folder, flat)
    train(built, optimizer, range(SAVED_AT, END))
    return full_parameters(built.model)


def save_all(runs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """One after the other, since starting ranks takes longer than this; see save_and_go_on."""
    return [save_and_go_on(**run) for run in runs]


def resume_all(runs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [resume(**run) for run in runs]


# Settings, whether the state dict is flat, and whether it is saved in the background.
MEMBERS = {
    "shampoo": ({}, True, False),
    "soap": ({"preconditioner": "soap", "momentum": 0.5}, True, True),
    "kl_shampoo": ({"preconditioner": "kl_shampoo", "large_dim": "diagonal"}, False, False),
    "bf16": (
        {"factor_dtype": "bfloat16", "momentum_dtype": "bfloat16", "symmetric_packing": True},
        False,
        True,
    ),
}


def test_saved_on_two_ranks_it_goes_on_there_and_in_one_process(tmp_path):
    """On other meshes: test_fuzz, and test_meshes of TorchTitan."""
    runs = [
        {"folder": tmp_path / member, "flat": flat, "asynchronous": asynchronous, **settings}
        for member, (settings, flat, asynchronous) in MEMBERS.items()
    ]
    saved, _ = run_ranks(2, save_all, runs=[{"layout": "fsdp", **run} for run in runs])
    for run in runs:
        del run["asynchronous"]
    there, _ = run_ranks(2, resume_all, runs=[{"layout": "fsdp", **run} for run in runs])
    alone = resume_all([{"layout": "single", **run} for run in runs])
    for run, expected, same_mesh, other in zip(runs, saved, there, alone, strict=True):
        assert relative_difference(same_mesh, expected) == 0.0, run
        # The rounding of a sum, where a sum is then rounded to bf16.
        tolerance = 1e-2 if "factor_dtype" in run else 1e-5
        assert relative_difference(other, expected) <= tolerance, run


def test_state_that_replicas_repeat_is_saved_once(tmp_path):
    """Whoever owns it. (That it goes on, also where others own it, test_fuzz shows.)"""
    cases = [(layout, scope) for layout in ("hsdp", "ddp") for scope in ("shard", "all")]
    folders = [tmp_path / f"{layout}-{scope}" for layout, scope in cases]
    common = {"flat": True, "asynchronous": False}
    runs = [
        {"layout": layout, "owner_scope": scope, "folder": folder, **common}
        for (layout, scope), folder in zip(cases, folders, strict=True)
    ]
    run_ranks(4, save_all, runs=runs)
    sizes = [sum(f.stat().st_size for f in folder.glob("*.distcp")) for folder in folders]
    assert sizes[0] <= 1.05 * sizes[1] and sizes[2] <= 1.05 * sizes[3]


def state_of_bf16_parameters(folder: Path) -> dict[str, torch.dtype]:
    for steps, name in ((5, "first"), (0, "again")):
        built = build("fsdp", dtype=torch.bfloat16)
        optimizer = Shampoo(built.model.named_parameters(), **SETTINGS)
        train(built, optimizer, range(steps))
        if name == "again":
            load(built, optimizer, folder / "first", flat=True)
        dcp.save(states(built, optimizer, True), checkpoint_id=folder / name)
    return {f"{n}.{e}": v.dtype for n, p in built.model.named_parameters()
            for e, v in optimizer.state[p].items()}  # fmt: skip


def test_the_state_of_bf16_parameters_stays_fp32(tmp_path):
    types, _ = run_ranks(2, state_of_bf16_parameters, folder=tmp_path)
    kept, loaded = (whole(tmp_path / name)["optimizer"] for name in ("first", "again"))
    for entry in ("step", "exp_avg", "exp_avg_sq", "factors", "inverse_roots"):
        key = f"layers.0.attention.wq.weight.{entry}"
        assert types[key] == kept[f"state.{key}"].dtype == torch.float32
        assert torch.equal(kept[f"state.{key}"], loaded[f"state.{key}"])
    exp_avg = kept["state.layers.0.attention.wq.weight.exp_avg"]
    assert not torch.equal(exp_avg, exp_avg.bfloat16().float())  # fp32 was needed


def whole(folder: Path) -> dict[str, Any]:
    """A checkpoint as torch.load reads it, without running any code that may be in it."""
    dcp_to_torch_save(folder, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=True)
