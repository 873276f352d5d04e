"""The job files that TorchTitan 0.2.2 ships, of models that 0.3 has."""

import json
import re
from pathlib import Path

import pytest
import torch

from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

if not JOBS_ARE_FUNCTIONS:
    pytest.skip("TorchTitan 0.2 reads its own", allow_module_level=True)

from shampoo_torchtitan import toml
from shampoo_torchtitan.configs import ShampooOptimizers

# By name, what each file says, by keys with dots (from Meta's TorchTitan, BSD 3-clause).
JOBS = json.loads((Path(__file__).parents[1] / "data/jobs-of-torchtitan-0.2.2.json").read_text())


@pytest.mark.parametrize("name", JOBS)
def test_it_is_read_and_its_model_built_and_what_is_left_out_is_said(name, caplog):
    config = toml.read("", JOBS[name] | {"optimizer.name": "shampoo"})
    assert isinstance(config.optimizer, ShampooOptimizers.Config)
    assert config.optimizer.lr == JOBS[name]["optimizer.lr"]
    assert config.training.seq_len == JOBS[name]["training.seq_len"]
    with torch.device("meta"):
        assert sum(p.numel() for p in config.model_spec.model.build().parameters()) > 0
    said = re.findall(r"TorchTitan 0.3 has no (\S+), which is left out", caplog.text)
    keys = {"model.converters"} & JOBS[name].keys()
    keys |= {"quantize"} if any(key.startswith("quantize.") for key in JOBS[name]) else set()
    option = JOBS[name].get("activation_checkpoint.selective_ac_option", "op")
    keys |= {"activation_checkpoint.selective_ac_option"} if option != "op" else set()
    assert sorted(said) == sorted(keys)


def test_there_are_twelve():
    assert len(JOBS) == 12
