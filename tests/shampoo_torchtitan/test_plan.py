"""The plan of a job, made without running it. (That the job makes it: test_meshes.)"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.rules.device import on_device
from shampoo_fsdp.tools.models import model_specs
from shampoo_torchtitan import plan
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from shampoo_torchtitan.plan import job_plan, job_specs, main, read_job
from tests.shampoo_torchtitan import jobs


def specs_of(world_size: int, model: str, flavor: str, *settings: str, **degrees: int):
    arguments = [f"--model.name={model}", f"--model.flavor={flavor}", *settings]
    arguments += [f"--parallelism.{name}_degree={n}" for name, n in degrees.items()]
    return job_specs(read_job(arguments), world_size)


@pytest.mark.skipif(JOBS_ARE_FUNCTIONS, reason="built-in models have the names of 0.2")
@pytest.mark.parametrize(
    ("built_in", "mesh", "degrees"),
    [
        ("llama3-8b", {"dp_shard": 64}, {}),
        ("llama3-8b", {"dp_shard": 8, "tp": 4}, {"tensor_parallel": 4}),
        ("llama3-8b", {"dp_replicate": 2, "dp_shard": 8}, {"data_parallel_replicate": 2}),
        ("deepseek-v3-like", {"dp_shard": 64, "ep": 32}, {"expert_parallel": 32}),
    ],
)
def test_the_built_in_models_are_laid_out_as_torchtitan_does(built_in, mesh, degrees):
    model = ("llama3", "8B") if built_in == "llama3-8b" else ("deepseek_v3", "671B")
    ours = {spec.name: spec for spec in model_specs(built_in, mesh)}
    (theirs,) = specs_of(len(ours["output.weight"].ranks), *model, **degrees)
    matrices = {spec.name: spec for spec in theirs if len(spec.shape) > 1}
    assert matrices == {name: spec for name, spec in ours.items() if len(spec.shape) > 1}


@pytest.mark.skipif(not jobs.PIPELINES, reason="needs torch 2.14 in TorchTitan 0.3")
def test_each_part_of_a_pipeline_has_its_own_ranks_and_layers():
    schedule = "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"
    degrees = {"pipeline_parallel": 2, "tensor_parallel": 2}
    parts = specs_of(8, "llama3", "debugmodel", schedule, **degrees)
    assert len(parts) == 4  # two of each rank
    whole = {spec.name: spec.shape for spec in specs_of(1, "llama3", "debugmodel")[0]}
    of_parts = [(spec.name, spec.shape) for part in parts for spec in part]
    assert sorted(of_parts) == sorted(whole.items())
    ranks = [{spec.ranks for spec in part if len(spec.shape) > 1} for part in parts]
    assert ranks == [{(0, 1, 2, 3)}] * 2 + [{(4, 5, 6, 7)}] * 2


def test_embeddings_of_every_stage_are_known_by_their_type(monkeypatch):
    stages = [{"token": nn.Embedding(64, 8), "0": nn.Linear(8, 8)}, {"1": nn.Linear(8, 8)}]
    parts = [nn.ModuleDict(stage) for stage in stages]
    monkeypatch.setattr(plan.titan(), "model_parts", lambda config, dims: parts)
    config = read_job(["--model.name=llama3", "--optimizer.name=shampoo"])
    report = job_plan(config, job_specs(config, 1), 1).figures
    assert (report["parameters"], report["parameters_preconditioned"]) == (5, 2)
    with pytest.raises(ValueError, match=r"'exclude' is '\^tok_'; allowed: what the name of a"):
        config.optimizer.shampoo = ShampooConfig(exclude=["default", "^tok_"])
        job_plan(config, job_specs(config, 1), 1)


def test_settings_of_the_command_line_reach_the_plan():
    arguments = ["--model.name=llama3", "--model.flavor=8B", "--optimizer.name=shampoo"]
    arguments += ["--optimizer.shampoo.max_preconditioner_dim=2048"]
    config = read_job([*arguments, "--optimizer.shampoo.split_heads", r"w[qkv]+\.weight"])
    specs = job_specs(config, 16)
    heads = {"split_heads": [r"w[qkv]+\.weight"], "head_dim": 128}  # as the model has them
    given = ShampooConfig(max_preconditioner_dim=2048, **heads)
    for device in ("cuda", "cpu"):
        report = job_plan(config, specs, 16, device).figures
        assert report["settings"] == dataclasses.asdict(on_device(given, torch.device(device)))
    assert report["title"] == "llama3 8B on 16 ranks (dp_shard=16)"
    assert max(report["blocks_by_shape"]) == "2048 x 2048"


def test_the_command_reads_a_job_file_and_gpus_that_share_a_sequence_share_its_tokens(capsys):
    """Of 16 GPUs 4 work on each sequence by tensor and context parallelism."""
    job = Path(__file__).parents[2] / "configs" / "llama3_8b.toml"
    degrees = ("--parallelism.tensor_parallel_degree=2", "--parallelism.context_parallel_degree=2")
    batch = ("--training.local_batch_size=2", "--training.seq_len=4096")

    def report(*arguments: str) -> dict[str, Any]:
        command = ["--job.config_file", str(job), "--model.flavor=debugmodel", *batch]
        assert main([*command, "--world-size", "16", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    found = report()
    assert found["ranks"] == 16
    assert found["title"] == "llama3 debugmodel on 16 ranks (dp_shard=16)"
    alone, shared = found["step"], report(*degrees)["step"]
    assert alone["machine"]["tokens"] == shared["machine"]["tokens"] == 2 * 4096
    assert shared["training_ms"] == pytest.approx(alone["training_ms"] / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("7 --model.name llama3 --parallelism.tensor_parallel_degree 2", "WORLD_SIZE(7)"),
        ("0 --model.name llama3", "the degrees do not make 0 ranks"),
        ("4 --model.flavor 9B", "'9B'"),
        ("4 --job.config_file missing.toml", "missing.toml"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, message):
    assert main(["--world-size", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
