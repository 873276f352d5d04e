"""Reading a job: what is accepted, and what is said about the rest."""

import dataclasses
from pathlib import Path

import pytest
from torchtitan.config import ConfigManager
from torchtitan.hf_datasets.text_datasets import DATASETS

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from shampoo_torchtitan.train import JobReader

of_02 = pytest.mark.skipif(JOBS_ARE_FUNCTIONS, reason="a doorway of TorchTitan 0.2")
of_03 = pytest.mark.skipif(not JOBS_ARE_FUNCTIONS, reason="TorchTitan 0.2 has what this asks for")

CONFIGS = Path(__file__).parents[2] / "configs"


def read(tmp_path, text, *arguments, reader=JobReader):
    job = tmp_path / "job.toml"
    job.write_text(text)
    return reader().parse_args(["--job.config_file", str(job), *arguments])


def test_settings_come_from_the_file_and_the_command_line(tmp_path):
    text = '[optimizer]\nname = "shampoo"\n[optimizer.shampoo]\nprecondition_frequency = 7\n'
    text += "max_preconditioner_dim = 512"
    config = read(tmp_path, text, "--optimizer.shampoo.precondition_frequency", "5")
    assert config.optimizer.shampoo.max_preconditioner_dim == 512
    assert config.optimizer.shampoo.precondition_frequency == 5


@of_02
def test_titans_own_reader_takes_the_table_through_custom_config_module(tmp_path):
    text = """
    job.custom_config_module = "shampoo_torchtitan.job_config"
    optimizer.name = "shampoo"
    optimizer.shampoo.precondition_frequency = 7
    """
    for reader in (ConfigManager, JobReader):
        config = read(tmp_path, text, reader=reader)
        assert config.optimizer.shampoo.precondition_frequency == 7


@of_02
def test_a_users_own_config_module_keeps_working(tmp_path, monkeypatch):
    (tmp_path / "my_config.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Mine:\n    x: int = 1\n"
        "@dataclass\nclass JobConfig:\n    mine: Mine = field(default_factory=Mine)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = '[job]\ncustom_config_module = "my_config"\n[mine]\nx = 3\n[optimizer.shampoo]\n'
    config = read(tmp_path, text + "precondition_frequency = 7")
    assert (config.mine.x, config.optimizer.shampoo.precondition_frequency) == (3, 7)


BAD = {
    "unknown key": ("optimizer.shampoo.xyzzy = 5", ["optimizer.shampoo.xyzzy", "grafting"]),
    "another case": (
        "optimizer.Shampoo.precondition_frequency = 5",
        ["Did you mean 'optimizer.shampoo'?"],
    ),
    "another table": ("shampoo.precondition_frequency = 5", ["Did you mean 'optimizer.shampoo'?"]),
    "the table above": (
        "optimizer.precondition_frequency = 5",
        ["Did you mean 'optimizer.shampoo.precondition_frequency'?"],
    ),
    "the table below": ("optimizer.shampoo.lr = 1e-3", ["Did you mean 'optimizer.lr'?"]),
    "a name of others": (
        "optimizer.epsilon = 1e-8",
        ["Did you mean 'optimizer.eps' or 'optimizer.shampoo.preconditioner_eps'?"],
    ),
    "model": ('model.name = "lama3"', ["lama3"]),
    "flavor": ('model.flavor = "8b"', ["model.flavor", "'8b'", "'8B'"]),
    "optimizer": ('optimizer.name = "shampo"', ["optimizer.name", "'shampo'", "AdamW"]),
    "unknown key, close": ("training.steppes = 5", ["training.steppes", "'steps'"]),
    "string for a number": ('optimizer.lr = "fast"', ["optimizer.lr", "'fast'", "a number"]),
    "true for an integer": ("training.steps = true", ["training.steps", "an integer"]),
    "value for a table": ("optimizer.shampoo = 3", ["optimizer.shampoo", "table"]),
    "impossible": (
        "optimizer.shampoo.precondition_frequency = 0",
        ["optimizer.shampoo", "precondition_frequency", "0"],
    ),
    "impossible lr": ('optimizer.name = "shampoo"\noptimizer.lr = -1.0', ["lr", "-1.0"]),
    "step in backward": (
        'optimizer.name = "Shampoo"\noptimizer.early_step_in_backward = true',
        ["optimizer.early_step_in_backward"],
    ),
    "TorchFT": (
        'optimizer.name = "shampoo"\nfault_tolerance.enable = true',
        ["fault_tolerance.enable"],
    ),
    "degrees": (
        "parallelism.tensor_parallel_degree = 3",
        ["[parallelism]: the degrees do not make 1 ranks"],
    ),
    "not TOML": ("[optimizer", ["Expected ']'"]),
}
BAD_FROM_03_ON = {
    "not TOML": ("[optimizer", ["job.toml is not TOML: Expected ']'"]),
    "a list for a name": ('model.name = ["llama3"]', ["'model.name' is ['llama3']; allowed: "]),
    "number for a string": ("optimizer.name = 5", ["'optimizer.name' is 5; allowed: 'shampoo'"]),
    "string for a table": ('optimizer = "x"', ["a table, [optimizer]"]),
    "integer for a table": ("job = 3", ["unknown setting 'job'"]),
    "model of images": ('model.name = "flux"\nmodel.flavor = "flux-debug"', ["flux"]),
    "no such module": ('experimental.custom_import = "nosuch"', ["'nosuch'"]),
    "no such key": ("activation_checkpoint.early_stop = true", ["no such setting"]),
    "a key of 0.2": ('job.custom_config_module = "my.config"', ["no such setting"]),
    "a word": (
        'activation_checkpoint.mode = "some"',
        ["is 'some'; allowed: 'selective' or"],
    ),
    "groups": ('optimizer.param_groups = [{pattern = ".*"}]', ["optimizer.param_groups"]),
}
BAD |= BAD_FROM_03_ON if JOBS_ARE_FUNCTIONS else {}


@pytest.mark.parametrize("text, said", BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_one_readable_message(tmp_path, capsys, text, said):
    with pytest.raises(SystemExit) as end:
        read(tmp_path, text)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert len(message.splitlines()) == 1
    for part in said:
        assert part in message


@pytest.mark.parametrize("argument", ["precondition_frequency=0", "precondition_freq=5"])
def test_a_bad_argument_is_refused(tmp_path, capsys, argument):
    with pytest.raises(SystemExit) as end:
        read(tmp_path, '[optimizer]\nname = "shampoo"', f"--optimizer.shampoo.{argument}")
    assert end.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err


def test_help_explains_the_settings(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        read(tmp_path, '[optimizer]\nname = "shampoo"', "--help")
    assert end.value.code == 0
    words = capsys.readouterr().out
    assert "--optimizer.shampoo.precondition-frequency" in words
    assert "Steps between two refreshes" in words


@of_02
def test_adamw_accepts_what_only_shampoo_refuses(tmp_path):
    text = '[optimizer]\nname = "AdamW"\nearly_step_in_backward = true'
    assert read(tmp_path, text).optimizer.early_step_in_backward


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.name)
def test_the_configurations_can_be_read(path):
    optimizer = JobReader().parse_args(["--job.config_file", str(path)]).optimizer
    assert JOBS_ARE_FUNCTIONS or optimizer.name == "shampoo"
    assert optimizer.shampoo.precondition_frequency == 10


@of_03
def test_keys_of_02_go_where_they_are_now(tmp_path):
    text = """
    job.dump_folder = "here"
    job.description = "no matter"
    job.custom_config_module = "shampoo_torchtitan.job_config"
    experimental.custom_import = "shampoo_torchtitan.optimizer"
    profiling.enable_profiling = true
    training.dataset = "c4"
    [optimizer]
    name = "AdamW"
    lr = 0.5
    beta2 = 0.5
    [activation_checkpoint]
    mode = "full"
    selective_ac_option = "op"
    per_op_sac_force_recompute_mm_shapes_by_fqns = ""
    """
    config = read(tmp_path, text, "--job.dump_folder=there", "--optimizer.weight_decay", "0.25")
    assert config.dump_folder == "there" and config.profiler.enable_profiling
    dataset = config.dataloader.dataset
    assert dataset == "c4" or dataset.dataset is DATASETS["c4"]
    if hasattr(config.optimizer, "param_groups"):
        (group,) = config.optimizer.param_groups
        given = group.optimizer_kwargs
    else:  # from 0.4 on
        (adamw,) = config.optimizer.optimizers
        given = dataclasses.asdict(adamw)
    found = {key: given[key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert found == {"lr": 0.5, "betas": (0.9, 0.5), "eps": 1e-8, "weight_decay": 0.25}
