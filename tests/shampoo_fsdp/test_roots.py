"""Inverse roots: exact where they can be, harmless where they cannot."""

import pytest
import torch

from shampoo_fsdp.roots import inverse_root_eigh


def stack_with_spectrum(eigenvalues: torch.Tensor) -> torch.Tensor:
    """[3, n, n] in fp64 with the given eigenvalues."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, len(eigenvalues), len(eigenvalues)).double()).Q
    return (q * eigenvalues.double()) @ q.mT


@pytest.mark.parametrize("exponent", [-0.5, -0.25, -1 / 6])
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_the_root_is_the_inverse_root(exponent, condition):
    matrices = stack_with_spectrum(torch.logspace(0, -torch.tensor(condition).log10(), 24))
    root = inverse_root_eigh(matrices.float(), exponent, 1e-12).double()
    identity = torch.linalg.matrix_power(root, round(-1 / exponent)) @ matrices
    error = torch.linalg.matrix_norm(identity - torch.eye(24, dtype=torch.float64))
    assert error.max() / 24**0.5 < 1e-6 * condition


def test_the_ridge_is_added_after_eigenvalues_were_raised_to_the_resolution():
    matrix = torch.diag(torch.tensor([4.0, 0.0, -1e-3])).unsqueeze(0)
    root = inverse_root_eigh(matrix, -0.25, 1e-4)
    least = 4.0 * 2.0**-23 + 1e-4
    expected = torch.diag(torch.tensor([4.0 + 1e-4, least, least]) ** -0.25)
    torch.testing.assert_close(root[0], expected)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rounding_in_a_matrix_that_lacks_rank_is_not_amplified_without_bound(scale):
    """The root of what is missing is at most resolution^exponent that of the largest value."""
    torch.manual_seed(0)
    matrices = stack_with_spectrum(torch.tensor([1.0] * 4 + [0.0] * 20)).float() * scale
    values = torch.linalg.eigvalsh(inverse_root_eigh(matrices, -0.25, 1e-38).double())
    assert values.max() / values.min() <= 1.01 * 2.0 ** (23 / 4)


def test_a_matrix_of_zeros_has_the_root_of_the_ridge():
    root = inverse_root_eigh(torch.zeros(2, 3, 3), -0.5, 1e-12)
    torch.testing.assert_close(root, 1e6 * torch.eye(3).expand(2, 3, 3))


def test_a_bad_matrix_spoils_no_other():
    matrices = torch.eye(5).repeat(4, 1, 1) * 16.0
    matrices[1, 2, 3] = torch.nan
    matrices[2, 0, 0] = torch.inf
    roots = inverse_root_eigh(matrices, -0.25, 1e-12)
    assert roots[1].isnan().all() and roots[2].isnan().all()
    torch.testing.assert_close(roots[0], torch.eye(5) / 2)
    torch.testing.assert_close(roots[3], torch.eye(5) / 2)


@pytest.mark.parametrize("failing", ["first", "fp32", "one"])
def test_a_failed_decomposition_is_tried_again(monkeypatch, failing):
    """LAPACK does not fail on demand: its failure is simulated at torch.linalg.eigh."""
    real = torch.linalg.eigh
    calls = []

    def eigh(matrices):
        calls.append((len(matrices), matrices.dtype))
        bad = {
            "first": len(calls) == 1,
            "fp32": matrices.dtype == torch.float32,
            "one": bool((matrices[:, 0, 0] == 3.0).any()),
        }[failing]
        if bad:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    matrices = torch.eye(4).repeat(3, 1, 1) * torch.tensor([1.0, 3.0, 16.0]).view(3, 1, 1)
    roots = inverse_root_eigh(matrices, -0.5, 1e-12)
    torch.testing.assert_close(roots[0], torch.eye(4))
    torch.testing.assert_close(roots[2], torch.eye(4) / 4)
    assert calls[1] == (3, torch.float64)
    if failing == "one":
        assert roots[1].isnan().all()
    else:
        torch.testing.assert_close(roots[1], torch.eye(4) / 3**0.5)
