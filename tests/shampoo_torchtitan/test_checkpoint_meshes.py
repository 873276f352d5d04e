"""What one mesh has saved, any other loads and goes on with, through TorchTitan's checkpoints.

By default a path through all meshes, and each to itself; with --all-pairs all pairs. Meshes with
FSDP save asynchronously.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from shampoo_torchtitan import checkpoint
from tests.models import deterministic_gradients, set_gradients
from tests.ranks import run_ranks
from tests.shampoo_torchtitan import jobs

pytestmark = jobs.on_cpu

AsyncMode = checkpoint.titan_checkpoints.AsyncMode

SETTINGS = [
    "--optimizer.lr=1e-2",
    "--optimizer.shampoo.max_preconditioner_dim=32",
    "--optimizer.shampoo.precondition_frequency=3",
    "--optimizer.shampoo.start_preconditioning_step=3",
    "--optimizer.shampoo.momentum=0.5",
    "--checkpoint.enable",
    "--checkpoint.interval=1",
    "--checkpoint.keep_latest_k=0",
    "--checkpoint.exclude_from_loading=dataloader",
]
SAVED_AT, END = 5, 9  # in the middle of a period

_DEGREE = "--parallelism.{}_parallel_degree={}"
_HSDP = ["--parallelism.data_parallel_replicate_degree=2"]
DENSE = {
    "1": (1, []),
    "FSDP2": (2, []),
    "DDP2": (2, [*_HSDP, "--parallelism.data_parallel_shard_degree=1"]),
    "HSDP2x2": (4, _HSDP),
    "PP2": (2, [_DEGREE.format("pipeline", 2)]),
    "FSDP4": (4, []),
    "TP2xFSDP2": (4, [_DEGREE.format("tensor", 2)]),
}
EXPERTS = {
    "FSDP2": (2, []),
    "EP2": (2, [_DEGREE.format("expert", 2)]),
    "1": (1, []),
    "FSDP4": (4, []),
    "HSDP2x2": (4, _HSDP),
    "TP2xFSDP2": (4, [_DEGREE.format("tensor", 2)]),
    "PP2": (2, [_DEGREE.format("pipeline", 2)]),
    "EP2xFSDP2": (4, [_DEGREE.format("expert", 2)]),
}
if not jobs.PIPELINES:
    del DENSE["PP2"], EXPERTS["PP2"]
MESHES = {"llama3": DENSE, "deepseek_v3": EXPERTS}
BY_DEFAULT = {"llama3": list(DENSE), "deepseek_v3": ["FSDP2", "EP2"]}


def go_on(trainer: Any, step: int) -> None:
    """Train to a step with given gradients, as TorchTitan's trainer would."""
    while trainer.step < step:
        trainer.step += 1
        for part in trainer.model_parts:
            set_gradients(part, deterministic_gradients(part, trainer.step))
        trainer.optimizers.step()
        trainer.lr_schedulers.step()


def save_and_go_on(trainer: Any, folder: Path, mode: AsyncMode) -> None:
    """Save in a folder, and again at the end."""
    checkpoints = trainer.checkpointer
    checkpoints.folder, checkpoints.async_mode = str(folder), mode
    checkpoints.save(trainer.step)
    go_on(trainer, END)  # must not leak into what is being saved
    checkpoints.async_mode = AsyncMode.ASYNC  # waits for it
    checkpoints.save(trainer.step, last_step=True)


def visit(job: Path, arguments: list[str], folder: Path, mesh: str, sources: list[str]) -> None:
    """What a mesh does: train, and save in its own folder; load what others have saved, save it
    again as it is, and go on with it."""
    trainer = jobs.make_trainer(job, "--checkpoint.async_mode=async", *SETTINGS, *arguments)
    if not (folder / mesh).exists():
        jobs.put_weights(trainer.model_parts)
        go_on(trainer, SAVED_AT)
        save_and_go_on(trainer, folder / mesh, way(mesh))
    for source in sources:
        trainer.checkpointer.folder = str(folder / source)
        trainer.checkpointer.load(step=SAVED_AT)
        assert trainer.step == SAVED_AT
        save_and_go_on(trainer, folder / f"{source} on {mesh}", way(source))
    trainer.close()


def way(mesh: str) -> AsyncMode:
    return AsyncMode.ASYNC if "FSDP" in mesh else AsyncMode.DISABLED


@functools.cache
def contents(folder: Path, step: int) -> dict[str, Any]:
    """All of a checkpoint by key but what belongs to the mesh: the data loader's part, and which
    other parameters are in a parameter's group (those of its pipeline stage)."""
    file = folder / "whole.pt"
    dcp_to_torch_save(folder / f"step-{step}", file)
    saved = torch.load(file, weights_only=True)
    flat = {key: value for key, value in saved.items() if not isinstance(value, dict)}
    for part in ("optimizer", "lr_scheduler", "train_state"):
        flat |= {f"{part}.{key}": value for key, value in saved[part].items()}
    return {key: value for key, value in flat.items() if not key.endswith(".param_names")}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """By key the relative difference of tensors, and infinity where other values differ."""
    assert ours.keys() == theirs.keys()
    found = {}
    for key, mine in ours.items():
        if isinstance(mine, Tensor):
            mine, other = mine.double(), theirs[key].double()
            found[key] = (mine - other).norm().item() / max(other.norm().item(), 1e-30)
        else:
            found[key] = 0.0 if mine == theirs[key] else float("inf")
    return found


@pytest.mark.parametrize("model", MESHES)
def test_checkpoints_move(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    everything = request.config.getoption("--all-pairs")
    names = list(MESHES[model]) if everything else BY_DEFAULT[model]
    pairs = (
        itertools.product(names, names) if everything else itertools.pairwise([*names, names[0]])
    )
    pairs = dict.fromkeys([*((name, name) for name in names), *pairs])
    job, done = jobs.write_job(tmp_path), set()
    for mesh in [*names, *names]:  # the second time for what had not been saved yet
        loads = [s for s, target in pairs if target == mesh and (s, mesh) not in done]
        loads = [s for s in loads if s == mesh or (tmp_path / s).exists()]
        if loads:
            n, degrees = MESHES[model][mesh]
            given = {"folder": tmp_path, "mesh": mesh, "sources": loads}
            arguments = [f"--model.name={model}", *degrees]
            run_ranks(n, visit, init=False, timeout=240, job=job, arguments=arguments, **given)
            done |= {(source, mesh) for source in loads}
    assert done == pairs.keys()
    for source, target in pairs:
        home, there = tmp_path / source, tmp_path / f"{source} on {target}"
        saved, as_loaded = contents(home, SAVED_AT), contents(there, SAVED_AT)
        assert set(differences(as_loaded, saved).values()) == {0.0}, (source, target)
        for key, value in differences(contents(there, END), contents(home, END)).items():
            # Roots of matrices that are nearly singular enlarge the rounding of sums.
            allowed = 1e-3 if key.endswith("inverse_roots") else 1e-5
            assert value <= (0.0 if source == target else allowed), (source, target, key)
