"""Inverse roots and products in the precision of a GPU's units, against fp64."""

import pytest
import torch

from shampoo_fsdp.kernels.product import Sum, product_reference
from shampoo_fsdp.rules.precision import full_precision, gram
from shampoo_fsdp.rules.roots import ROOT_METHODS, inverse_root
from tests.shampoo_fsdp.rules.matrices import long_average, with_spectrum
from tests.shampoo_fsdp.rules.test_polynomial import CASES, error_on_gradients
from tests.shampoo_fsdp.rules.test_roots import decaying, exact_root, relative_error

pytestmark = pytest.mark.cuda

EXPONENTS = (-0.25, -0.5, -1.0, -0.75, -1 / 3)
EXACT = [m for m in ROOT_METHODS if m != "polynomial"]
every_root = pytest.mark.parametrize(
    ("method", "exponent"), [(m, e) for m in EXACT for e in EXPONENTS]
)


@every_root
@pytest.mark.parametrize(
    ("n", "dtype"), [(33, torch.float32), (256, torch.float32), (64, torch.float64)]
)
def test_a_root_is_as_exact_as_its_type_lets_it_be(device, method, exponent, n, dtype):
    """The condition of 1e3 magnifies the 16 bits that polynomials have at their start."""
    eps, most = (1e-12, 2e-3) if dtype == torch.float32 else (1e-30, 1e-9)
    matrices = with_spectrum(decaying(n, 1e3))
    root, failed = inverse_root(matrices.to(device, dtype), exponent, eps, method)
    assert root.device.type == device.type and not failed.any()
    assert relative_error(root.cpu(), exact_root(matrices, exponent)) < most


@pytest.mark.parametrize("exponent", [-0.5, -0.25])
@pytest.mark.parametrize("method", [m for m in ROOT_METHODS if m != "eigh_pseudo_inverse"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_turned_as_the_exact_root_turns_them(device, case, method, exponent):
    """With the error that the optimizer asks for; spectra are also those of trainings. (The
    pseudo-inverse leaves out small eigenvalues that are there.)"""
    matrix = with_spectrum(CASES[case], blocks=1)
    root, failed = inverse_root(matrix.float().to(device), exponent, 0.0, method, 1e-5)
    assert not failed.any()
    assert error_on_gradients(root.cpu(), matrix, 1e-5, exponent) < 0.15


@pytest.mark.parametrize("exponent", [-0.5, -0.25])
@pytest.mark.parametrize("method", ROOT_METHODS)
def test_what_rounding_makes_of_missing_directions_is_borne(device, method, exponent):
    factors = long_average(8, 32, rank=2, steps=500, decay=0.99).to(device)
    root, failed = inverse_root(factors, exponent, 1e-12, method)
    assert root.isfinite().all() and not failed.any()


@pytest.mark.parametrize("method", ROOT_METHODS)
def test_a_bad_matrix_is_reported_and_spoils_no_other(device, method):
    stack = torch.eye(5, device=device).repeat(3, 1, 1) * 16.0
    stack[1, 2, 3] = torch.nan
    root, failed = inverse_root(stack, -0.5, 1e-12, method)
    assert failed.tolist() == [False, True, False]
    torch.testing.assert_close(
        root[::2].cpu(), torch.eye(5).repeat(2, 1, 1) / 4, rtol=0.12, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(1, 5), (7, 1), (130, 70), (512, 2048)])
def test_a_gram_is_summed_in_fp32(device, n, m, dtype):
    blocks = torch.randn(2, n, m, generator=torch.Generator().manual_seed(0)).to(dtype)
    with full_precision(device.type):
        found = gram(blocks.to(device))
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.cpu().double(), blocks.double() @ blocks.double().mT, rtol=1e-5, atol=2e-6 * m
    )


@pytest.mark.parametrize("alpha", [1.0, -0.7])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 15), (torch.float16, 9)])
def test_a_product_has_the_bits_that_it_promises(device, dtype, bits, alpha):
    """Even if the program has allowed TF32 for its model."""
    a, b = torch.randn(2, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision(device.type):
            low = (m.to(device, dtype) for m in (a, b))
            (found,) = product_reference(*low, Sum(torch.float32, alpha))
    finally:
        torch.set_float32_matmul_precision(chosen)
    error = (found.cpu().double() - alpha * a.double() @ b.double()).abs()
    assert error.max() < 2.0**-bits * (a.abs() @ b.abs()).max()
