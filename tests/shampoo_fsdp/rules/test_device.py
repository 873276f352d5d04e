"""What a device decides, where the user does not."""

import pytest
import torch

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.rules import device as production
from shampoo_fsdp.rules import precision
from shampoo_fsdp.rules.device import on_device, reasons
from shampoo_fsdp.rules.precision import has_fast_bfloat16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(device: torch.device, **settings: object) -> tuple[str | None, str | None]:
    config = on_device(ShampooConfig(**settings), device)
    return config.root_method, config.matmul_precision


def test_accelerators_take_roots_by_products_and_multiply_in_16_bits():
    assert chosen(CUDA) == ("polynomial", "medium")
    assert chosen(CUDA, preconditioner="shampoo") == ("polynomial", "medium")
    assert chosen(CUDA, preconditioner="soap") == ("qr", "high")


def test_cpus_decompose_and_multiply_in_16_bits_where_they_can(monkeypatch):
    assert chosen(CPU) == ("eigh", "highest")
    monkeypatch.setattr(production, "has_fast_bfloat16", lambda _: True)
    assert chosen(CPU) == ("eigh", "medium")
    assert chosen(CPU, preconditioner="soap") == ("qr", "highest")  # no TF32


def test_a_gpu_is_not_used_to_be_asked(monkeypatch):
    """A plan on a login node would take a GPU, with some hundred MB, from who works there."""

    def asked(**_: object) -> bool:
        torch.cuda.init()
        return False

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("it has been used"))
    assert has_fast_bfloat16("cuda")


def test_an_old_gpu_multiplies_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(precision, "_fast_bfloat16", {})
    monkeypatch.setattr(production, "has_fast_bfloat16", has_fast_bfloat16)
    assert chosen(CUDA) == ("polynomial", "highest")


def test_roots_are_kept_as_products_read_them():
    assert on_device(ShampooConfig(), CUDA).root_dtype == "bfloat16"
    assert on_device(ShampooConfig(), CPU).root_dtype == "float32"
    for keeps in ({"preconditioner": "soap"}, {"root_method": "qr"}, {"root_dtype": "float32"}):
        settings = on_device(ShampooConfig(matmul_precision="medium", **keeps), CUDA)
        assert settings.root_dtype == "float32"


@pytest.mark.parametrize("preconditioner", ["shampoo", "kl_shampoo"])
def test_and_that_changes_nothing(preconditioner):
    settings = {"preconditioner": preconditioner, "matmul_precision": "medium"}
    kept, _ = trained(range(12), root_dtype="float32", **settings)
    rounded, optimizer = trained(range(12), **settings)
    assert optimizer.config.root_dtype == "bfloat16"
    assert torch.equal(kept, rounded)


@pytest.mark.parametrize("settings", [{"factor_dtype": "bfloat16"}, {"root_exponents": [0.123]}])
def test_where_products_cannot_take_the_roots_they_are_decomposed(settings):
    assert chosen(CUDA, preconditioner="shampoo", **settings)[0] == "eigh"
    assert "cannot" in reasons(ShampooConfig(preconditioner="shampoo", **settings), CUDA)


def test_what_is_given_stays():
    given = {"root_method": "qr", "matmul_precision": "highest", "root_dtype": "float32"}
    assert chosen(CUDA, **given) == ("qr", "highest")
    assert reasons(ShampooConfig(**given), CUDA) == ""


def test_the_optimizer_says_what_it_chose_and_why():
    optimizer = Shampoo([("w", torch.nn.Parameter(torch.ones(2, 2)))])
    assert (optimizer.config.root_method, optimizer.config.matmul_precision) == ("eigh", "highest")
    expected = (
        "root_method = 'eigh' (the default on cpu); "
        "matmul_precision = 'highest' (no fast bf16 products on cpu)"
    )
    assert optimizer.chosen_by_device == expected
    assert "root_method = 'polynomial' (the default on cuda)" in reasons(ShampooConfig(), CUDA)


def trained(steps: range, state: dict | None = None, **settings: object) -> tuple:
    weight = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = Shampoo([("w", weight)], lr=1e-2, precondition_frequency=2, **settings)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        mixing = torch.linspace(0.1, 1.0, 16)
        weight.grad = torch.randn(24, 16, generator=generator) * mixing
        optimizer.step()
    return weight.detach(), optimizer


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
