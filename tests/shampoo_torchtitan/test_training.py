"""Whole TorchTitan jobs with Shampoo, on the CPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchtitan.components.metrics

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.ranks import run_ranks
from tests.shampoo_torchtitan import checkpointing, jobs


@dataclasses.dataclass
class Run:
    """What a rank saw of a training."""

    optimizer: str
    logged: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    expert_biases: list[torch.Tensor]
    step: int


def _train(job: Path, arguments: list[str], same_batches: bool = False) -> Run:
    logged = []
    with mock.patch.object(
        torchtitan.components.metrics.BaseLogger, "log", lambda self, m, step: logged.append(m)
    ):
        trainer = jobs.train(job, *arguments, same_batches=same_batches)
    kind = type(trainer.optimizers.optimizers[0]).__name__
    buffers = trainer.model_parts[0].named_buffers()
    biases = [value.clone() for name, value in buffers if "expert_bias" in name]
    return Run(kind, logged, jobs.weights(trainer), biases, trainer.step)


def run(n: int, job: Path, *arguments: str, same_batches: bool = False) -> list[Run]:
    return run_ranks(
        n, _train, init=False, job=job, arguments=list(arguments), same_batches=same_batches
    )


def losses(run: Run) -> list[float]:
    return [m["loss_metrics/global_avg_loss"] for m in run.logged]


@jobs.on_cpu
def test_shampoo_learns_and_its_counters_are_summed_over_ranks(tmp_path):
    job = jobs.write_job(tmp_path)
    first, second = run(2, job, "--training.steps=12")
    assert first.optimizer == "Shampoo"
    assert losses(first)[-1] < losses(first)[0] - 1
    for name in ("root_refreshes", "failed_roots", "skipped_blocks", "skipped_entries"):
        counts = [m[f"shampoo/{name}"] for m in first.logged]
        assert counts == [m[f"shampoo/{name}"] for m in second.logged]
        assert counts == sorted(counts)
    # tiny: 2 layers of 7 matrices, one block of two factors each, every second step from step 2.
    assert first.logged[-1]["shampoo/root_refreshes"] >= 2 * 7 * 2
    assert first.logged[-1]["shampoo/failed_roots"] == 0


@jobs.on_cpu
def test_a_moe_model_trains_and_its_experts_are_kept_in_balance(tmp_path):
    job = jobs.write_job(tmp_path)
    moe = ["--model.name=deepseek_v3", "--parallelism.expert_parallel_degree=2"]
    first, _ = run(2, job, *moe)
    assert first.optimizer == "Shampoo"
    assert losses(first)[-1] < losses(first)[0]
    assert len(first.expert_biases) == 2 and all(bias.any() for bias in first.expert_biases)


MESHES = {
    "1": (1, []),
    "HSDP2x2": (4, ["--parallelism.data_parallel_replicate_degree=2"]),
    "FSDP2xTP2": (4, ["--parallelism.tensor_parallel_degree=2"]),
    "DDP2": (2, ["--parallelism.data_parallel_replicate_degree=2"]),
}
# Clipping always: under DDP, TorchTitan's gradients are smaller by the number of ranks.
LONG = ["--training.steps=14", "--training.max_norm=0.1"]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """A job of Shampoo's own defaults, its checkpoint of step 7, and its losses."""
    folder = tmp_path_factory.mktemp("two")
    job = jobs.write_job(folder, jobs.TINY_JOB_WITH_DEFAULTS)
    saving = ["--checkpoint.enable", "--checkpoint.async_mode=async"]
    saving += ["--checkpoint.interval=7", "--checkpoint.keep_latest_k=0"]
    return job, folder / "checkpoint" / "step-7", run(2, job, *LONG, *saving, same_batches=True)[0]


@jobs.on_cpu
@pytest.mark.parametrize("mesh", ["HSDP2x2", "FSDP2xTP2", "DDP2"])
def test_losses_are_the_same_to_four_digits_on_every_mesh(on_two_ranks, mesh):
    job, _, on_two = on_two_ranks
    assert losses(on_two)[-1] < losses(on_two)[0] - 0.9
    ranks, degrees = MESHES[mesh]
    found = losses(run(ranks, job, *LONG, *degrees, same_batches=True)[0])
    assert found == pytest.approx(losses(on_two), rel=1e-4)


@jobs.on_cpu
@pytest.mark.parametrize("mesh", ["1", "FSDP2xTP2"])
def test_a_run_saved_on_two_ranks_goes_on_alike_on_any_mesh(on_two_ranks, mesh):
    job, saved, on_two = on_two_ranks
    ranks, degrees = MESHES[mesh]
    resuming = [f"--checkpoint.folder=on-{mesh}", f"--checkpoint.initial_load_path={saved}"]
    resuming += ["--checkpoint.enable", "--checkpoint.no-initial_load_model_only"]
    resuming += ["--checkpoint.exclude_from_loading=dataloader"]
    resumed = run(ranks, job, *LONG, *resuming, *degrees, same_batches=True)[0]
    assert len(losses(resumed)) == 7
    assert losses(resumed) == pytest.approx(losses(on_two)[7:], rel=5e-5)
    if mesh == "1":
        again = run(ranks, job, *LONG, *resuming, *degrees, same_batches=True)[0]
        assert again.logged == [] and again.step == 14  # nothing left to train
        for name in resumed.weights:
            assert torch.equal(again.weights[name], resumed.weights[name]), name


WATCHED = """
import importlib.util
triton = importlib.util.find_spec("triton") is not None
import shampoo_torchtitan.train as train
import torch.utils._triton
assert torch.utils._triton.has_triton_package() == triton  # or torch would compile for a GPU
from shampoo_torchtitan.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import ConfigManager
for cls in (CheckpointManager, MetricsProcessor, ConfigManager, train.torchtitan.train.Trainer):
    for method in vars(cls).values():
        if code := getattr(method, "__code__", None):
            assert "/shampoo_torchtitan/" not in code.co_filename, (cls, method)
"""


def test_importing_leaves_titan_as_it_is():
    """Only a job whose optimizer is Shampoo sees anything of it."""
    subprocess.run([sys.executable, "-c", WATCHED], check=True)


def test_a_setting_that_does_not_fit_the_model_is_said_and_ends_the_job(tmp_path):
    settings = ["--optimizer.shampoo.preconditioner=shampoo"]
    settings += ["--optimizer.shampoo.root_method=polynomial"]
    settings += ["--optimizer.shampoo.root_exponents", "0", "0.123"]
    (outcome,) = checkpointing.run(1, jobs.write_job(tmp_path), *settings)
    assert outcome.exit_code == 2  # as for all bad settings: without a traceback
    first = "qkv_linear.wqkv" if JOBS_ARE_FUNCTIONS else "wq"
    parameter = f"parameter 'layers.0.attention.{first}.weight'"
    assert f"Cannot build the optimizer: {parameter}: root_method = " in outcome.logged
