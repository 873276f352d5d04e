"""The reference itself, against truths that are known without it."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_fsdp import ShampooConfig
from tests.reference import ReferenceShampoo


def tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def reference(shapes: Mapping[str, tuple[int, ...]], **settings: Any) -> ReferenceShampoo:
    defaults: dict[str, Any] = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "max_preconditioner_dim": 4,
        "precondition_frequency": 1,
        "preconditioner": "shampoo",
        "refresh_schedule": "together",
        "refresh_warmup_steps": 0,
    }
    settings = defaults | settings
    settings.setdefault("start_preconditioning_step", settings["precondition_frequency"])
    settings.setdefault("beta3", settings["betas"][0])
    excluded = settings.pop("excluded", set())
    group = {key: settings.pop(key) for key in ("lr", "betas", "eps")}
    config = ShampooConfig(**settings)
    return ReferenceShampoo(shapes, config, excluded=excluded, weight_decay=0.0, **group)


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = u @ vt
    return product


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


@pytest.mark.parametrize("beta2", [0.0, 0.9, 1.0])
def test_the_first_step_orthogonalises_every_block_with_its_own_norm(beta2: float) -> None:
    # L^(-1/4) G R^(-1/4) = U S^(-1/2) S S^(-1/2) Vᵀ = U Vᵀ for G = U S Vᵀ; the bias correction
    # makes it so for every beta2. Grafting then gives it the norm of G.
    grads = tensors({"w": (5, 7)}, seed=4)
    params = {"w": torch.zeros(5, 7, dtype=torch.float64)}
    shampoo = reference({"w": (5, 7)}, lr=1.0, betas=(0.0, beta2), grafting="sgd")
    shampoo.step(params, grads)
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 4), slice(4, 7)):
            grad = grads["w"][rows, columns]
            expected = orthogonal(grad) * math.sqrt(grad.square().sum() / min(grad.shape))
            torch.testing.assert_close(params["w"][rows, columns], -expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- large dimensions


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
