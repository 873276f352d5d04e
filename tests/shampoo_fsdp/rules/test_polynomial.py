"""Inverse roots with the precision of a GPU's units, emulated: rounded inputs, sums in fp32."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shampoo_fsdp.kernels import product
from shampoo_fsdp.rules import polynomial
from shampoo_fsdp.rules.roots import inverse_root, root_residual
from tests.shampoo_fsdp.rules.matrices import long_average, with_spectrum

SPECTRA = json.loads(Path(__file__).with_name("spectra.json").read_text())


def emulate(monkeypatch, coarse: bool = False) -> None:
    """Products as on a GPU, whose results are in fp32.

    Args:
        coarse: whether fp32 matrices are in fp16, too, not in two parts.
    """

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype != torch.float32
        return a.float() @ b.float()

    for module in (polynomial, product):
        monkeypatch.setattr(module, "sums_in_fp32", lambda device_type: True)
    monkeypatch.setattr(product, "bmm_in_fp32", bmm)
    if coarse:
        monkeypatch.setattr(product, "split", lambda a: (a.half(), a.half()))


DECAYING, PLACES = torch.logspace(0, -8, 96), torch.arange(96)
CASES = {
    "decaying": DECAYING,
    "rank n/4": torch.where(PLACES < 24, 1.0, 0.0),
    "spike": torch.where(PLACES < 1, 1.0, 1e-3),
    "flat": torch.ones(96),
    "tiny": 1e-30 * DECAYING,
    "huge": 1e30 * DECAYING,
    **{name: torch.tensor(values) for name, values in SPECTRA.items()},
}


def error_on_gradients(root: Tensor, matrix: Tensor, least: float, exponent: float = -0.5) -> float:
    """Of the root times gradients like those that the matrix is made of, after the best scaling."""
    values, vectors = torch.linalg.eigh(matrix)
    generator = torch.Generator().manual_seed(3)
    white = torch.randn(1, len(values[0]), 8, generator=generator, dtype=torch.float64)
    gradients = vectors @ (values.clamp_min(0.0).sqrt().unsqueeze(-1) * white)
    values = values.clamp_min(least * values.max())
    exact = (vectors * values.unsqueeze(-2) ** exponent) @ vectors.mT @ gradients
    actual = root.double() @ gradients
    actual = actual * (actual * exact).sum() / actual.square().sum()
    return (torch.linalg.matrix_norm(actual - exact) / torch.linalg.matrix_norm(exact)).item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("exponent", "resolution"),
    [(-0.5, 1e-5), (-0.5, 0.0), (-0.25, 0.0)],
)
def test_a_gpus_units_are_precise_enough(case, exponent, resolution, monkeypatch):
    """What the 12 products leave, 0.12 for -1/2, is hardly more for it: 0.12 to 0.16 on the CPUs
    that we saw, whose sums round differently."""
    matrix = with_spectrum(CASES[case][:: 1 + len(CASES[case]) // 200], blocks=1)
    emulate(monkeypatch)
    root, failed = inverse_root(matrix.float(), exponent, 0.0, "polynomial", resolution)
    assert not failed.any()
    assert error_on_gradients(root, matrix, 1e-5, exponent) < 0.2


@pytest.mark.parametrize("exponent", [-0.5, -0.25])
def test_a_gpus_units_bear_what_rounding_makes_of_missing_directions(exponent, monkeypatch):
    """A long average whose gradients lack the same directions has slightly negative eigenvalues."""
    factors = long_average(8, 32, rank=2, steps=500, decay=0.99)
    emulate(monkeypatch)
    root, failed = inverse_root(factors, exponent, 1e-12, "polynomial")
    assert not failed.any()
    assert root_residual(factors, root, round(-1 / exponent), 1e-12).max() < 0.4


@pytest.mark.parametrize("exponent", [-2.0, -1.0, -0.75, -0.5, -0.25, -0.0625])
@pytest.mark.parametrize("rank", [3, 20])
@pytest.mark.parametrize("method", ["polynomial", "coupled_newton"])
def test_no_exponent_fails_for_a_matrix_that_lacks_rank(exponent, rank, method):
    """Whose residual says nothing for some: what the matrix lacks counts most in it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 60, rank, generator=generator)
    root, failed = inverse_root(x @ x.mT, exponent, 1e-12, method)
    assert root.isfinite().all() and not failed.any()


def test_the_first_polynomial_needs_its_precision(monkeypatch):
    """Or small eigenvalues, which 10 bits round away, would never come back."""
    matrix = with_spectrum(CASES["rank n/4"] + 1e-4, blocks=1)
    emulate(monkeypatch, coarse=True)
    root, _ = inverse_root(matrix.float(), -0.5, 0.0, "polynomial", resolution=1e-5)
    assert not error_on_gradients(root, matrix, 1e-5) < 0.2


def test_a_large_matrix():
    matrix = with_spectrum(torch.logspace(0, -6, 1024), blocks=1)
    root, _ = inverse_root(matrix.float(), -0.5, 0.0, "polynomial", resolution=1e-5)
    assert error_on_gradients(root, matrix, 1e-5) < 0.15
