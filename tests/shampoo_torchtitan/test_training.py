"""Whole TorchTitan jobs with Shampoo, on the CPU."""

import importlib.util
import shutil

import pytest
import torch.utils._triton
import torchtitan.train
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import ConfigManager

from shampoo_torchtitan.checkpoint import CheckpointManager
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.ranks import run_ranks
from tests.shampoo_torchtitan import jobs
from tests.shampoo_torchtitan.jobs import run
from tests.shampoo_torchtitan.test_names import as_02_would_name_it


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
    """A job of Shampoo's own defaults, its checkpoint of step 7, and what both ranks saw."""
    folder = tmp_path_factory.mktemp("two")
    job = jobs.write_job(folder, jobs.TINY_JOB_WITH_DEFAULTS)
    saving = ["--checkpoint.enable", "--checkpoint.async_mode=async"]
    saving += ["--checkpoint.interval=7", "--checkpoint.keep_latest_k=0"]
    return job, folder / "checkpoint" / "step-7", run(2, job, *LONG, *saving)


@jobs.on_cpu
def test_shampoo_learns_and_its_figures_are_those_of_all_ranks(on_two_ranks):
    first, second = on_two_ranks[2]
    assert first.losses[-1] < first.losses[0] - 0.9
    for name in ("root_refreshes", "failed_roots", "skipped_blocks", "skipped_entries"):
        counts = [m[f"shampoo/{name}"] for m in first.metrics]
        assert counts == [m[f"shampoo/{name}"] for m in second.metrics]
        assert counts == sorted(counts)
    # tiny: 2 layers of 7 matrices, one block of two factors each.
    assert first.metrics[-1]["shampoo/root_refreshes"] >= 2 * 7 * 2
    assert first.metrics[-1]["shampoo/failed_roots"] == 0
    assert first.metrics[-1]["shampoo/condition_number"] > 1.0
    assert first.metrics[-1]["shampoo/update_rms/attention.wo"] > 0.0
    assert first.metrics[-1]["shampoo/mib_sent_per_step"] > 0.0
    *_, times = (line for line in first.logged.splitlines() if "'s last step" in line)
    parts = [part.split()[0] for part in times.partition(" rank: ")[2].split(", ")]
    assert parts == ["apply", "direction", "exchange", "excluded", "factors", "roots"]


@jobs.on_cpu
@pytest.mark.parametrize(
    ("ranks", "degree"),
    [(4, "data_parallel_replicate"), (4, "tensor_parallel"), (2, "data_parallel_replicate")],
    ids=["HSDP2x2", "FSDP2xTP2", "DDP2"],
)
def test_losses_are_the_same_to_four_digits_on_every_mesh(on_two_ranks, ranks, degree):
    job, _, outcomes = on_two_ranks
    found = run(ranks, job, *LONG, f"--parallelism.{degree}_degree=2")[0]
    assert found.losses == pytest.approx(outcomes[0].losses, rel=1e-4)


def go_on(ranks, on_two_ranks, name, *settings, saved=None):
    """From step 7, or from another checkpoint, in a folder of this name."""
    resuming = ["--checkpoint.enable", "--checkpoint.no-initial_load_model_only"]
    resuming += [f"--checkpoint.initial_load_path={saved or on_two_ranks[1]}"]
    return run(ranks, on_two_ranks[0], *LONG, *resuming, f"--checkpoint.folder={name}", *settings)


WITHOUT_DATA = "--checkpoint.exclude_from_loading=dataloader"


@jobs.on_cpu
def test_a_run_saved_on_two_ranks_goes_on_alike_on_one(on_two_ranks):
    (resumed,) = go_on(1, on_two_ranks, "on-1", WITHOUT_DATA)
    assert len(resumed.losses) == 7
    assert resumed.losses == pytest.approx(on_two_ranks[2][0].losses[7:], rel=5e-5)
    (again,) = go_on(1, on_two_ranks, "on-1", WITHOUT_DATA)
    assert again.metrics == [] and again.step == 14  # nothing left to train
    for name in resumed.weights:
        assert torch.equal(again.weights[name], resumed.weights[name]), name


@jobs.on_cpu
def test_what_does_not_fit_is_refused_with_what_to_do(on_two_ranks):
    """The data loaders of another number of ranks, and another size of blocks."""
    saved = on_two_ranks[1]
    smaller = "--optimizer.shampoo.max_preconditioner_dim=32"
    for outcome in go_on(2, on_two_ranks, "smaller", smaller):
        assert outcome.exit_code == 2 and outcome.losses == []
        assert f"{saved} does not fit this job" in outcome.logged
        assert "'max_preconditioner_dim' is 1024 in the checkpoint, but 32 here" in outcome.logged
        assert 'on_mismatch = "rebuild"' in outcome.logged
    (outcome,) = go_on(1, on_two_ranks, "refused")
    assert outcome.exit_code == 2 and outcome.losses == []
    assert "data loaders were those of 2 data-parallel ranks, and here are 1" in outcome.logged
    assert 'set checkpoint.exclude_from_loading = ["dataloader"]' in outcome.logged


@jobs.on_cpu
@pytest.mark.skipif(not JOBS_ARE_FUNCTIONS, reason="0.2 has its own names")
def test_a_job_goes_on_with_what_fits_of_a_checkpoint_of_02(on_two_ranks, tmp_path):
    saved = shutil.copytree(on_two_ranks[1], tmp_path / "step-7")
    as_02_would_name_it(saved)
    (refused,) = go_on(1, on_two_ranks, "02", WITHOUT_DATA, saved=saved)
    assert refused.exit_code == 2
    qkv = "'layers.0.attention.qkv_linear.wqkv.weight'"
    assert f"no optimizer state for parameter {qkv}" in refused.logged
    rebuild = "--optimizer.shampoo.on_mismatch=rebuild"
    (outcome,) = go_on(1, on_two_ranks, "02", WITHOUT_DATA, rebuild, saved=saved)
    assert outcome.step == 14 and len(outcome.losses) == 7
    assert outcome.losses[0] == pytest.approx(on_two_ranks[2][0].losses[7], rel=1e-3)
    assert f"all starts anew for {qkv}" in outcome.logged


def titan_is_as_it_was() -> None:
    """On a rank, which has imported all and done nothing."""
    triton = importlib.util.find_spec("triton") is not None
    assert torch.utils._triton.has_triton_package() == triton  # or torch would compile for a GPU
    for cls in (CheckpointManager, MetricsProcessor, ConfigManager, torchtitan.train.Trainer):
        for method in vars(cls).values():
            if code := getattr(method, "__code__", None):
                assert "/shampoo_torchtitan/" not in code.co_filename, (cls, method)


def test_importing_leaves_titan_as_it_is():
    """Only a job whose optimizer is Shampoo sees anything of it."""
    run_ranks(1, titan_is_as_it_was, init=False)
