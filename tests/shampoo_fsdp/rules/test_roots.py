"""Inverse roots: exact where they can be, harmless where they cannot."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from shampoo_fsdp.rules import roots as production
from shampoo_fsdp.rules.roots import ROOT_METHODS, check_exponent, root_residual
from tests.shampoo_fsdp.rules.matrices import long_average, with_spectrum

RESOLUTION = 2.0**-23
PRODUCTS_ALONE = ("coupled_newton", "polynomial")


# "polynomial" leaves an error by design, see test_polynomial.
EXACT = tuple(method for method in ROOT_METHODS if method != "polynomial")


def inverse_root(*arguments, **options):
    root, failed = production.inverse_root(*arguments, **options)
    return root.masked_fill(failed.view(-1, 1, 1), torch.nan)


exact_methods = pytest.mark.parametrize("method", EXACT)
every_method = pytest.mark.parametrize("method", ROOT_METHODS)


def decaying(n: int, condition: float) -> torch.Tensor:
    """Eigenvalues from 1 to 1 / condition."""
    return torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)


def exact_root(matrices: torch.Tensor, exponent: float) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrices.double())
    return (vectors * eigenvalues.unsqueeze(-2) ** exponent) @ vectors.mT


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = torch.linalg.matrix_norm(actual.double() - expected)
    return (error / torch.linalg.matrix_norm(expected)).max().item()


@every_method
def test_each_matrix_may_have_its_own_ridge_and_divisor(method):
    matrices = with_spectrum(decaying(6, 100.0)).float()
    ridges, divisors = torch.tensor([1e-3, 1.0, 0.1]), torch.tensor([1.0, 2.0, 0.5])
    together = inverse_root(matrices, -0.25, ridges, method, divisor=divisors)
    each = [
        inverse_root(matrix.unsqueeze(0) / divisor, -0.25, ridge, method)
        for matrix, ridge, divisor in zip(matrices, ridges.tolist(), divisors, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(each), rtol=1e-4, atol=1e-5)


@given(
    method=st.sampled_from(EXACT),
    exponent=st.sampled_from([-1.0, -0.5, -0.25, -1 / 6, -0.125, -0.75, -1 / 3, -2 / 3, -0.375]),
    n=st.integers(1, 40),
    condition=st.floats(0, 4).map(lambda x: 10.0**x),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6, 1e20]),
    seed=st.integers(0, 100),
)
@example(method="eigh", exponent=-0.5, n=512, condition=4e3, scale=1.0, seed=0)
@example(method="coupled_newton", exponent=-0.5, n=512, condition=4e3, scale=1.0, seed=0)
def test_the_root_is_the_inverse_root(method, exponent, n, condition, scale, seed):
    """Rounding a matrix moves its eigenvalues by about the resolution times the largest, and a root
    with exponent -e, relatively, by e times what an eigenvalue moves."""
    matrices = with_spectrum(decaying(n, condition), seed=seed) * scale
    root = inverse_root(matrices.float(), exponent, 1e-12 * scale, method)
    exact = exact_root(matrices, exponent)
    moved = 2.0 * n**0.5 * RESOLUTION * condition
    assert relative_error(root, exact) < 1e-5 + max(-exponent, 0.5) * moved


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (method, kind)
        for method in ROOT_METHODS
        for kind in ("rank 1", "rank n/4", "condition 1e12")
        # The pseudo-inverse leaves out small eigenvalues that are there.
        if (method, kind) != ("eigh_pseudo_inverse", "condition 1e12")
    ],
)
@pytest.mark.parametrize("exponent", [-0.5, -0.25])
def test_gradients_are_turned_as_the_exact_root_turns_them(method, exponent, kind):
    """A factor that lacks rank, or is known to rounding only, has a root that is right for the
    gradients that the factor was made of. Rounding moves the smallest eigenvalues by about their
    own size, and -1/2 makes them count as much as the largest: hence 0.25. With -1/4 the largest
    count more."""
    n = 96
    generator = torch.Generator().manual_seed(1)
    if kind == "condition 1e12":
        sources = exact_root(with_spectrum(decaying(n, 1e12)) + 1e-14 * torch.eye(n), 0.5).float()
    else:
        rank = 1 if kind == "rank 1" else n // 4
        sources = torch.randn(3, n, rank, generator=generator)
    gradients = sources @ torch.randn(3, sources.shape[-1], 4, generator=generator)
    root = inverse_root(sources @ sources.mT, exponent, 1e-12, method)
    exact = sources.double() @ sources.double().mT
    floor = 4.0 if method in PRODUCTS_ALONE else 1.0
    floor *= RESOLUTION * torch.linalg.matrix_norm(exact, 2, keepdim=True) * torch.eye(n)
    expected = exact_root(exact + floor, exponent) @ gradients.double()
    wanted = 0.25 / 2 if method == "polynomial" else 0.0
    most = 0.25 if exponent == -0.5 else 0.02
    assert relative_error(root @ gradients, expected) < most + wanted


SMALL = 4.0 * RESOLUTION


@pytest.mark.parametrize(
    ("method", "ridge", "eigenvalues", "counted"),
    [
        ("eigh", 1e-4, [4.0, 0.0, -1e-3], [4.0 + 1e-4, SMALL + 1e-4, SMALL + 1e-4]),
        ("eigh_pseudo_inverse", 0.0, [4.0, 2.7 * SMALL, 3.3 * SMALL], [4.0, math.inf, 3.3 * SMALL]),
    ],
)
def test_what_a_matrix_lacks_counts_as_the_resolution_or_not_at_all(
    method, ridge, eigenvalues, counted
):
    matrix = torch.diag(torch.tensor(eigenvalues)).unsqueeze(0)
    root = inverse_root(matrix, -0.25, ridge, method)
    torch.testing.assert_close(root[0], torch.diag(torch.tensor(counted) ** -0.25))


def test_matrix_products_add_no_ridge_of_their_own():
    """But what is far below the resolution counts at most as some 32 of it."""
    eigenvalues = torch.tensor([4.0, 3.0, 64.0 * 5.0 * RESOLUTION, 1e-12])
    root = inverse_root(torch.diag(eigenvalues).unsqueeze(0), -0.5, 1e-12, "coupled_newton")
    values = root[0].diagonal()
    torch.testing.assert_close(values[:3], eigenvalues[:3] ** -0.5, rtol=5e-3, atol=0.0)
    assert (32.0 * 5.0 * RESOLUTION) ** -0.5 < values[3] < RESOLUTION**-0.5


@every_method
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rounding_in_a_matrix_that_lacks_rank_is_not_amplified_without_bound(method, scale):
    """The root of what is missing is at most about resolution^exponent that of the largest value:
    rounding moves what a floor or a ridge of this size makes of it."""
    eigenvalues = torch.tensor([1.0] * 4 + [0.0] * 20)
    matrices = with_spectrum(eigenvalues).float() * scale
    root = inverse_root(matrices, -0.25, 1e-38, method)
    values = torch.linalg.eigvalsh(root.double()).abs()
    assert values.max() < 1.1 * (RESOLUTION * scale) ** -0.25
    wanted = 0.25 if method == "polynomial" else 1e-3
    assert values.topk(4, largest=False).values.max() < (1.02 + wanted / 4) * scale**-0.25
    assert root_residual(matrices, root, 4, 1e-38).max() < wanted


@pytest.mark.parametrize("method", PRODUCTS_ALONE)
@pytest.mark.parametrize("exponent", [-0.5, -0.25])
def test_a_root_that_is_not_one_is_nan(method, exponent):
    """Whether an eigenvalue is so negative that the iteration diverges or not: in between there are
    those for which it is on its way only."""
    matrices = torch.eye(3).repeat(200, 1, 1)
    matrices[:, 2, 2] = -torch.logspace(-7, -0.1, 200)
    roots = inverse_root(matrices, exponent, 1e-12, method)
    failed = roots[:, 0, 0].isnan()
    assert 20 < failed.sum() < 199
    assert roots[failed].isnan().all()
    negative = -matrices[~failed, 2, 2]
    assert negative.max() < 1e-3
    assert (roots[~failed, 2, 2] < 100.0 * RESOLUTION**exponent).all()


@every_method
@pytest.mark.parametrize("exponent", [-0.5, -0.25])
def test_a_long_average_of_gradients_that_lack_the_same_directions_has_a_root(method, exponent):
    """Its rounding adds up: eigenvalues get down to -5 resolutions of the norm."""
    factors = long_average(16, 8, rank=1, steps=2000, decay=0.999)
    least = torch.linalg.eigvalsh(factors.double())[:, 0] / torch.linalg.matrix_norm(factors)
    assert least.min() < -3.0 * RESOLUTION
    root = inverse_root(factors, exponent, 1e-12, method)
    wanted = 0.25 if method == "polynomial" else 1e-3
    assert root_residual(factors, root, round(-1 / exponent), 1e-12).max() < wanted


@pytest.mark.parametrize("method", ["eigh", "coupled_newton", "polynomial"])
@pytest.mark.parametrize("ridge", [1e-30, 1e-19, 1e-6])
def test_a_matrix_of_zeros_has_the_root_of_any_ridge(method, ridge):
    root = inverse_root(torch.zeros(1, 3, 3), -0.5, ridge, method)
    wanted = {"rtol": 0.12, "atol": 1e-3} if method == "polynomial" else {}
    torch.testing.assert_close(root[0] * ridge**0.5, torch.eye(3), **wanted)


@every_method
def test_a_bad_matrix_spoils_no_other(method):
    matrices = torch.eye(5).repeat(5, 1, 1) * 16.0
    matrices[1, 2, 3] = torch.nan
    matrices[2, 0, 0] = torch.inf
    matrices[3] = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0]))  # no iteration converges
    roots = inverse_root(matrices, -0.25, 1e-12, method)
    assert roots[1].isnan().all() and roots[2].isnan().all()
    assert roots[3].isnan().all() if method in PRODUCTS_ALONE else roots[3].isfinite().all()
    expected = torch.eye(5).expand(2, 5, 5) / 2
    torch.testing.assert_close(roots[[0, 4]], expected, rtol=0.07, atol=1e-5)


@pytest.mark.parametrize("method", PRODUCTS_ALONE)
def test_an_exponent_that_a_method_cannot_take_is_refused(method):
    with pytest.raises(ValueError, match=f'root_method = "{method}".*p = 1 to 16.*-0.123'):
        check_exponent(method, -0.123)
    check_exponent("eigh", -0.123)
    check_exponent("qr", -0.123)


@pytest.mark.parametrize(
    ("method", "exponent", "most"),
    [
        ("coupled_newton", -0.5, 36),
        ("coupled_newton", -0.25, 44),
        ("polynomial", -0.25, 30),
    ],
)
def test_the_number_of_products_is_small(method, exponent, most):
    """With steps of length 1 it takes about twice as many."""
    matrices = torch.eye(8).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        inverse_root(matrices, exponent, 1e-12, method)
    assert counter.get_total_flops() <= most * 2 * 8**3


@exact_methods
@pytest.mark.parametrize("order", [2, 4])
def test_the_residual_is_small_for_a_root_and_grows_with_its_error(method, order):
    matrices = with_spectrum(decaying(40, 1e2)).float()
    root = inverse_root(matrices, -1 / order, 1e-12, method)
    assert root_residual(matrices, root, order, 1e-12).max() < 1e-4
    wrong = root * torch.tensor([1.0, 1.01, 1.1]).view(-1, 1, 1)
    residual = root_residual(matrices, wrong, order, 1e-12)
    torch.testing.assert_close(
        residual, torch.tensor([0.0, 1.01**order - 1.0, 1.1**order - 1.0]), rtol=1e-2, atol=1e-4
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_residual_of_hostile_matrices(scale):
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(4, 20, 1, generator=generator)
    matrices = sources @ sources.mT * scale
    matrices[1] = 0.0
    matrices[2] = torch.nan
    root = inverse_root(matrices, -0.25, 1e-12 * scale, "eigh")
    root[3] = torch.nan
    residual = root_residual(matrices, root, 4, 1e-12 * scale)
    assert residual[0] < 1e-4 and residual[1] == 0.0 and residual[2:].isnan().all()
