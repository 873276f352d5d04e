"""Reading a job: what is accepted, and what is said about the rest."""

from pathlib import Path

import pytest
from torchtitan.config import ConfigManager, JobConfig

from shampoo_torchtitan.job_config import check_degrees
from shampoo_torchtitan.train import JobReader

CONFIGS = Path(__file__).parents[2] / "configs"


def read(tmp_path, text, *arguments, reader=JobReader):
    job = tmp_path / "job.toml"
    job.write_text(text)
    return reader().parse_args(["--job.config_file", str(job), *arguments])


def test_settings_come_from_the_file_and_the_command_line(tmp_path):
    text = "[optimizer.shampoo]\nmax_preconditioner_dim = 512\nprecondition_frequency = 7"
    config = read(tmp_path, text, "--optimizer.shampoo.precondition_frequency", "5")
    assert config.optimizer.shampoo.max_preconditioner_dim == 512
    assert config.optimizer.shampoo.precondition_frequency == 5


def test_titans_own_reader_takes_the_table_through_custom_config_module(tmp_path):
    text = """
    [job]
    custom_config_module = "shampoo_torchtitan.job_config"
    [optimizer]
    name = "shampoo"
    [optimizer.shampoo]
    precondition_frequency = 7
    """
    for reader in (ConfigManager, JobReader):
        config = read(tmp_path, text, reader=reader)
        assert config.optimizer.shampoo.precondition_frequency == 7


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
    "unknown key": (
        "[optimizer.shampoo]\nprecondition_freq = 5",
        ["precondition_freq", "grafting"],
    ),
    "unknown key, close": ("[training]\nsteppes = 5", ["training.steppes", "'steps'"]),
    "unknown table": ("[optimiser]\nlr = 1.0", ["optimiser", "'optimizer'"]),
    "string for a number": ('[optimizer]\nlr = "fast"', ["optimizer.lr", "'fast'", "a number"]),
    "string for an integer": (
        '[optimizer.shampoo]\nprecondition_frequency = "5"',
        ["optimizer.shampoo.precondition_frequency", "'5'", "an integer"],
    ),
    "true for an integer": ("[training]\nsteps = true", ["training.steps", "an integer"]),
    "value for a table": ("[optimizer]\nshampoo = 3", ["optimizer.shampoo", "table"]),
    "removed": (
        "[optimizer.shampoo]\nmemory_cap = 3.0",
        ["optimizer.shampoo.memory_cap has been removed"],
    ),
    "removed choice": (
        '[optimizer.shampoo]\nowner_scope = "auto"',
        ["optimizer.shampoo.owner_scope", "'all' or 'shard' ('auto' has been removed)"],
    ),
    "not a choice": ('[optimizer.shampoo]\ngrafting = "x"', ["optimizer.shampoo.grafting", "'x'"]),
    "impossible": (
        "[optimizer.shampoo]\nprecondition_frequency = 0",
        ["optimizer.shampoo", "precondition_frequency", "0"],
    ),
    "impossible lr": ('[optimizer]\nname = "shampoo"\nlr = -1.0', ["lr", "-1.0"]),
    "impossible beta2": ('[optimizer]\nname = "shampoo"\nbeta2 = 1.5', ["beta2", "1.5"]),
    "unknown optimizer": (
        '[optimizer]\nname = "AdamWW"',
        ["optimizer.name", "AdamWW", "shampoo, Adam, AdamW"],
    ),
    "step in backward": (
        '[optimizer]\nname = "Shampoo"\nearly_step_in_backward = true',
        ["optimizer.early_step_in_backward", "shampoo"],
    ),
    "TorchFT": (
        '[optimizer]\nname = "shampoo"\n[fault_tolerance]\nenable = true',
        ["fault_tolerance.enable", "shampoo"],
    ),
    "not TOML": ("[optimizer", ["job.config_file", "not TOML"]),
}


@pytest.mark.parametrize("text, said", BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_one_readable_message(tmp_path, capsys, caplog, text, said):
    with pytest.raises(SystemExit) as end:
        read(tmp_path, text)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert not any(record.exc_info for record in caplog.records)
    assert len(message.splitlines()) == 1
    for part in said:
        assert part in message


@pytest.mark.parametrize("argument", ["precondition_frequency=0", "precondition_freq=5"])
def test_a_bad_argument_is_refused(tmp_path, capsys, argument):
    with pytest.raises(SystemExit) as end:
        read(tmp_path, "", f"--optimizer.shampoo.{argument}")
    assert end.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err


def test_help_explains_the_settings(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        read(tmp_path, "", "--help")
    assert end.value.code == 0
    words = capsys.readouterr().out
    assert "--optimizer.shampoo.precondition-frequency" in words
    assert "Steps between two refreshes" in words


def test_adamw_accepts_what_only_shampoo_refuses(tmp_path):
    text = '[optimizer]\nname = "AdamW"\nearly_step_in_backward = true'
    assert read(tmp_path, text).optimizer.early_step_in_backward


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.name)
def test_the_configurations_can_be_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)  # it may write the tokenizer
    assert JobReader().parse_args(["--job.config_file", str(path)]).optimizer.name == "shampoo"


@pytest.mark.parametrize(
    ("degrees", "ranks", "said"),
    [
        (
            {"tensor_parallel_degree": 3},
            2,
            "tensor_parallel_degree = 3: the degrees multiply to 3, ",
        ),
        (
            {"data_parallel_shard_degree": 4},
            2,
            "the degrees multiply to 4, which must be",
        ),
        ({"data_parallel_shard_degree": 1}, 2, "the degrees multiply to 1, which must be"),
    ],
)
def test_degrees_that_do_not_make_the_ranks_are_refused(degrees, ranks, said):
    config = JobConfig()
    for name, degree in degrees.items():
        setattr(config.parallelism, name, degree)
    with pytest.raises(ValueError, match=f"{said}.* ranks, {ranks}$"):
        check_degrees(config, ranks)
    check_degrees(JobConfig(), ranks)
