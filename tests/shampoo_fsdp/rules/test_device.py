"""What a device decides, where the user does not."""

import pytest
import torch

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.rules import device as production
from shampoo_fsdp.rules.device import kernels_used, on_device, reasons
from shampoo_fsdp.rules.precision import has_fast_bfloat16
from tests.shampoo_fsdp.rules.matrices import trained

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAMPOO, SOAP = {"preconditioner": "shampoo"}, {"preconditioner": "soap"}


@pytest.mark.parametrize(
    ("settings", "device", "method", "precision", "roots"),
    [
        ({}, CPU, "eigh", "highest", "float32"),
        ({}, CUDA, "polynomial", "medium", "bfloat16"),
        (SHAMPOO, CUDA, "polynomial", "medium", "bfloat16"),
        (SOAP, CPU, "qr", "highest", "float32"),
        (SOAP, CUDA, "qr", "high", "float32"),
        (SOAP | {"matmul_precision": "medium"}, CUDA, "qr", "medium", "float32"),
        # Where products cannot take the roots they are decomposed.
        ({"factor_dtype": "bfloat16"}, CUDA, "polynomial", "medium", "bfloat16"),
        (SHAMPOO | {"root_exponents": [0.123]}, CUDA, "eigh", "medium", "bfloat16"),
        ({"root_method": "qr"}, CUDA, "qr", "medium", "float32"),
        ({"matmul_precision": "highest"}, CUDA, "polynomial", "highest", "float32"),
        ({"root_dtype": "float32"}, CUDA, "polynomial", "medium", "float32"),
    ],
)
def test_the_device_decides_what_is_not_given(settings, device, method, precision, roots):
    config = on_device(ShampooConfig(**settings), device)
    assert (config.root_method, config.matmul_precision) == (method, precision)
    assert config.root_dtype == roots
    assert on_device(config, CPU) == config and reasons(config, CPU) == ""


def test_cpus_multiply_in_16_bits_where_they_can_and_old_gpus_in_fp32(monkeypatch):
    monkeypatch.setattr(production, "has_fast_bfloat16", lambda _: True)
    assert on_device(ShampooConfig(), CPU).matmul_precision == "medium"
    assert on_device(ShampooConfig(**SOAP), CPU).matmul_precision == "highest"  # no TF32
    monkeypatch.setattr(production, "has_fast_bfloat16", has_fast_bfloat16)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert on_device(ShampooConfig(), CUDA).matmul_precision == "highest"


def test_a_gpu_is_not_used_to_be_asked(monkeypatch):
    """A plan on a login node would take a GPU, with some hundred MB, from who works there."""

    def asked(**_: object) -> bool:
        torch.cuda.init()
        return False

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("it has been used"))
    assert has_fast_bfloat16("cuda")


@pytest.mark.parametrize("preconditioner", ["shampoo", "kl_shampoo"])
def test_roots_are_kept_as_products_read_them_which_changes_nothing(preconditioner):
    settings = {"preconditioner": preconditioner, "matmul_precision": "medium"}
    kept, _ = trained(range(12), root_dtype="float32", **settings)
    rounded, optimizer = trained(range(12), **settings)
    assert optimizer.config.root_dtype == "bfloat16"
    assert torch.equal(kept, rounded)


def test_the_optimizer_says_what_it_chose():
    optimizer = Shampoo([("w", torch.nn.Parameter(torch.ones(2, 2)))])
    expected = "root_method = 'eigh', matmul_precision = 'highest' (the default on cpu)"
    assert optimizer.chosen_by_device == expected


@pytest.mark.parametrize("preconditioner", ["shampoo", "kl_shampoo"])
def test_a_checkpoint_moves_between_devices(preconditioner):
    """As far as their settings are concerned: the state has the same entries."""
    gpu = {"root_method": "polynomial", "matmul_precision": "medium"}
    cpu = {"root_method": "eigh", "matmul_precision": "highest"}
    for first, second in ((gpu, cpu), (cpu, gpu)):
        _, optimizer = trained(range(8), preconditioner=preconditioner, **first)
        state = optimizer.state_dict()
        went_on, _ = trained(range(8, 16), state, preconditioner=preconditioner, **first)
        moved, _ = trained(range(8, 16), state, preconditioner=preconditioner, **second)
        assert (moved - went_on).norm() < 0.1 * went_on.norm()


@pytest.mark.parametrize("preconditioner", ["shampoo", "kl_shampoo", "soap"])
def test_products_in_bf16_change_little_and_something(preconditioner):
    exact, _ = trained(range(20), preconditioner=preconditioner, matmul_precision="highest")
    rounded, _ = trained(range(20), preconditioner=preconditioner, matmul_precision="medium")
    assert 0.0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_whose_kernels_a_gpu_takes_and_why():
    lacking = kernels_used(ShampooConfig(), CUDA)
    assert lacking.startswith("PyTorch's kernels alone (") or lacking == "kernels of its own"
    assert kernels_used(ShampooConfig(kernels="off"), CUDA).endswith("(kernels = 'off')")
    assert kernels_used(ShampooConfig(), CPU) == ""
