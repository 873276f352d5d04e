"""The reference's settings of all kinds, against truths that are known without it."""

import pytest
import torch
from torch import Tensor

from tests.test_reference import reference, tensors


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(eigenvalues**exponent) @ vectors.T


def updates(gradients: list[Tensor], **settings: object) -> list[Tensor]:
    """The directions D that a matrix takes on the steps of these gradients."""
    settings = {"lr": 1.0, "max_preconditioner_dim": 100, **settings}
    shampoo = reference({"w": tuple(gradients[0].shape)}, **settings)
    params = {"w": torch.zeros_like(gradients[0])}
    directions = []
    for gradient in gradients:
        before = params["w"].clone()
        shampoo.step(params, {"w": gradient})
        directions.append(before - params["w"])
    return directions


def random_gradients(steps: int, shape: tuple[int, ...]) -> list[Tensor]:
    return [tensors({"w": shape}, seed=step)["w"] for step in range(1, steps + 1)]


# ------------------------------------------------------------------ views and large dimensions


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (4, 6)])
def test_merged_dimensions_are_trained_as_one(shape: tuple[int, ...]) -> None:
    gradients = random_gradients(3, shape)
    merged = updates(gradients, merge_dims="small", max_preconditioner_dim=24)
    flat = updates([g.flatten() for g in gradients], max_preconditioner_dim=24)
    assert all(torch.equal(a.flatten(), b) for a, b in zip(merged, flat, strict=True))


def test_one_sided_is_the_inverse_square_root_of_one_factor() -> None:
    gradients = random_gradients(3, (3, 6))
    (*_, last) = updates(
        gradients,
        betas=(0.0, 0.5),
        max_preconditioner_dim=4,
        large_dim="one_sided",
        grafting="none",
    )
    factor = sum(0.5 ** (2 - i) * g @ g.T for i, g in enumerate(gradients)) / (1 + 0.5 + 0.25)
    torch.testing.assert_close(last, matrix_power(factor, -0.5) @ gradients[-1])


def test_two_diagonal_sides_are_sums_over_rows_and_columns() -> None:
    gradients = random_gradients(3, (5, 6))
    (*_, last) = updates(
        gradients,
        betas=(0.0, 1.0),
        precondition_frequency=3,
        max_preconditioner_dim=4,
        large_dim="diagonal",
        grafting="none",
    )
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
    first, second = updates(
        gradients, betas=(0.5, 0.5), grafting="none", start_preconditioning_step=2
    )
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


def test_the_pseudo_inverse_leaves_null_spaces_out() -> None:
    gradient = torch.outer(*(tensors({"a": (5,), "b": (5,)}, seed=1).values()))
    other = random_gradients(1, (5, 5))[0]
    settings = {"betas": (0.5, 1.0), "grafting": "none", "root_method": "eigh_pseudo_inverse"}
    shampoo = reference({"w": (5, 5)}, lr=1.0, max_preconditioner_dim=5, **settings)
    params = {"w": torch.zeros(5, 5, dtype=torch.float64)}
    shampoo.step(params, {"w": gradient})
    (block,) = shampoo.blocks["w"]
    block.moments.momentum = other  # with parts outside of the row and column spaces
    direction = block.rule.precondition(other, 1.0)
    size = gradient.norm()
    left, right = gradient @ gradient.T / size**2, gradient.T @ gradient / size**2
    torch.testing.assert_close(direction, left @ other @ right / size)


@pytest.mark.parametrize("grafting", ["sgd", "rmsprop", "adagrad", "adam"])
def test_grafting_gives_the_norm_of_the_other_method(grafting: str) -> None:
    gradients = random_gradients(4, (4, 5))
    settings = {"grafting": grafting, "grafting_beta2": 0.7, "grafting_eps": 1e-3}
    ours = updates(gradients, **settings)
    theirs = updates(gradients, excluded={"w"}, **settings)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.norm(), their.norm())
        assert not torch.allclose(our, their)
