"""Resuming with other settings, and with another optimizer."""

import pytest

from shampoo_torchtitan.demo import cpu
from tests.ranks import preload
from tests.shampoo_torchtitan import jobs
from tests.shampoo_torchtitan.checkpointing import run

preload("shampoo_torchtitan.train", "torchtitan.models.llama3")

pytestmark = pytest.mark.skipif(not cpu.needed(), reason="this machine has an accelerator")

COMMON = ["--checkpoint.enable", "--checkpoint.interval=3", "--lr_scheduler.total_steps=9"]


def test_a_run_of_adamw_goes_on_with_shampoo_and_back(tmp_path):
    """Until its first preconditioned step, Shampoo of AdamW's momentum is AdamW: nothing of the
    moments is lost."""
    job = jobs.write_job(tmp_path)
    adamw = [*COMMON, "--optimizer.name=AdamW"]
    at_once = run(2, job, *adamw, "--training.steps=9", "--checkpoint.folder=at_once")[0]
    run(2, job, *adamw, "--training.steps=3")
    later = ["start_preconditioning_step=100", "beta3=0.9"]
    settings = [f"--optimizer.shampoo.{setting}" for setting in later]
    shampoo = run(2, job, *COMMON, *settings, "--training.steps=6")
    assert shampoo[0].losses == pytest.approx(at_once.losses[3:6], rel=1e-5)
    assert "factors start anew for 'layers.0." in shampoo[0].logged
    assert "factors start anew" not in shampoo[1].logged
    back = run(2, job, *adamw, "--training.steps=9")[0]
    assert back.losses == pytest.approx(at_once.losses[6:], rel=1e-5)


def test_data_loaders_of_another_number_of_ranks_are_refused_with_what_to_do(tmp_path):
    job = jobs.write_job(tmp_path)
    run(2, job, *COMMON, "--training.steps=3")
    (outcome,) = run(1, job, *COMMON, "--training.steps=6")
    assert outcome.exit_code == 2 and outcome.losses == []
    assert "data loaders were those of 2 data-parallel ranks, and here are 1" in outcome.logged
    assert 'set checkpoint.exclude_from_loading = ["dataloader"]' in outcome.logged
    excluded = "--checkpoint.exclude_from_loading=dataloader"
    (outcome,) = run(1, job, *COMMON, "--training.steps=4", excluded)
    assert outcome.step == 4 and len(outcome.losses) == 1


def test_another_block_size_is_refused_or_starts_new_factors(tmp_path):
    job = jobs.write_job(tmp_path)
    run(2, job, *COMMON, "--training.steps=3")
    smaller = [*COMMON, "--training.steps=6", "--optimizer.shampoo.max_preconditioner_dim=32"]
    for outcome in run(2, job, *smaller):
        assert outcome.exit_code == 2 and outcome.losses == []
        assert f"{tmp_path}/checkpoint/step-3 does not fit this job" in outcome.logged
        assert "'max_preconditioner_dim' is 1024 in the checkpoint, but 32 here" in outcome.logged
        assert 'on_mismatch = "rebuild"' in outcome.logged
    outcome = run(2, job, *smaller, "--optimizer.shampoo.on_mismatch=rebuild")[0]
    assert outcome.step == 6 and outcome.losses[-1] < outcome.losses[0]
    assert "factors start anew for 'layers.0." in outcome.logged
