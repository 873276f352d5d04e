"""Every mesh that TorchTitan builds from a job's settings gives the update of one process."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import deterministic_gradients, full_parameters, set_gradients
from tests.ranks import run_ranks
from tests.shampoo_torchtitan import jobs

pipelines = pytest.mark.skipif(not jobs.PIPELINES, reason="needs torch 2.14 in TorchTitan 0.3")

STEPS = 10
SETTINGS = [
    "--optimizer.lr=1e-2",
    "--optimizer.shampoo.max_preconditioner_dim=32",
    "--optimizer.shampoo.precondition_frequency=3",
    "--optimizer.shampoo.start_preconditioning_step=3",
]


def degrees(**sizes: int) -> list[str]:
    return [f"--parallelism.{name}_degree={size}" for name, size in sizes.items()]


DP, REPLICAS = "data_parallel_shard", "data_parallel_replicate"
TP, PP = "tensor_parallel", "pipeline_parallel"
EP, ETP = "expert_parallel", "expert_tensor_parallel"
# The simpler ones are in test_training.
DENSE = {
    "HSDP2x2, TP2": (8, {REPLICAS: 2, TP: 2}),
    "TP4": (4, {TP: 4}),
    "DDP4": (4, {REPLICAS: 4, DP: 1}),
    "PP2xFSDP2": (4, {PP: 2}),
    "PP2xTP2": (4, {PP: 2, TP: 2}),
}
EXPERTS = {
    "EP2xFSDP2": (4, {EP: 2}),
    "EP2xETP2": (4, {TP: 2, EP: 2, ETP: 2}),
    "EP4, TP2": (4, {TP: 2, EP: 4}),
    "HSDP2x2, EP2": (4, {REPLICAS: 2, EP: 2}),
    "PP2xEP2": (4, {PP: 2, EP: 2}),
}

MESHES = {"llama3": DENSE, "deepseek_v3": EXPERTS}
CASES = [
    (model, mesh)
    for model, meshes in MESHES.items()
    for mesh, (_, sizes) in meshes.items()
    if (jobs.PIPELINES or PP not in sizes) and (jobs.EXPERT_TENSORS or ETP not in sizes)
]


def given_steps(job: Path, arguments: list[str]) -> dict[str, Tensor]:
    """This rank's parameters, whole, after steps with given gradients."""
    trainer = jobs.make_trainer(job, *arguments)
    parts = trainer.model_parts
    jobs.put_weights(parts)
    for step in range(STEPS):
        for part in parts:
            set_gradients(part, deterministic_gradients(part, step))
        trainer.optimizers.step()
    parameters = dict(itertools.chain(*(part.named_parameters() for part in parts)))
    result = full_parameters(parameters)
    trainer.close()
    return result


def after_given_steps(n: int, job: Path, *arguments: str) -> dict[str, Tensor]:
    """The parameters of all ranks' stages; every rank must agree on those that it has."""
    results = run_ranks(
        n, given_steps, init=False, job=job, arguments=[*SETTINGS, *arguments], timeout=180
    )
    together: dict[str, Tensor] = {}
    for parameters in results:
        for name, value in parameters.items():
            assert torch.equal(together.setdefault(name, value), value), name
    return together


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process reaches, by model."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        model: after_given_steps(1, jobs.write_job(folder), f"--model.name={model}")
        for model in ("llama3", "deepseek_v3")
    }


@jobs.on_cpu
@pipelines
def test_several_stages_on_a_rank_some_without_a_matrix(tmp_path, alone):
    stages = [
        "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
        "--parallelism.pipeline_parallel_layers_per_stage=1",
        *degrees(**{PP: 2}),
    ]
    found = after_given_steps(2, jobs.write_job(tmp_path), *stages)
    assert_equal(found, alone["llama3"])


@jobs.on_cpu
@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_the_update_is_that_of_one_process(tmp_path, alone, model, mesh):
    n, sizes = MESHES[model][mesh]
    arguments = [f"--model.name={model}", *degrees(**sizes)]
    assert_equal(after_given_steps(n, jobs.write_job(tmp_path), *arguments), alone[model])


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() / value.norm() <= 1e-5, name
