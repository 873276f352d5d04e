"""Resuming with another optimizer, and from folders that are far away."""

import shutil

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

from shampoo_torchtitan.checkpoint_folders import complete_checkpoints
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.shampoo_torchtitan import jobs
from tests.shampoo_torchtitan.jobs import run
from tests.shampoo_torchtitan.test_checkpoint_trouble import hostile_metadata

pytestmark = jobs.on_cpu

COMMON = ["--checkpoint.enable", "--checkpoint.interval=3", "--lr_scheduler.total_steps=9"]


def test_a_run_of_adamw_goes_on_with_shampoo_and_back(tmp_path):
    """Until its first preconditioned step, Shampoo of AdamW's momentum is AdamW: nothing of the
    moments is lost."""
    job, name = jobs.write_job(tmp_path), "--optimizer.name=AdamW"
    at_once = run(2, job, *COMMON, name, "--training.steps=9", "--checkpoint.folder=at_once")[0]
    assert not [name for name in at_once.metrics[-1] if name.startswith("shampoo/")]
    settings = [f"--checkpoint.initial_load_path={tmp_path}/at_once/step-3"]
    settings += ["--checkpoint.no-initial_load_model_only", "--optimizer.shampoo.beta3=0.9"]
    settings += ["--optimizer.shampoo.start_preconditioning_step=100"]
    shampoo = run(2, job, *COMMON, *settings, "--training.steps=6")
    assert shampoo[0].losses == pytest.approx(at_once.losses[3:6], rel=1e-5)
    assert "factors start anew for 'layers.0." in shampoo[0].logged
    assert "factors start anew" not in shampoo[1].logged
    back = run(2, job, *COMMON, name, "--training.steps=9")[0]
    assert back.losses == pytest.approx(at_once.losses[6:], rel=1e-5)


# --------------- folders that are reached through fsspec (s3://, gs://), here file:// and memory://


@pytest.mark.skipif(not JOBS_ARE_FUNCTIONS, reason="TorchTitan 0.2 does not look there")
def test_a_job_goes_on_and_is_looked_after(tmp_path):
    job, far = jobs.write_job(tmp_path), tmp_path / "far"
    common = ["--checkpoint.enable", f"--checkpoint.folder=file://{far}", "--checkpoint.interval=1"]
    run(2, job, *common, "--training.steps=3")
    (far / "step-5").mkdir()  # of a job that was killed while it saved
    later = [f"--checkpoint.initial_load_path=file://{far}/step-2", "--checkpoint.keep_latest_k=2"]
    after = run(2, job, *common, *later, "--training.steps=5")[0]
    assert after.step == 5 and len(after.losses) == 2
    # What is older than the newest two was deleted when step 4 had been saved.
    assert complete_checkpoints(f"file://{far}") == ["step-3", "step-4", "step-5"]

    whole = shutil.copytree(far / "step-5", tmp_path / "whole")
    hostile_metadata(whole, far / "step-5", f"touch {tmp_path}/ran")
    for outcome in run(2, job, *common, "--training.steps=6"):
        assert outcome.exit_code == 2
        assert f"file://{far}/step-5 is damaged or incomplete: .metadata is" in outcome.logged
        assert "there are: step-3, step-4." in outcome.logged
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(JOBS_ARE_FUNCTIONS, reason="TorchTitan 0.3 looks there")
def test_a_folder_that_torchtitan_never_loads_from_is_refused(tmp_path):
    job = jobs.write_job(tmp_path)
    arguments = [f"--job.dump_folder=file://{tmp_path}/far", "--training.steps=1"]
    for outcome in run(2, job, "--checkpoint.enable", *arguments):
        assert outcome.exit_code == 2 and outcome.losses == []
        assert "TorchTitan 0.2 never loads from it" in outcome.logged


def test_what_is_complete_is_found_anywhere():
    folder = "memory://job"
    assert complete_checkpoints(folder) == []
    for step in (2, 10):
        dcp.save({"x": torch.ones(2)}, checkpoint_id=f"{folder}/step-{step}")
    fsspec.filesystem("memory").pipe("/job/step-11/__0_0.distcp", b"of a job that was killed")
    assert complete_checkpoints(folder) == ["step-2", "step-10"]
