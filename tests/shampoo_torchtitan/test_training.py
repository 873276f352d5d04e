"""Whole TorchTitan jobs with Shampoo, on the CPU."""

import subprocess
import sys

import pytest
import torch

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.shampoo_torchtitan import jobs
from tests.shampoo_torchtitan.jobs import run


@jobs.on_cpu
def test_shampoo_learns_and_its_counters_are_summed_over_ranks(tmp_path):
    job = jobs.write_job(tmp_path)
    first, second = run(2, job, "--training.steps=12", same_batches=False)
    assert first.losses[-1] < first.losses[0] - 1
    for name in ("root_refreshes", "failed_roots", "skipped_blocks", "skipped_entries"):
        counts = [m[f"shampoo/{name}"] for m in first.metrics]
        assert counts == [m[f"shampoo/{name}"] for m in second.metrics]
        assert counts == sorted(counts)
    # tiny: 2 layers of 7 matrices, one block of two factors each, every second step from step 2.
    assert first.metrics[-1]["shampoo/root_refreshes"] >= 2 * 7 * 2
    assert first.metrics[-1]["shampoo/failed_roots"] == 0


@jobs.on_cpu
def test_a_moe_model_trains_and_its_experts_are_kept_in_balance(tmp_path):
    moe = ["--model.name=deepseek_v3", "--parallelism.expert_parallel_degree=2"]
    first, _ = run(2, jobs.write_job(tmp_path), *moe, same_batches=False)
    assert "shampoo/root_refreshes" in first.metrics[-1]
    assert first.losses[-1] < first.losses[0]
    assert len(first.expert_biases) == 2 and all(bias.any() for bias in first.expert_biases)


# Clipping always: under DDP, TorchTitan's gradients are smaller by the number of ranks.
LONG = ["--training.steps=14", "--training.max_norm=0.1"]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """A job of Shampoo's own defaults, its checkpoint of step 7, and its losses."""
    folder = tmp_path_factory.mktemp("two")
    job = jobs.write_job(folder, jobs.TINY_JOB_WITH_DEFAULTS)
    saving = ["--checkpoint.enable", "--checkpoint.async_mode=async"]
    saving += ["--checkpoint.interval=7", "--checkpoint.keep_latest_k=0"]
    return job, folder / "checkpoint" / "step-7", run(2, job, *LONG, *saving)[0].losses


@jobs.on_cpu
@pytest.mark.parametrize(
    ("ranks", "degree"),
    [(4, "data_parallel_replicate"), (4, "tensor_parallel"), (2, "data_parallel_replicate")],
    ids=["HSDP2x2", "FSDP2xTP2", "DDP2"],
)
def test_losses_are_the_same_to_four_digits_on_every_mesh(on_two_ranks, ranks, degree):
    job, _, losses = on_two_ranks
    assert losses[-1] < losses[0] - 0.9
    found = run(ranks, job, *LONG, f"--parallelism.{degree}_degree=2")[0]
    assert found.losses == pytest.approx(losses, rel=1e-4)


@jobs.on_cpu
def test_a_run_saved_on_two_ranks_goes_on_alike_on_one(on_two_ranks):
    job, saved, losses = on_two_ranks
    resuming = ["--checkpoint.folder=on-1", f"--checkpoint.initial_load_path={saved}"]
    resuming += ["--checkpoint.enable", "--checkpoint.no-initial_load_model_only"]
    resuming += ["--checkpoint.exclude_from_loading=dataloader"]
    (resumed,) = run(1, job, *LONG, *resuming)
    assert len(resumed.losses) == 7
    assert resumed.losses == pytest.approx(losses[7:], rel=5e-5)
    (again,) = run(1, job, *LONG, *resuming)
    assert again.metrics == [] and again.step == 14  # nothing left to train
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
    (outcome,) = run(1, jobs.write_job(tmp_path), *settings)
    assert outcome.exit_code == 2  # as for all bad settings: without a traceback
    first = "qkv_linear.wqkv" if JOBS_ARE_FUNCTIONS else "wq"
    parameter = f"parameter 'layers.0.attention.{first}.weight'"
    assert f"Cannot build the optimizer: {parameter}: root_method = " in outcome.logged
