"""The reference's SOAP and KL-Shampoo, against truths that are known without it."""

import math

import pytest
import torch
from torch import Tensor

from tests.reference.soap import SoapRule
from tests.test_reference import matrix_power, orthogonal, random_gradients, reference, updates

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
    rule = soap_rule(
        [torch.outer(rows, columns) * signs for signs in sign_patterns(3, 2)], frequency=8
    )
    assert isinstance(rule, SoapRule)
    order = rows.argsort(), columns.argsort()
    expected = torch.outer(rows[order[0]] ** 2, columns[order[1]] ** 2)
    torch.testing.assert_close(rule.second_moment, expected * (8 + 1), rtol=1e-9, atol=1e-9)


def sign_patterns(m: int, n: int) -> list[Tensor]:
    """8 matrices of -1 and 1 of at most 7 entries, which are uncorrelated among each other."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    hadamard = torch.kron(two, torch.kron(two, two))
    return [row[1 : m * n + 1].reshape(m, n) for row in hadamard]


def soap_rule(gradients: list[Tensor], frequency: int) -> object:
    soap = reference(
        {"w": tuple(gradients[0].shape)},
        preconditioner="soap",
        betas=(0.0, 1.0),
        precondition_frequency=frequency,
        grafting="none",
        grafting_beta2=0.9,
    )
    params = {"w": torch.zeros_like(gradients[0])}
    for gradient in gradients:
        soap.step(params, {"w": gradient})
    (block,) = soap.blocks["w"]
    return block.rule


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
    g1, g2, beta = [2.0, 1.0], [1.0, -3.0], 0.75
    rows, columns = [0.0, 0.0], [1.0, 1.0]
    whitener_of_rows, whitener_of_columns, expected = [1.0, 1.0], [1.0, 1.0], []
    for t, g in ((1, g1), (2, g2)):
        rows = [
            beta * s + (1 - beta) * x**2 / w / 2
            for s, x, w in zip(rows, g, whitener_of_rows, strict=True)
        ]
        columns = [
            beta * s + (1 - beta) * x**2 / w / 2
            for s, x, w in zip(columns, g, whitener_of_columns, strict=True)
        ]
        corrected = [s / (1 - beta**t) for s in rows]
        whitener_of_rows, whitener_of_columns = columns, corrected
        expected.append(
            [x / math.sqrt(r * c) for x, r, c in zip(g, corrected, columns, strict=True)]
        )
    directions = updates(
        [torch.diag(torch.tensor(g, dtype=torch.float64)) for g in (g1, g2)],
        preconditioner="kl_shampoo",
        betas=(0.0, beta),
        grafting="none",
    )
    for direction, diagonal in zip(directions, expected, strict=True):
        torch.testing.assert_close(direction, torch.diag(torch.tensor(diagonal).double()))


def test_kl_shampoo_finds_the_factors_of_a_kronecker_product() -> None:
    # Gradients A Z B, Z with uncorrelated entries, have the second moment (A Aᵀ) x (Bᵀ B), so that
    # the factors are proportional to these two.
    a = torch.tensor([[2.0, 0.3], [0.0, 0.5]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.2, 0.0], [0.0, 3.0, 0.4], [0.0, 0.0, 0.3]], dtype=torch.float64)
    patterns = sign_patterns(2, 3)
    kl = reference(
        {"w": (2, 3)},
        preconditioner="kl_shampoo",
        betas=(0.0, 0.98),
        precondition_frequency=10,
        grafting="none",
    )
    params = {"w": torch.zeros(2, 3, dtype=torch.float64)}
    for step in range(320):
        kl.step(params, {"w": a @ patterns[step % 8] @ b})
    (block,) = kl.blocks["w"]
    probe = random_gradients(1, (2, 3))[0]
    expected = matrix_power(a @ a.T, -0.5) @ probe @ matrix_power(b.T @ b, -0.5)
    torch.testing.assert_close(block.rule.precondition(probe, 1.0), expected, rtol=0.05, atol=0.05)
