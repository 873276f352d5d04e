"""FSDP2 over NCCL: the weights are those of one process."""

import pytest
from torch import Tensor

from shampoo_fsdp import Shampoo
from tests.cuda.meshes import SETTINGS, sharded_llama, start
from tests.distributed.test_meshes import relative_difference
from tests.models import TinyLlama, full_parameters, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.cuda

STEPS = 12
EXACT = {"matmul_precision": "highest", "root_method": "coupled_newton"}
EXACT_SOAP = {
    "preconditioner": "soap",
    "matmul_precision": "highest",
    "start_preconditioning_step": 8,
}
# What each rank multiplies together may be rounded otherwise: to bf16 and TF32 with the defaults.
CASES = [
    (EXACT | {"preconditioner": "shampoo"}, 1e-4),
    (EXACT | {"buckets": 3}, 1e-4),
    # Bases that few gradients determine turn on the last bit.
    (EXACT_SOAP, 1e-3),
    ({}, 2e-2),
]


def trained(model: TinyLlama, settings: dict[str, object]) -> dict[str, Tensor]:
    train(model, Shampoo(model.named_parameters(), **SETTINGS, **settings), range(STEPS))
    return {name: p.cpu() for name, p in full_parameters(model).items()}


def train_on_ranks(device_type: str, settings: dict[str, object]) -> dict[str, Tensor]:
    start(device_type)
    return trained(sharded_llama(device_type), settings)


@pytest.mark.parametrize(("settings", "most"), CASES)
def test_ranks_equal_one_process(device, ranks, settings, most):
    alone = trained(TinyLlama().to(device), settings)
    given = {"device_type": device.type, "settings": settings}
    for parameters in run_ranks(ranks, train_on_ranks, init=False, **given):
        assert relative_difference(parameters, alone) <= most
