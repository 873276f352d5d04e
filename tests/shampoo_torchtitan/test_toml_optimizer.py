"""[optimizer] of a file in TOML that starts from a function of a user's own registry."""

import sys
from dataclasses import dataclass

import pytest

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

if not JOBS_ARE_FUNCTIONS:
    pytest.skip("TorchTitan 0.2 has TOML files alone", allow_module_level=True)

from torchtitan.components.optimizer import (
    OptimizersContainer,
    ParamGroupConfig,
    default_adamw,
)

from shampoo_torchtitan import toml
from shampoo_torchtitan.configs import ShampooOptimizers, shampoo, use_shampoo
from shampoo_torchtitan.container import JobError
from shampoo_torchtitan.param_groups import groups_with_defaults

REGISTRY = """
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig, default_adamw
from shampoo_torchtitan import toml
from shampoo_torchtitan.configs import shampoo

def job(optimizer):
    config = toml.read("")
    config.optimizer = optimizer
    return config

def adamw():
    return job(default_adamw(lr=3e-4, weight_decay=0.3))

def of_shampoo():
    return job(shampoo(lr=1e-3, weight_decay=0.2, precondition_frequency=20))

def group(pattern, name, lr):
    return ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": lr})

def muon():
    groups = [group("layers", "DistMuon", 0.02), group(".*", "AdamW", 3e-4)]
    return job(OptimizersContainer.Config(param_groups=groups))

def in_groups():
    groups = [ParamGroupConfig(pattern=".*", optimizer_name="Shampoo")]
    return job(shampoo(lr=1e-3, weight_decay=0.2, param_groups=groups))

def only_muon():
    config = muon()
    config.optimizer.param_groups.pop()
    return config
"""


@pytest.fixture
def optimizer(tmp_path, monkeypatch):
    """The optimizer of a file with these lines of [optimizer] on a function."""
    (tmp_path / "registry_of_user.py").write_text(REGISTRY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "registry_of_user", raising=False)

    def read(function, *lines):
        file = tmp_path / "job.toml"
        text = ["[job]", 'module = "registry_of_user"', f'config = "{function}"', "[optimizer]"]
        file.write_text("\n".join([*text, *lines]))
        return toml.read(str(file)).optimizer

    return read


def test_settings_change_a_shampoo_that_is_there(optimizer):
    changed = optimizer("of_shampoo", "lr = 5e-3", "shampoo.max_preconditioner_dim = 64")
    assert (changed.lr, changed.weight_decay) == (5e-3, 0.2)
    assert changed.shampoo.max_preconditioner_dim == 64
    assert changed.shampoo.precondition_frequency == 20
    assert optimizer("of_shampoo", 'name = "shampoo"').lr == 1e-3


@pytest.mark.parametrize(("lines", "lr"), [([], 1e-3), (["lr = 5e-3"], 5e-3)])
def test_groups_that_took_their_lr_from_the_job_still_do(optimizer, lines, lr):
    (group,) = groups_with_defaults(optimizer("in_groups", *lines))
    expected = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.2}
    assert group.optimizer_kwargs == expected


def test_a_shampoo_that_is_there_becomes_adamw(optimizer):
    changed = optimizer("of_shampoo", 'name = "AdamW"', "beta2 = 0.99")
    assert type(changed) is OptimizersContainer.Config
    (group,) = changed.param_groups
    assert group.optimizer_name == "AdamW"
    expected = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.2}
    assert group.optimizer_kwargs == expected


def test_adamw_becomes_shampoo_and_keeps_what_it_had(optimizer):
    changed = optimizer("adamw", 'name = "shampoo"', "shampoo.precondition_frequency = 5")
    assert isinstance(changed, ShampooOptimizers.Config)
    (group,) = changed.param_groups
    assert group.optimizer_name == "Shampoo"
    assert (group.optimizer_kwargs["lr"], group.optimizer_kwargs["weight_decay"]) == (3e-4, 0.3)
    assert changed.shampoo.precondition_frequency == 5


def test_groups_of_others_stay_as_they_are(optimizer):
    for lines in ([], ["lr = 1e-3"], ['name = "shampoo"', "beta1 = 0.8"]):
        muon, other = optimizer("muon", *lines).param_groups
        assert (muon.optimizer_name, muon.optimizer_kwargs) == ("DistMuon", {"lr": 0.02})
    assert other.optimizer_name == "Shampoo"
    assert other.optimizer_kwargs == {"lr": 3e-4, "betas": (0.8, 0.95)}
    with pytest.raises(ValueError, match=r"optimizer\.lr would change nothing.*DistMuon"):
        optimizer("only_muon", "lr = 1e-3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer.name = 5", "optimizer.name = 5: must be one of"),
        ("optimizer.lr = -1.0", "'lr' is -1.0"),
        ('optimizer = "x"', r"optimizer = 'x': must be a table"),
        ('model = "llama3"', r"model = 'llama3': must be a table, \[model\]"),
        ("model.name = 5", "there is no module 'torchtitan.models.5'"),
        ('model.name = "common"', "model.name = 'common': torchtitan.models.common has no model"),
        ("model.flavor = []", r"model.flavor = \[\]: llama3 has no such flavor"),
        ("job = 3", r"job = 3: must be a table, \[job\]"),
        ('job.module = 3\njob.config = "x"', "there is no module"),
        ('experimental.custom_import = "nosuch"', "there is no module 'nosuch'"),
        ('job.custom_config_module = "my.config"', "subclass Trainer.Config"),
        ('optimizer.param_groups = [{pattern = ".*"}]', "start from a function"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, text, said):
    file = tmp_path / "job.toml"
    file.write_text(text)
    with pytest.raises((ValueError, TypeError), match=said):
        toml.read(str(file))


def test_what_changes_nothing_is_no_trouble(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(
        "[optimizer]\nearly_step_in_backward = false\n[model]\nconverters = []\n"
        '[fault_tolerance]\nenable = false\n[experimental]\ncustom_import = "shampoo_torchtitan"\n'
        '[parallelism]\ndisable_loss_parallel = false\ncontext_parallel_rotate_method = "allgather"'
    )
    toml.read(str(file))


def test_a_module_of_the_user_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "job.toml"
    file.write_text('[experimental]\ncustom_import = "my_own_data"')
    toml.read(str(file))
    assert sys.modules.pop("my_own_data")


def test_groups_take_what_they_do_not_say_from_the_job():
    group = ParamGroupConfig(pattern=".*", optimizer_name="Shampoo")
    own = ParamGroupConfig(pattern="x", optimizer_name="Shampoo", optimizer_kwargs={"lr": 1.0})
    found = groups_with_defaults(shampoo(lr=7e-3, param_groups=[own, group]))
    assert [g.optimizer_kwargs["lr"] for g in found] == [1.0, 7e-3]
    with pytest.raises(ValueError, match=r"optimizer\.lr = 0\.007 would change nothing"):
        groups_with_defaults(shampoo(lr=7e-3, param_groups=[own]))


def test_an_override_sets_every_hyperparameter():
    old = default_adamw(lr=1e-3)
    config = use_shampoo(old, lr=4e-3, betas=[0.8, 0.9], weight_decay=0.2, beta3=0.5)
    (group,) = config.param_groups
    expected = {"lr": 4e-3, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.2}
    assert (group.optimizer_name, group.optimizer_kwargs) == ("Shampoo", expected)
    assert config.shampoo.beta3 == 0.5
    assert use_shampoo(shampoo(lr=1e-3), lr=4e-3).param_groups[0].optimizer_kwargs["lr"] == 4e-3


def test_the_lr_that_adamw_had_is_said_with_what_is_better(caplog, optimizer):
    advice = "lr = 0.0003 is the one of AdamW; Shampoo is best with about 3 times that"
    for keep in (
        lambda: use_shampoo(default_adamw(lr=3e-4)),
        lambda: optimizer("adamw", 'name = "shampoo"'),
    ):
        caplog.clear()
        keep()
        assert advice in caplog.text
    caplog.clear()
    use_shampoo(default_adamw(lr=3e-4), lr=9e-4)
    optimizer("adamw", 'name = "shampoo"', "lr = 9e-4")
    assert "is the one of AdamW" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "'lr' is -1.0; allowed: a finite number >= 0"),
        ({"lr": "x"}, "'lr' is 'x'"),
        ({"betas": 0.9}, r"'betas' is 0.9; allowed: two numbers"),
        ({"beta1": 0.9}, "'beta1' is 0.9; .* 'betas'"),
        ({"precondition_frequncy": 2}, "Did you mean 'precondition_frequency'"),
    ],
)
def test_a_bad_setting_of_an_override_is_one_line(settings, said):
    with pytest.raises(JobError, match=f"Bad job settings: use_shampoo: .*{said}") as error:
        use_shampoo(default_adamw(), **settings)
    assert "\n" not in str(error.value) and error.value.__suppress_context__


def test_a_container_of_another_kind_is_not_replaced_in_silence():
    class Mine(OptimizersContainer):
        @dataclass(kw_only=True, slots=True)
        class Config(OptimizersContainer.Config):
            pass

    with pytest.raises(ValueError, match=r"the job's optimizers are a .*Mine\.Config"):
        use_shampoo(Mine.Config())
    assert use_shampoo(shampoo(precondition_frequency=3), beta3=0.5, fused=True).shampoo == (
        shampoo(precondition_frequency=3, beta3=0.5).shampoo
    )
