"""A checkpoint belongs to no mesh: saved on one, loaded on any other."""

from pathlib import Path
from typing import Any

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
from tests.models import Built, build, deterministic_gradients, full_parameters, set_gradients
from tests.ranks import run_ranks

SETTINGS = {"lr": 1e-2, "max_preconditioner_dim": 16, "precondition_frequency": 4}
SAVED_AT, END = 6, 10  # in the middle of a period


def make(layout: str, **settings) -> tuple[Built, Shampoo]:
    built = build(layout, n_layers=1)
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


MEMBERS = {
    "shampoo": {},
    "soap": {"preconditioner": "soap", "momentum": 0.5},
    "kl_shampoo": {"preconditioner": "kl_shampoo", "large_dim": "diagonal"},
    "bf16": {"factor_dtype": "bfloat16", "momentum_dtype": "bfloat16", "symmetric_packing": True},
}


def save_all(runs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """One after the other, since starting ranks takes longer than this; see save_and_go_on."""
    return [save_and_go_on(**run) for run in runs]


def resume_all(runs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [resume(**run) for run in runs]


@pytest.mark.parametrize(
    ("member", "flat", "asynchronous"),
    [
        ("shampoo", True, False),
        ("soap", True, True),
        ("kl_shampoo", False, False),
        ("bf16", False, True),
    ],
)
def test_saved_on_two_ranks_it_resumes_on_any_mesh(tmp_path, member, flat, asynchronous):
    common = {"folder": tmp_path / "checkpoint", "flat": flat, **MEMBERS[member]}
    uninterrupted, _ = run_ranks(
        2, save_and_go_on, layout="fsdp", asynchronous=asynchronous, **common
    )
    meshes = {1: ["single"], 2: ["fsdp"], 4: ["fsdp"]}
    if member == "shampoo":
        meshes = {1: ["single"], 2: ["fsdp", "ddp", "tp"], 4: ["fsdp", "hsdp", "tp_fsdp"]}
    # The rounding of a sum, where a sum is then rounded to bf16.
    tolerance = 1e-2 if member == "bf16" else 1e-5
    for world, layouts in meshes.items():
        runs = [{"layout": layout, **common} for layout in layouts]
        for results in run_ranks(world, resume_all, runs=runs):
            for layout, resumed in zip(layouts, results, strict=True):
                different = relative_difference(resumed, uninterrupted)
                same_mesh = (world, layout) == (2, "fsdp")
                assert different == 0.0 if same_mesh else different <= tolerance, (world, layout)


def test_state_that_replicas_repeat_is_saved_once(tmp_path):
    cases = [(layout, scope) for layout in ("hsdp", "ddp") for scope in ("shard", "all")]

    def run(layout: str, scope: str, **more: Any) -> dict[str, Any]:
        folder = tmp_path / f"{more.pop('saved', layout)}-{more.pop('by', scope)}"
        return {"layout": layout, "folder": folder, "flat": True, "owner_scope": scope, **more}

    expected, *_ = run_ranks(4, save_all, runs=[run(*case, asynchronous=False) for case in cases])
    sizes = [
        sum(file.stat().st_size for file in run(*case)["folder"].glob("*.distcp")) for case in cases
    ]
    assert sizes[0] <= 1.05 * sizes[1] and sizes[2] <= 1.05 * sizes[3]
    other = {"shard": "all", "all": "shard"}
    on_four = [run(layout, other[scope], by=scope) for layout, scope in cases]
    on_two = [run("fsdp", "shard", saved=layout, by=scope) for layout, scope in cases]
    for world, runs in ((4, on_four), (2, on_two)):
        for results in run_ranks(world, resume_all, runs=runs):
            for resumed, uninterrupted in zip(results, expected, strict=True):
                assert relative_difference(resumed, uninterrupted) <= 1e-5


def state_of_bf16_parameters(folder: Path) -> dict[str, torch.dtype]:
    for again in (False, True):
        built = build("fsdp", dtype=torch.bfloat16)
        optimizer = Shampoo(built.model.named_parameters(), **SETTINGS)
        if not again:
            train(built, optimizer, range(5))
        saved = states(built, optimizer, True)
        if again:
            dcp.load(saved, checkpoint_id=folder)
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            set_optimizer_state_dict(built.model, optimizer, saved["optimizer"], options=options)
        dcp.save(states(built, optimizer, True), checkpoint_id=folder / ("again" * again))
    return {f"{n}.{e}": v.dtype for n, p in built.model.named_parameters()
            for e, v in optimizer.state[p].items()}  # fmt: skip


def test_the_state_of_bf16_parameters_stays_fp32(tmp_path):
    types, _ = run_ranks(2, state_of_bf16_parameters, folder=tmp_path)
    kept = whole(tmp_path)["optimizer"]
    loaded = whole(tmp_path / "again")["optimizer"]
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
