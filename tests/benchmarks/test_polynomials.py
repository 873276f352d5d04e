"""The polynomials of the inverse square root: the errors that they promise, by few products."""

import pytest
import torch

from benchmarks.polynomials import LEAST, chains, inverse_square_root
from shampoo_fsdp.rules import polynomial


def composed(stages, values: torch.Tensor) -> torch.Tensor:
    """What the stages make of eigenvalues, in fp64."""
    root = torch.ones_like(values)
    for coefficients, middle, half in stages:
        nu = (values * root**2 - middle) / half
        root = root * sum(c * nu**k for k, c in enumerate(coefficients))
    return root


@pytest.mark.parametrize("name", chains())
def test_the_optimizers_constants_are_these(name):
    stages, error = chains()[name]
    our_stages, our_error = getattr(polynomial, name)
    assert our_error == pytest.approx(error, rel=1e-9)
    for ours, (coefficients, middle, half) in zip(our_stages, stages, strict=True):
        assert (ours.middle, ours.half) == pytest.approx((middle, half), rel=1e-9)
        assert ours.coefficients == pytest.approx(coefficients, rel=1e-9)


@pytest.mark.parametrize(("least", "error"), [(1e-3, 0.118), (1e-5, 0.25), (1e-5, 0.0287)])
def test_the_error_is_at_most_what_is_promised(least, error):
    values = torch.logspace(torch.tensor(least).log10().item(), 0.0, 20_000, dtype=torch.float64)
    stages, promised = inverse_square_root(least, error)
    actual = (composed(stages, values) * values.sqrt() - 1.0).abs().max().item()
    assert actual <= promised * 1.001 + 1e-13 <= error


def test_what_is_below_the_least_counts_as_about_that():
    """Even if it is a little negative: so no ridge is needed against rounding."""
    values = torch.cat((torch.logspace(-12, -5, 50), torch.tensor([0.0, -2e-6]))).double()
    root = composed(chains()["_SQUARE_ROOT"][0], values)
    assert (root.abs() < 2.0 * LEAST**-0.5).all()
