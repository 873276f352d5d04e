"""The reference itself, against truths that are known without it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_fsdp import ShampooConfig
from tests.reference import ReferenceShampoo


def trained(gradients: list[Tensor], **settings: Any) -> tuple[list[Tensor], ReferenceShampoo]:
    """The directions D that a matrix takes on the steps of these gradients, and the optimizer."""
    frequency = settings.setdefault("precondition_frequency", 1)
    settings = {
        "max_preconditioner_dim": 100,
        "preconditioner": "shampoo",
        "start_preconditioning_step": frequency,
        "refresh_schedule": "together",
        "refresh_warmup_steps": 0,
        **settings,
    }
    group = {"lr": 1.0, "weight_decay": 0.0, "betas": settings.pop("betas", (0.9, 0.99))}
    group["eps"] = settings.pop("eps", 1e-8)
    excluded = settings.pop("excluded", set())
    config = ShampooConfig(**{"beta3": group["betas"][0], **settings})
    shapes = {"w": tuple(gradients[0].shape)}
    optimizer = ReferenceShampoo(shapes, config, excluded=excluded, **group)
    params, directions = {"w": torch.zeros_like(gradients[0])}, []
    for gradient in gradients:
        before = params["w"].clone()
        optimizer.step(params, {"w": gradient})
        directions.append(before - params["w"])
    return directions, optimizer


def updates(gradients: list[Tensor], **settings: Any) -> list[Tensor]:
    return trained(gradients, **settings)[0]


def rule(gradients: list[Tensor], **settings: Any) -> Any:
    """Of the one block, after these steps."""
    _, optimizer = trained(gradients, grafting="none", **settings)
    (block,) = optimizer.blocks["w"]
    return block.rule


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(eigenvalues**exponent) @ vectors.T


def random_gradients(steps: int, shape: tuple[int, ...]) -> list[Tensor]:
    generators = [torch.Generator().manual_seed(step) for step in range(1, steps + 1)]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for g in generators]


@pytest.mark.parametrize("beta2", [0.0, 0.9, 1.0])
def test_the_first_step_orthogonalises_every_block_with_its_own_norm(beta2: float) -> None:
    # L^(-1/4) G R^(-1/4) = U S^(-1/2) S S^(-1/2) Vᵀ = U Vᵀ for G = U S Vᵀ; the bias correction
    # makes it so for every beta2. Grafting then gives it the norm of G.
    gradients = random_gradients(1, (5, 7))
    settings = {"grafting": "sgd", "max_preconditioner_dim": 4}
    (direction,) = updates(gradients, betas=(0.0, beta2), **settings)
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 4), slice(4, 7)):
            grad = gradients[0][rows, columns]
            expected = orthogonal(grad) * math.sqrt(grad.square().sum() / min(grad.shape))
            torch.testing.assert_close(direction[rows, columns], expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- large dimensions


def test_one_sided_is_the_inverse_square_root_of_one_factor() -> None:
    gradients = random_gradients(3, (3, 6))
    settings = {"large_dim": "one_sided", "max_preconditioner_dim": 4, "grafting": "none"}
    (*_, last) = updates(gradients, betas=(0.0, 0.5), **settings)
    factor = sum(0.5 ** (2 - i) * g @ g.T for i, g in enumerate(gradients)) / (1 + 0.5 + 0.25)
    torch.testing.assert_close(last, matrix_power(factor, -0.5) @ gradients[-1])


def test_two_diagonal_sides_are_sums_over_rows_and_columns() -> None:
    gradients = random_gradients(3, (5, 6))
    settings = {"large_dim": "diagonal", "max_preconditioner_dim": 4, "grafting": "none"}
    (*_, last) = updates(gradients, betas=(0.0, 1.0), precondition_frequency=3, **settings)
    squares = torch.stack(gradients).square().sum(0)
    expected = gradients[-1] / (squares.sum(1, keepdim=True) * squares.sum(0)) ** 0.25
    torch.testing.assert_close(last, expected)


def test_a_diagonal_vector_is_adam_without_an_epsilon() -> None:
    gradients = random_gradients(4, (6,))
    ours = updates(gradients, max_preconditioner_dim=4, large_dim="diagonal", grafting="none")
    adam = updates(gradients, grafting="adam", eps=0.0, excluded={"w"})
    for our, their in zip(ours, adam, strict=True):
        torch.testing.assert_close(our, their)


# -------------------------------------------------------------------------- roots and grafting


def test_no_grafting_leaves_the_size_of_the_preconditioned_momentum() -> None:
    gradients = random_gradients(2, (3, 4))
    settings = {"grafting": "none", "start_preconditioning_step": 2}
    first, second = updates(gradients, betas=(0.5, 0.5), **settings)
    torch.testing.assert_close(first, gradients[0])
    m_hat = (0.25 * gradients[0] + 0.5 * gradients[1]) / 0.75
    left = sum(w * g @ g.T for w, g in zip((0.5, 1.0), gradients, strict=True)) / 1.5
    right = sum(w * g.T @ g for w, g in zip((0.5, 1.0), gradients, strict=True)) / 1.5
    expected = matrix_power(left, -0.25) @ m_hat @ matrix_power(right, -0.25)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize(
    ("shape", "exponents", "order", "power"),
    [
        ((4, 4), [0.5, 0.125], 2, 0.125),
        ((4,), [1.0], 1, 1.0),
        ((4, 4), [0.5], 2, 0.25),
        ((4,), [0.0], 1, 0.5),
        ((3, 3, 2, 2), [], 3, 1 / 6),
    ],
)
def test_exponents_by_order(
    shape: tuple[int, ...], exponents: list[float], order: int, power: float
) -> None:
    # A gradient of one entry has the factor g² along each dimension.
    gradient = torch.zeros(shape, dtype=torch.float64)
    gradient[(1,) * len(shape)] = 5.0
    settings = {"merge_dims": "small", "max_preconditioner_dim": 4, "root_exponents": exponents}
    (direction,) = updates([gradient], grafting="none", **settings)
    torch.testing.assert_close(direction, gradient * 25.0 ** (-power * order))


@pytest.mark.parametrize("grafting", ["sgd", "rmsprop", "adagrad", "adam"])
def test_grafting_gives_the_norm_of_the_other_method(grafting: str) -> None:
    gradients = random_gradients(4, (4, 5))
    settings = {"grafting": grafting, "grafting_beta2": 0.7, "grafting_eps": 1e-3}
    ours = updates(gradients, **settings)
    theirs = updates(gradients, excluded={"w"}, **settings)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.norm(), their.norm())
        assert not torch.allclose(our, their)


# --------------------------------------------------------------------------------------- SOAP


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
def test_soap_without_memory_orthogonalises(shape: tuple[int, int]) -> None:
    # In the singular vectors' basis the gradient is diagonal, and Adam takes its signs.
    gradient = random_gradients(1, shape)[0]
    (direction,) = updates(
        [gradient], preconditioner="soap", betas=(0.0, 0.0), eps=1e-7, grafting="none"
    )
    torch.testing.assert_close(direction, orthogonal(gradient), rtol=1e-5, atol=1e-5)


def test_second_moment_of_soap_starts_from_the_kronecker_product() -> None:
    # Rows of sizes a times columns of sizes b, with random signs: E[g²] = a² b² exactly.
    rows, columns = torch.tensor([3.0, 1.0, 0.5]).double(), torch.tensor([2.0, 0.3]).double()
    gradients = [torch.outer(rows, columns) * signs for signs in sign_patterns(3, 2)]
    settings = {"precondition_frequency": 8, "grafting_beta2": 0.9}
    moment = rule(gradients, preconditioner="soap", betas=(0.0, 1.0), **settings).second_moment
    order = rows.argsort(), columns.argsort()
    expected = torch.outer(rows[order[0]] ** 2, columns[order[1]] ** 2)
    torch.testing.assert_close(moment, expected * (8 + 1), rtol=1e-9, atol=1e-9)


def sign_patterns(m: int, n: int) -> list[Tensor]:
    """8 matrices of -1 and 1 of at most 7 entries, which are uncorrelated among each other."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    hadamard = torch.kron(two, torch.kron(two, two))
    return [row[1 : m * n + 1].reshape(m, n) for row in hadamard]


# --------------------------------------------------------------------------------- KL-Shampoo


@pytest.mark.parametrize("grafting", ["none", "sgd"])
def test_kl_shampoo_does_not_feel_the_scale_of_small_gradients(grafting: str) -> None:
    # Small beside the identity, from which the second factor starts.
    settings = {"preconditioner": "kl_shampoo", "preconditioner_eps": 1e-30, "grafting": grafting}
    gradients = [1e-5 * g for g in random_gradients(8, (3, 4))]
    ours = updates(gradients, precondition_frequency=2, **settings)[2:]
    theirs = updates([1e-3 * g for g in gradients], precondition_frequency=2, **settings)[2:]
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(their * (1.0 if grafting == "none" else 1e3), our)


def test_two_diagonal_steps_of_kl_shampoo_by_hand() -> None:
    # Each side is whitened by the other's factor of the step before, which has been refreshed.
    (g1, g2), beta = torch.tensor([[2.0, 1.0], [1.0, -3.0]]).double(), 0.75
    rows, columns = torch.zeros(2).double(), torch.ones(2).double()
    whitener_of_rows, whitener_of_columns, expected = torch.ones(2), torch.ones(2), []
    for t, g in ((1, g1), (2, g2)):
        rows = beta * rows + (1 - beta) * g**2 / whitener_of_rows / 2
        columns = beta * columns + (1 - beta) * g**2 / whitener_of_columns / 2
        corrected = rows / (1 - beta**t)
        whitener_of_rows, whitener_of_columns = columns, corrected
        expected.append(torch.diag(g / (corrected * columns).sqrt()))
    settings = {"preconditioner": "kl_shampoo", "grafting": "none"}
    directions = updates([torch.diag(g1), torch.diag(g2)], betas=(0.0, beta), **settings)
    for direction, diagonal in zip(directions, expected, strict=True):
        torch.testing.assert_close(direction, diagonal)


def test_kl_shampoo_finds_the_factors_of_a_kronecker_product() -> None:
    # Gradients A Z B, Z with uncorrelated entries, have the second moment (A Aᵀ) x (Bᵀ B), so that
    # the factors are proportional to these two.
    a = torch.tensor([[2.0, 0.3], [0.0, 0.5]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.2, 0.0], [0.0, 3.0, 0.4], [0.0, 0.0, 0.3]], dtype=torch.float64)
    patterns = sign_patterns(2, 3)
    gradients = [a @ patterns[step % 8] @ b for step in range(320)]
    settings = {"betas": (0.0, 0.98), "precondition_frequency": 10}
    found = rule(gradients, preconditioner="kl_shampoo", **settings)
    probe = random_gradients(1, (2, 3))[0]
    expected = matrix_power(a @ a.T, -0.5) @ probe @ matrix_power(b.T @ b, -0.5)
    torch.testing.assert_close(found.precondition(probe, 1.0), expected, rtol=0.05, atol=0.05)
