"""The polynomials of the inverse square root: the errors that they promise, by few products."""

import pytest
import torch

from shampoo_fsdp.rules.minimax import count_products, inverse_square_root


def composed(values: torch.Tensor, least: float, error: float) -> tuple[torch.Tensor, float]:
    """What the stages make of eigenvalues, in fp64, and the error that they promise."""
    stages, promised = inverse_square_root(least, error)
    root = torch.ones_like(values)
    for stage in stages:
        nu = (values * root**2 - stage.middle) / stage.half
        root = root * sum(c * nu**k for k, c in enumerate(stage.coefficients))
    return root, promised


@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-5, 2.0**-19, 2.0**-48])
@pytest.mark.parametrize("error", [0.25, 0.118, 0.01, 1e-5, 1e-12])
def test_the_error_is_at_most_what_is_wanted(least, error):
    values = torch.logspace(torch.tensor(least).log10().item(), 0.0, 20_000, dtype=torch.float64)
    root, promised = composed(values, least, error)
    actual = (root * values.sqrt() - 1.0).abs().max().item()
    assert promised <= error
    assert actual <= promised * 1.001 + 1e-13


@pytest.mark.parametrize("error", [0.118, 0.01])
def test_what_is_below_the_least_counts_as_about_that(error):
    """Even if it is a little negative: so no ridge is needed against rounding."""
    least = 1e-5
    values = torch.cat((torch.logspace(-12, -5, 50), torch.tensor([0.0, -2e-6]))).double()
    root, _ = composed(values, least, error)
    assert (root.abs() < 2.0 * least**-0.5).all()


@pytest.mark.parametrize(
    ("least", "error", "most"),
    [(1e-5, 0.118, 12), (1e-4, 0.11, 10), (1e-5, 0.01, 15), (2.0**-19, 0.02, 17), (1e-5, 1e-3, 17)],
)
def test_the_number_of_products(least, error, most):
    """Newton and Schulz, whose polynomials are Taylor's of degree 3, need 37 for the first."""
    stages, _ = inverse_square_root(least, error)
    assert count_products([len(stage.coefficients) for stage in stages]) <= most
