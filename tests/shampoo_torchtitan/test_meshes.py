"""Every mesh that TorchTitan builds from a job's settings gives the update of one process, by the
plan that was shown, and goes on with what any other has saved.

By default a path through all meshes, and the first two to themselves; with --all-pairs all pairs.
Meshes with FSDP save asynchronously.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from shampoo_fsdp.plan.assignment import Assignment
from shampoo_fsdp.rules.device import on_device
from shampoo_fsdp.rules.layout import block_costs
from shampoo_fsdp.runtime.choice import is_preconditioned
from shampoo_torchtitan import checkpoint
from shampoo_torchtitan.plan import job_specs, read_job
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


def mesh(ranks: int, *more: str, **degrees: int) -> tuple[int, list[str]]:
    return ranks, [f"--parallelism.{name}_degree={n}" for name, n in degrees.items()] + [*more]


ONE_LAYER_A_STAGE = [  # several stages on a rank, some without a matrix
    "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
    "--parallelism.pipeline_parallel_layers_per_stage=1",
]
# In an order that a checkpoint takes in and out of pipelines.
DENSE = {
    "1": mesh(1),
    "FSDP2": mesh(2),
    "PP2xFSDP2": mesh(4, pipeline_parallel=2),
    "DDP2": mesh(2, data_parallel_replicate=2, data_parallel_shard=1),
    "PP2xTP2": mesh(4, pipeline_parallel=2, tensor_parallel=2),
    "HSDP2x2xTP2": mesh(8, data_parallel_replicate=2, tensor_parallel=2),
    "PP2x2": mesh(2, *ONE_LAYER_A_STAGE, pipeline_parallel=2),
    "TP2": mesh(2, tensor_parallel=2),
}
EXPERTS = {
    "1": mesh(1),
    "EP2xFSDP2": mesh(4, expert_parallel=2),
    "PP2xEP2": mesh(4, pipeline_parallel=2, expert_parallel=2),
    "EP2xETP2": mesh(4, tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2),
    "EP4xTP2": mesh(4, tensor_parallel=2, expert_parallel=4),
    "HSDP2x2xEP2": mesh(4, data_parallel_replicate=2, expert_parallel=2),
}
MESHES = {"llama3": DENSE, "deepseek_v3": EXPERTS}


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


def visit(
    job: Path, arguments: list[str], folder: Path, mesh: str, sources: list[str]
) -> list[str]:
    """What a mesh does: train, and save in its own folder; load what others have saved, save it
    again as it is, and go on with it. It tells its plans."""
    trainer = jobs.make_trainer(job, "--checkpoint.async_mode=async", *arguments)
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
    optimizers = trainer.optimizers.optimizers
    return [team.assignment.fingerprint for one in optimizers for team in one._parameters.teams]


def way(mesh: str) -> AsyncMode:
    return AsyncMode.ASYNC if "FSDP" in mesh else AsyncMode.DISABLED


def shown(n: int, job: Path, arguments: list[str]) -> set[str]:
    """The plans of a job's parts, made without running it."""
    config = read_job(["--job.config_file", str(job), *arguments])
    parts, found = job_specs(config, n), set()
    settings = on_device(config.optimizer.shampoo, torch.device("cpu"))
    assert settings.precondition_frequency == 3  # the job's own
    for part in parts:
        if chosen := [s for s in part if is_preconditioned(s.name, s.shape, settings)]:
            rank = min(chosen[0].ranks)
            found.add(Assignment(chosen, settings, block_costs(settings), rank).fingerprint)
    return found


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
def test_each_trains_as_one_process_and_as_planned_and_checkpoints_move(tmp_path, model, request):
    meshes = {
        name: of
        for name, of in MESHES[model].items()
        if (jobs.PIPELINES or "PP" not in name) and (jobs.EXPERT_TENSORS or "ETP" not in name)
    }
    names, everything = list(meshes), request.config.getoption("--all-pairs")
    pairs = itertools.product(names, names) if everything else itertools.pairwise(names)
    pairs = dict.fromkeys([*((name, name) for name in names[:2]), *pairs])
    job, done = jobs.write_job(tmp_path), set()
    for mesh in [*names, *names]:  # the second time for what had not been saved yet
        loads = [s for s, target in pairs if target == mesh and (s, mesh) not in done]
        loads = [s for s in loads if s == mesh or (tmp_path / s).exists()]
        if loads:
            n, degrees = meshes[mesh]
            arguments = [f"--model.name={model}", *SETTINGS, *degrees]
            given = {"job": job, "arguments": arguments, "folder": tmp_path, "mesh": mesh}
            plans = run_ranks(n, visit, init=False, timeout=240, sources=loads, **given)
            assert model != "llama3" or set(itertools.chain(*plans)) == shown(n, job, arguments)
            done |= {(source, mesh) for source in loads}
    assert done == pairs.keys()
    alone = contents(tmp_path / "1", END)
    for mesh in names:
        for key, value in differences(contents(tmp_path / mesh, END), alone).items():
            assert value <= 1e-5 or key.startswith("optimizer."), (mesh, key)
    for source, target in pairs:
        home, there = tmp_path / source, tmp_path / f"{source} on {target}"
        saved, as_loaded = contents(home, SAVED_AT), contents(there, SAVED_AT)
        assert set(differences(as_loaded, saved).values()) == {0.0}, (source, target)
        for key, value in differences(contents(there, END), contents(home, END)).items():
            # Roots of matrices that are nearly singular enlarge the rounding of sums.
            allowed = 1e-3 if key.endswith("inverse_roots") else 1e-5
            assert value <= (0.0 if source == target else allowed), (source, target, key)
