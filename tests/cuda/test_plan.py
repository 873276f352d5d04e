"""Plans are made where GPUs are in use, too."""

import pytest
import torch

from benchmarks.dry_run import dry_run
from shampoo_fsdp import ShampooConfig
from shampoo_fsdp.tools.machine import Machine
from tests.benchmarks.test_dry_run import specs

pytestmark = pytest.mark.cuda


def test_a_dry_run_beside_work_on_the_device(device):
    kept = torch.ones(8, device=device)
    found = dry_run(specs(2), ShampooConfig(max_preconditioner_dim=32), Machine())
    assert found["total"]["launches"] > 100 and found["peak bytes"] > 0
    assert kept.sum() == 8.0
