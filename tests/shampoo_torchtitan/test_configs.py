"""Jobs of TorchTitan 0.3: files in TOML, groups of parameters, and the override `use_shampoo`."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

if not JOBS_ARE_FUNCTIONS:
    pytest.skip("TorchTitan 0.2 has TOML files alone", allow_module_level=True)

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig, default_adamw

from shampoo_torchtitan import toml
from shampoo_torchtitan.configs import ShampooOptimizers, shampoo, use_shampoo
from shampoo_torchtitan.container import JobError
from shampoo_torchtitan.generation import TEXT_IS_OF_GRAIN, groups

of_03 = pytest.mark.skipif(groups().FIELD != "param_groups", reason="the groups of TorchTitan 0.3")


def test_what_changes_nothing_is_no_trouble_and_a_users_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"optimizer.early_step_in_backward": False, "model.converters": []}
    settings |= {"fault_tolerance.enable": False, "experimental.custom_import": "my_own_data"}
    settings |= {"parallelism.disable_loss_parallel": False}
    toml.read("", settings | {"parallelism.context_parallel_rotate_method": "allgather"})
    assert sys.modules.pop("my_own_data")


@of_03
def test_groups_take_what_they_do_not_say_from_the_job():
    group = ParamGroupConfig(pattern=".*", optimizer_name="Shampoo")
    own = ParamGroupConfig(pattern="x", optimizer_name="Shampoo", optimizer_kwargs={"lr": 1.0})
    found = groups().complete(shampoo(lr=7e-3, param_groups=[own, group]), [], {}).param_groups
    assert [g.optimizer_kwargs["lr"] for g in found] == [1.0, 7e-3]
    with pytest.raises(ValueError, match=r"optimizer\.lr = 0\.007 would change nothing"):
        groups().complete(shampoo(lr=7e-3, param_groups=[own]), [], {})


@of_03
def test_an_override_sets_every_hyperparameter_of_adamws_groups():
    old = default_adamw(lr=1e-3)
    muon = ParamGroupConfig(pattern="layers", optimizer_name="DistMuon", optimizer_kwargs={})
    old.param_groups.insert(0, muon)
    config = use_shampoo(old, lr=4e-3, betas=[0.8, 0.9], weight_decay=0.2, beta3=0.5, fused=True)
    other, group = config.param_groups
    expected = {"lr": 4e-3, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.2}
    assert (group.optimizer_name, group.optimizer_kwargs) == ("Shampoo", expected)
    assert other is muon and config.shampoo.beta3 == 0.5


def test_an_override_keeps_the_lr_that_adamw_had():
    (group,) = getattr(use_shampoo(default_adamw(lr=3e-4)), groups().FIELD)
    assert getattr(group, "lr", None) == 3e-4 or group.optimizer_kwargs["lr"] == 3e-4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "'lr' is -1.0; allowed: a finite number >= 0"),
        ({"betas": 0.9}, r"'betas' is 0.9; allowed: two numbers"),
        ({"beta1": 0.9}, "'beta1'"),
        ({"precondition_frequncy": 2}, "Did you mean 'precondition_frequency'"),
    ],
)
def test_a_bad_setting_of_an_override_is_one_line(settings, said):
    with pytest.raises(JobError, match=f"Bad job settings: use_shampoo: .*{said}") as error:
        use_shampoo(default_adamw(), **settings)
    assert "\n" not in str(error.value) and error.value.__suppress_context__


def test_optimizers_of_others_are_not_replaced_in_silence():
    class Mine(OptimizersContainer):
        @dataclass(kw_only=True, slots=True)
        class Config(OptimizersContainer.Config):
            pass

    with pytest.raises(ValueError, match=r"the job's optimizers are a .*Mine\.Config"):
        use_shampoo(Mine.Config())
    with pytest.raises(ValueError, match="the job has no groups of Adam or AdamW"):
        use_shampoo(OptimizersContainer.Config())


@of_03
def test_before_04_it_is_said_what_there_is():
    with pytest.raises(ImportError, match=r"with 0\.3 use shampoo_torchtitan\.configs\.shampoo"):
        from shampoo_torchtitan import Shampoo  # noqa: F401


# ------------------------------------- the job files that TorchTitan 0.2.2 ships

# By name, what each file says, by keys with dots (from Meta's TorchTitan, BSD 3-clause).
JOBS = json.loads((Path(__file__).parents[1] / "data/jobs-of-torchtitan-0.2.2.json").read_text())
assert len(JOBS) == 12


@pytest.mark.parametrize("name", JOBS)
def test_it_is_read_and_its_model_built_and_what_is_left_out_is_said(name, caplog):
    config = toml.read("", JOBS[name] | {"optimizer.name": "shampoo"})
    assert isinstance(config.optimizer, ShampooOptimizers.Config)
    assert config.optimizer.lr == JOBS[name]["optimizer.lr"]
    length = "max_context_length" if TEXT_IS_OF_GRAIN else "seq_len"
    assert getattr(config.training, length) == JOBS[name]["training.seq_len"]
    with torch.device("meta"):
        assert sum(p.numel() for p in config.model_spec.model.build().parameters()) > 0
    said = re.findall(r"TorchTitan has no (\S+), which is left out", caplog.text)
    keys = {"model.converters"} & JOBS[name].keys()
    keys |= {"quantize"} if any(key.startswith("quantize.") for key in JOBS[name]) else set()
    option = JOBS[name].get("activation_checkpoint.selective_ac_option", "op")
    keys |= {"activation_checkpoint.selective_ac_option"} if option != "op" else set()
    assert sorted(said) == sorted(keys)
