"""Eigenbases: taken anew, and followed from refresh to refresh."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo_fsdp.rules.eigenbasis import complete_basis, eigenbasis, warm_eigenbasis
from tests.shampoo_fsdp.rules.matrices import from_basis, random_basis


def offdiagonal(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """||offdiag(Q^T A Q)||_F / ||A||_F, [B]."""
    rotated = vectors.mT.double() @ matrices.double() @ vectors.double()
    rest = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.matrix_norm(rest) / torch.linalg.matrix_norm(rotated)


def assert_orthonormal(vectors: torch.Tensor) -> None:
    n = vectors.shape[-1]
    gram = vectors.mT.double() @ vectors.double()
    eye = torch.eye(n, dtype=torch.float64).expand_as(gram)
    torch.testing.assert_close(gram, eye, rtol=0.0, atol=1e-5)


# ------------------------------------------------------------------------------ anew


def test_a_matrix_that_is_not_finite_gives_nan_and_spoils_no_other():
    matrices = torch.diag(torch.tensor([1.0, 2.0, 3.0])).repeat(4, 1, 1)
    matrices[1, 0, 1] = torch.nan
    matrices[2, 2, 2] = torch.inf
    eigenvalues, vectors = eigenbasis(matrices)
    assert eigenvalues[1:3].isnan().all()
    torch.testing.assert_close(eigenvalues[[0, 3]], torch.tensor([[1.0, 2.0, 3.0]]).expand(2, -1))
    assert_orthonormal(vectors[[0, 3]])


FAILING = {
    "first": lambda call, matrices: call == 1,
    "fp32": lambda call, matrices: matrices.dtype == torch.float32,
    "one": lambda call, matrices: (matrices[:, 0, 0] == 3.0).any(),
}


@pytest.mark.parametrize("failing", FAILING)
def test_a_failed_decomposition_is_tried_again(monkeypatch, failing):
    """LAPACK does not fail on demand: its failure is simulated at torch.linalg.eigh."""
    real = torch.linalg.eigh
    calls = itertools.count(1)

    def eigh(matrices):
        if FAILING[failing](next(calls), matrices):
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    matrices = torch.eye(4).repeat(3, 1, 1) * torch.tensor([1.0, 3.0, 16.0]).view(3, 1, 1)
    eigenvalues, vectors = eigenbasis(matrices)
    bad = torch.tensor([False, failing == "one", False])
    torch.testing.assert_close(eigenvalues[~bad], matrices[~bad].diagonal(dim1=1, dim2=2))
    assert eigenvalues[bad].isnan().all()
    assert_orthonormal(vectors[~bad])


# ------------------------------------------------------------------------ warm start


@given(n=st.integers(2, 24), seed=st.integers(0, 100))
def test_columns_follow_their_eigenvectors_whatever_their_order(n, seed):
    """What is kept in the basis belongs to columns, so that none may move or change its sign."""
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = 3.0 ** -torch.randperm(n, generator=generator).double().clamp_max(8)
    vectors = random_basis(n, seed=seed)
    signs = torch.randn(n, generator=generator).sign()
    matrices = from_basis(eigenvalues, vectors).float()
    change = torch.randn(3, n, n, generator=generator) * 1e-7
    before = (vectors * signs).float()
    found, after = warm_eigenbasis(matrices + change + change.mT, before)
    isolated = eigenvalues > 2 * 3.0**-8
    overlap = (before * after).sum(-2)
    assert overlap[:, isolated].min() > 0.999
    expected = eigenvalues[isolated].float().expand(3, -1)
    torch.testing.assert_close(found[:, isolated], expected, rtol=1e-2, atol=0.0)
    assert_orthonormal(after)


def test_a_basis_that_is_good_already_is_left_alone():
    eigenvalues = torch.tensor([3.0, 1.0, 2.0, 0.5])
    q = torch.eye(4)[[2, 0, 3, 1]].repeat(2, 1, 1) * torch.tensor([1.0, -1.0, 1.0, -1.0])
    matrices = (q * eigenvalues) @ q.mT
    matrices[1, 0, 1] = matrices[1, 1, 0] = 0.1
    found, after = warm_eigenbasis(matrices, q)
    assert torch.equal(after[0], q[0]) and torch.equal(found[0], eigenvalues)
    assert not torch.equal(after[1], q[1])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rank", [1, 5])
def test_directions_that_a_matrix_lacks_are_left_alone(rank, scale):
    """Without a shift, rounding would turn them anew at each step. The matrix is not quite that of
    the basis, which would not be touched at all."""
    before = random_basis(20).float()
    eigenvalues = torch.zeros(20)
    eigenvalues[:rank] = 4.0 ** -torch.arange(float(rank))
    turned = torch.linalg.qr(before.double() + 0.01 * random_basis(20, seed=1)).Q
    turned = turned * (turned * before).sum(-2, keepdim=True).sign()
    matrices = from_basis(eigenvalues, turned).float() * scale
    after = before
    for _ in range(5):
        found, after = warm_eigenbasis(matrices, after)
        assert_orthonormal(after)
    assert (before * after).sum(-2).min() > 0.99
    assert (offdiagonal(matrices / scale, after) < 1e-4).all()
    torch.testing.assert_close(found / scale, eigenvalues.expand(3, -1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("where", ["matrices", "vectors"])
def test_what_is_not_finite_gives_nan_wherever_it_is(bad, scale, where):
    vectors = torch.eye(3).repeat(10, 1, 1)
    matrices = scale * vectors
    for i in range(9):
        {"matrices": matrices, "vectors": vectors}[where][i].view(-1)[i] = bad
    found, after = warm_eigenbasis(matrices, vectors)
    assert found[:9].isnan().all()
    assert found[9].isfinite().all() and after[9].isfinite().all()


# ----------------------------------------------------------------- what a matrix lacks


@pytest.mark.parametrize("axes", [False, True])
def test_what_a_matrix_lacks_follows_from_what_it_has(axes):
    """Two bases that share the seen columns alone, in different places; also where these span axes,
    as where most rows of a gradient are zero."""
    eigenvalues = torch.tensor([0.0, 4.0, 0.0, 1e-7, 0.5, 0.0, 2.0, 0.0])
    q = torch.eye(8).double().expand(3, -1, -1) if axes else random_basis(8)
    matrices = from_basis(eigenvalues, q).float()
    null = eigenvalues < 1e-5
    other = q.clone()
    other[..., null] = q[..., null] @ random_basis(int(null.sum()), seed=1)
    places = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    repeated = eigenvalues.expand(3, -1)
    values, one = complete_basis(matrices, repeated, q.float(), 1e-5)
    _, two = complete_basis(matrices, repeated[:, places], other[..., places].float(), 1e-5)
    torch.testing.assert_close(values, repeated.masked_fill(null, 0.0))
    assert_orthonormal(one)
    torch.testing.assert_close(one[..., ~null], q[..., ~null].float(), rtol=0.0, atol=1e-5)
    projected = [x.mT[:, nulls] for x, nulls in ((one, null), (two, null[places]))]
    back = two[..., places.argsort()]
    torch.testing.assert_close(back[..., ~null], one[..., ~null], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(*projected, rtol=0.0, atol=1e-5)
