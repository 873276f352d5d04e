"""Every rule and its settings: steps on the device are those of the CPU in fp32."""

import functools

import pytest
import torch

from benchmarks.dry_run import dry_run
from shampoo_fsdp.config import RULES, ShampooConfig
from shampoo_fsdp.tools.machine import Machine
from tests.benchmarks.test_dry_run import specs
from tests.cuda.training import difference, trained

pytestmark = pytest.mark.cuda

BUILT_IN = ("shampoo", "kl_shampoo", "soap")
CPU = torch.device("cpu")
# Of the way that a parameter goes in 16 steps. Gradients are such that fp32 determines the update.
MOST = {"highest": 5e-4, "high": 5e-3, "medium": 0.02}
# Polynomials are in 16 bits and TF32 on a GPU in any precision, and kl_shampoo's steps of "qr" turn
# on the last bit.
MORE = {"polynomial": 0.02, "qr": 0.01}

METHODS = [(rule, method) for rule in BUILT_IN for method in RULES[rule].root_methods]
SETTINGS = [
    {"factor_dtype": "bfloat16", "root_method": "eigh"},
    {"root_dtype": "bfloat16"},
    {"momentum_dtype": "bfloat16"},
    {"symmetric_packing": True},
    {"weight_decay_type": "l2"},
    {"weight_decay_type": "independent"},
    *({"grafting": name} for name in ("rmsprop", "adagrad", "sgd", "none")),
    {"buckets": 3},
    {"momentum": 0.5, "nesterov": True},
    {"large_dim": "one_sided"},
    {"large_dim": "diagonal"},
    {"precondition_1d": True},
    {"refresh_schedule": "together"},
    {"communication_dtype": "bfloat16"},
]
# What is rounded to bf16 turns on the last bit of fp32 as well.
COARSE_STATE = ("factor_dtype", "root_dtype", "momentum_dtype", "communication_dtype")


@functools.cache
def on_cpu(*settings: tuple[str, object]) -> dict[str, torch.Tensor]:
    return trained(CPU, **dict(settings), matmul_precision="highest")


def default_root(rule: str, device: torch.device) -> str:
    """Both devices must take the same one."""
    products = ShampooConfig(preconditioner=rule).rule.root_method_by_products
    return products if products and device.type != "cpu" else RULES[rule].root_methods[0]


@pytest.mark.parametrize("precision", MOST)
@pytest.mark.parametrize(("rule", "method"), METHODS)
def test_every_root_method_in_every_precision(device, rule, method, precision):
    settings = {"preconditioner": rule, "root_method": method}
    found = trained(device, **settings, matmul_precision=precision)
    most = MOST[precision] + MORE.get(method, 0.0)
    assert difference(found, on_cpu(*settings.items())) < most


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rule", BUILT_IN)
def test_every_setting(device, rule, settings):
    settings = {"preconditioner": rule, "root_method": default_root(rule, device)} | settings
    found = trained(device, **settings, matmul_precision="highest")
    most = MOST["highest"] + MORE.get(settings["root_method"], 0.0)
    if not settings.keys().isdisjoint(COARSE_STATE):
        most += 0.01
    assert difference(found, on_cpu(*settings.items())) < most


@pytest.mark.parametrize("rule", BUILT_IN)
def test_what_a_device_chooses_itself(device, rule):
    """All defaults, root method and precision among them."""
    method = default_root(rule, device)
    expected = on_cpu(("preconditioner", rule), ("root_method", method))
    most = MOST["medium"] + MORE.get(method, 0.0)
    assert difference(trained(device, preconditioner=rule), expected) < most


def test_a_dry_run_beside_work_on_the_device(device):
    """Plans are made where GPUs are in use, too."""
    kept = torch.ones(8, device=device)
    found = dry_run(specs(2), ShampooConfig(max_preconditioner_dim=32), Machine())
    assert found["total"]["launches"] > 100 and found["peak bytes"] > 0
    assert kept.sum() == 8.0
