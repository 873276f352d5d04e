"""Checkpoints of TorchTitan 0.2 in jobs of 0.3."""

import dataclasses
import pickle
import re
from pathlib import Path

import pytest

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from shampoo_torchtitan.names import name_in_03
from tests.shampoo_torchtitan import jobs
from tests.shampoo_torchtitan.jobs import run


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("output.weight", "lm_head.weight"),
        ("layers.3.attention.wk.weight", "layers.3.attention.qkv_linear.wk.weight"),
        ("layers.3.attention.wo.weight", "layers.3.attention.wo.weight"),
        ("layers.3.moe.experts.w1", "layers.3.moe.routed_experts.inner_experts.w1_EFD"),
        ("layers.3.moe.experts.w2", "layers.3.moe.routed_experts.inner_experts.w2_EDF"),
        ("layers.3.moe.shared_experts.w1.weight", "layers.3.moe.shared_experts.w1.weight"),
        ("layers.3.moe.expert_bias", "layers.3.moe.expert_bias_E"),
    ],
)
def test_names(old, new):
    assert name_in_03(old) == new


def as_02_would_name_it(checkpoint: Path) -> None:
    """Rewrites the names of a checkpoint of 0.3; 0.2 has no state for attention in one matrix."""

    def old(key: str) -> str:
        key = re.sub(r"\blm_head\.", "output.", key)
        return key.replace(".qkv_linear.", ".") if not key.startswith("optimizer") else key

    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    kept = [key for key in metadata.state_dict_metadata if "wqkv" not in key]
    metadata.state_dict_metadata = {old(key): metadata.state_dict_metadata[key] for key in kept}
    metadata.storage_data = {
        dataclasses.replace(index, fqn=old(index.fqn)): value
        for index, value in metadata.storage_data.items()
        if index.fqn in kept
    }
    metadata.planner_data = None
    file.write_bytes(pickle.dumps(metadata))


@jobs.on_cpu
@pytest.mark.skipif(not JOBS_ARE_FUNCTIONS, reason="0.2 has its own names")
def test_a_job_goes_on_with_what_fits_of_a_checkpoint_of_02(tmp_path):
    job = jobs.write_job(tmp_path)
    common = ["--checkpoint.enable", "--checkpoint.exclude_from_loading=dataloader"]
    (first,) = run(1, job, *common, "--training.steps=4")
    as_02_would_name_it(tmp_path / "checkpoint" / "step-4")
    (refused,) = run(1, job, *common, "--training.steps=8")
    assert refused.exit_code == 2
    qkv = "'layers.0.attention.qkv_linear.wqkv.weight'"
    assert f"no optimizer state for parameter {qkv}" in refused.logged
    rebuild = "--optimizer.shampoo.on_mismatch=rebuild"
    (outcome,) = run(1, job, *common, "--training.steps=8", rebuild)
    assert outcome.step == 8 and outcome.losses[0] < first.losses[-1]
    assert f"all starts anew for {qkv}" in outcome.logged
