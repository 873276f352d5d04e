"""Training without a GPU."""

import pytest
import torch

from shampoo_torchtitan import cpu
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.shampoo_torchtitan import jobs

pytestmark = jobs.on_cpu


def test_settings_for_gpus_are_put_right(tmp_path):
    arguments = ["--activation_checkpoint.mode=full", "--training.mixed_precision_param=bfloat16"]
    config = jobs.read_job(jobs.write_job(tmp_path), *arguments)
    recomputed = config.activation_checkpoint
    assert recomputed is None if JOBS_ARE_FUNCTIONS else recomputed.mode == "none"
    assert config.training.mixed_precision_param == "float32"


def test_on_gpus_a_job_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "needed", lambda: False)
    config = jobs.read_job(jobs.write_job(tmp_path), "--activation_checkpoint.mode=full")
    recomputed = config.activation_checkpoint
    assert type(recomputed).__qualname__.startswith("FullAC") or recomputed.mode == "full"
    assert config.training.mixed_precision_param == "bfloat16"


def test_what_needs_a_gpu_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        jobs.read_job(jobs.write_job(tmp_path), "--parallelism.context_parallel_degree=2")
    assert "parallelism.context_parallel_degree = 2" in capsys.readouterr().err


def test_integer_histograms_count_tokens_per_expert():
    experts = torch.tensor([0, 3, 3, 1, 3])
    counts = torch.histc(experts, bins=4, min=0, max=4)
    assert counts.tolist() == [1, 1, 0, 3]
    assert counts.dtype == torch.int64
