"""Jobs of a checkout of TorchTitan's main (August 2026, b5bcd76c), which `TITAN=main` asks for."""

import importlib.util
import json
import math
import os
from pathlib import Path
from unittest import mock

import pytest

if not importlib.util.find_spec("torchtitan.components.data"):
    pytest.skip("needs TorchTitan's main of August 2026", allow_module_level=True)

from torchtitan.components.metrics import BaseLogger

from shampoo_torchtitan import toml
from shampoo_torchtitan.plan import main
from shampoo_torchtitan.train import JobReader, Trainer
from tests.ranks import run_ranks
from tests.shampoo_torchtitan.jobs import write_job

REGISTRY = "--module=tests.shampoo_torchtitan.registry_main"


def job(arguments: list[str], text: str = "") -> list[float]:
    """The losses of the steps of a job."""
    os.environ["TEXT_OF_THE_TEST"] = f"{text}.{os.environ['RANK']}"
    losses: list[float] = []
    key = "loss_metrics/global_avg_loss"
    log = lambda self, m, step: losses.extend([m[key]] if key in m else [])  # noqa: E731
    trainer = Trainer(JobReader().parse_args(arguments))
    with mock.patch.object(BaseLogger, "log", log), mock.patch("time.sleep"):
        trainer.train()
    trainer.close()
    return losses


def run(folder: Path, n: int, config: str, steps: int, *more: str) -> list[float]:
    arguments = [f"--config={config}", f"--dump_folder={folder}", f"--training.steps={steps}"]
    arguments += ["--checkpoint.exclude_from_loading=dataloader", *more]
    given = {"arguments": [REGISTRY, *arguments], "text": str(folder / "text")}
    return run_ranks(n, job, init=False, timeout=900, **given)[0]


def test_it_trains_and_goes_on_on_another_mesh_and_with_adamw_and_back(tmp_path):
    losses = run(tmp_path, 2, "kl_shampoo", 4)
    losses += run(tmp_path, 1, "kl_shampoo", 6)
    losses += run(tmp_path, 2, "adamw", 8)
    losses += run(tmp_path, 2, "kl_shampoo", 10)
    # As many as steps: each goes on where the last one was.
    assert len(losses) == 10 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.3


def test_a_plan_and_a_wrong_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEXT_OF_THE_TEST", str(tmp_path / "text"))
    arguments = [REGISTRY, "--config=kl_shampoo", "--world-size=8", "--json"]
    assert main([*arguments, "--optimizer.shampoo.precondition-frequency=5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["settings"]["precondition_frequency"]) == (8, 5)
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--optimizer.lr=-1.0"])
    assert refused.value.code == 2
    assert "'lr' is -1.0; allowed: a finite number >= 0" in capsys.readouterr().err


def test_a_file_trains_and_goes_on_on_another_mesh(tmp_path):
    file = write_job(tmp_path)
    arguments = [f"--job.config_file={file}", "--checkpoint.enable", "--validation.enable"]
    arguments += ["--validation.dataset=python_source_validation", "--validation.steps=1"]
    arguments += [f"--validation.dataset_path={tmp_path}/source"]
    losses = run_ranks(2, job, init=False, timeout=900, arguments=arguments)[0]
    more = ["--training.steps=6", "--checkpoint.exclude_from_loading=dataloader"]
    losses += run_ranks(1, job, init=False, timeout=900, arguments=[*arguments, *more])[0]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    "settings",
    [
        ["--model.name=deepseek_v3", "--parallelism.expert_parallel_degree=2"],
        ["--parallelism.pipeline_parallel_degree=2"],
    ],
    ids=["experts", "stages"],
)
def test_a_file_with_experts_or_stages_trains(settings, tmp_path):
    file = write_job(tmp_path)
    arguments = [f"--job.config_file={file}", *settings]
    *_, losses = run_ranks(2, job, init=False, timeout=900, arguments=arguments)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.2


def test_what_a_file_says_of_batches_and_text(tmp_path):
    settings = {"training.seq_len": 64, "training.local_batch_size": 6}
    config = toml.read("", settings | {"training.global_batch_size": 24})
    training = config.training
    assert training.max_context_length == 64
    assert training.num_tokens_per_microbatch_per_dp_rank == 6 * 64
    assert training.num_tokens_per_train_step == 24 * 64
    stages = {"parallelism.pipeline_parallel_degree": 2}
    size = {"parallelism.pipeline_parallel_microbatch_size": 2}
    config = toml.read("", settings | stages | size)
    assert config.training.num_tokens_per_microbatch_per_dp_rank == 2 * 64
    assert config.parallelism.num_pp_microbatches == 3
    path = {"training.dataset_path": str(tmp_path)}
    source = toml.read("", {"training.dataset": "C4"} | path).dataloader.dataset.dataset.source
    assert (source.path, source.name) == (str(tmp_path), "en")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"training.seq_len": 0}, "training.seq_len' is 0; allowed: an integer >= 1"),
        ({"training.dataset": "c5"}, "training.dataset' is 'c5'; allowed: .*'c4'"),
        ({"validation.dataset_path": 3}, "validation.dataset_path' is 3; allowed: the path"),
        ({"training.dataloader.num_workers": 2}, "'training.dataloader.num_workers'"),
        ({"dataloader.dataset": "c4"}, "dataloader.dataset = 'c4': a file cannot say it"),
        (
            {
                "parallelism.pipeline_parallel_degree": 2,
                "parallelism.pipeline_parallel_microbatch_size": 3,
            },
            "microbatch_size' is 3; allowed: a divisor of training.local_batch_size = 8",
        ),
    ],
)
def test_what_a_file_cannot_say_here_is_named(settings, said):
    with pytest.raises((TypeError, ValueError), match=said):
        toml.read("", settings)
