"""Settings are refused by name, with what was found and what is allowed."""

import dataclasses

import pytest
import torch

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.config import FIELD_TEXTS
from shampoo_fsdp.tools.command import main


def build(**settings):
    return Shampoo([torch.nn.Parameter(torch.zeros(4, 4))], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_preconditioner_dim": 0}, r"max_preconditioner_dim.* 0; allowed: an integer >= 1"),
        ({"precondition_frequency": 2.5}, r"precondition_frequency.* 2\.5.*integer"),
        ({"beta3": 0.8, "betas": (0.0, 0.9)}, r"beta3.* 0\.8"),
        ({"root_method": "eigh_pseudo_inverse"}, "root_method.*for kl_shampoo"),
        ({"root_exponents": [0.5]}, r"root_exponents.*\[0\.5\]"),
        ({"refresh_schedule": "random"}, "'staggered' or 'together'"),
        ({"grafting_beta2": 1.0}, r"grafting_beta2.* 1\.0; allowed: 0 <= grafting_beta2 < 1"),
        ({"exclude": "embed"}, "exclude.*'embed'.*a list, each a string"),
        ({"exclude": ["("]}, r"exclude.*'\('.*regular expressions"),
        (
            {"split_heads": ["0"], "head_dim": 3, "exclude": []},
            "parameter '0' .* 4 rows; .* 'head_dim' = 3",
        ),
        ({"excluded_lr_factor": 0.0}, r"excluded_lr_factor.* 0\.0; allowed: a positive number"),
        ({"lr_factor": 0.0}, r"'lr_factor' is 0\.0; allowed: a positive number"),
        ({"lr_factor": -1}, "'lr_factor' is -1"),
        ({"lr_factor": float("nan")}, "'lr_factor' is nan"),
        ({"precondition_1d": "no"}, "precondition_1d.*'no'.*true or false"),
        ({"lr": torch.tensor(-0.1)}, "lr.* -0.1.*a finite number >= 0"),
        ({"lr": torch.ones(2)}, "lr.*tensor.*a tensor of one, of floating point, on the CPU"),
        ({"betas": (1.0, 0.9)}, r"beta1.* 1\.0; allowed: 0 <= beta1 < 1"),
        ({"betas": 0.9}, "betas.*two numbers"),
        ({"betas": (0.9, 1.0)}, r"'beta2' is 1\.0; allowed: a number below 1 for kl_shampoo"),
        (
            {"betas": (0.9, 1.0), "preconditioner": "shampoo"},
            r"'beta2' is 1\.0; allowed: a number below 1, .*'grafting_beta2' with which 'adam'",
        ),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": float("inf")}, "weight_decay.* inf"),
    ],
)
def test_impossible_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("preconditioner_frequency", "Did you mean 'precondition_frequency'?"),
        ("epsilon", "Did you mean 'eps' or 'preconditioner_eps'?"),
        ("xyzzy", "Allowed: max_preconditioner_dim, large_dim,"),
    ],
)
def test_an_unknown_setting_is_named_with_what_may_be_meant(name, said):
    with pytest.raises(TypeError) as error:
        build(**{name: 5})
    assert f"'{name}'. {said}" in str(error.value)
    assert ("Did you" in said) == ("Allowed" not in str(error.value))


def test_dashes_and_underscores_are_alike_in_commands(capsys):
    plan = ["plan", "--model", "llama3-8b", "--mesh", "dp_shard=2", "--device", "cpu", "--json"]
    assert main([*plan, "--max-preconditioner-dim=512"]) == 0
    dashes = capsys.readouterr().out
    assert main([*plan, "--max_preconditioner_dim", "512"]) == 0
    assert dashes == capsys.readouterr().out
    assert main([*plan, "--epsilon", "1e-8"]) == 2
    assert "Did you mean 'preconditioner_eps'?" in capsys.readouterr().err


def test_a_group_is_checked_as_well():
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"weight_decay.* -1"):
        Shampoo([{"params": [parameter], "weight_decay": -1}])
    with pytest.raises(ValueError, match=r"'lr_factor' is 0; allowed: a positive number"):
        Shampoo([{"params": [parameter], "lr_factor": 0}])


@pytest.mark.parametrize("frequency", [2, 10, 20])
@pytest.mark.parametrize("warmup", [None, 0, 1, 50])
def test_no_block_waits_for_more_than_two_periods(frequency, warmup):
    """Whatever its phase: were a length of the period in use for fewer steps than it has, late
    phases would miss their turn at each."""
    config = ShampooConfig(precondition_frequency=frequency, refresh_warmup_steps=warmup)
    for phase in range(frequency):
        last = 1
        for step in range(2, frequency**2):
            period = config.refresh_period(step)
            if (step + phase) % period == 0:
                last = step
            assert step - last < 2 * period


@pytest.mark.parametrize(
    ("name", "excluded"),
    [
        ("tok_embeddings.weight", True),
        ("transformer.wte.weight", True),
        ("output.weight", True),
        ("language_model.lm_head.weight", True),
        ("_orig_mod.module.output.weight", True),
        ("layers.0.attention.wo.weight", False),
        ("encoder.layer.0.output.dense.weight", False),
        ("members.weight", False),
    ],
)
def test_embeddings_and_the_output_layer_are_left_to_adam(name, excluded):
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    state = Shampoo([(name, parameter)]).state_dict()["state"][0]
    assert ("factors" not in state) == excluded


def test_help_explains_every_setting(capsys):
    names = {field.name for field in dataclasses.fields(ShampooConfig)}
    assert FIELD_TEXTS.keys() == names
    assert all(f"\n    {name}: {FIELD_TEXTS[name][:20]}" in ShampooConfig.__doc__ for name in names)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} " in told for name in names)
    assert "Steps between two refreshes" in told
