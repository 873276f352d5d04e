"""The reference itself, against truths that are known without it."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import ReferenceShampoo
from tests.reference.algebra import inverse_root

SHAPES = {"w": (5, 7), "b": (6,), "experts": (2, 3, 4), "conv": (4, 3, 2, 2)}


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
        "weight_decay": 0.0,
        "max_preconditioner_dim": 4,
        "precondition_frequency": 1,
        "preconditioner_eps": 1e-12,
        "refresh_warmup_steps": 0,
    }
    settings = defaults | settings
    settings.setdefault("start_preconditioning_step", settings["precondition_frequency"])
    settings.setdefault("beta3", settings["betas"][0])
    return ReferenceShampoo(shapes, **settings)


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = u @ vt
    return product


def test_inverse_root_raises_eigenvalues_to_the_resolution_of_fp32() -> None:
    root = inverse_root(torch.diag(torch.tensor([-5.0, 16.0], dtype=torch.float64)), 1 / 4, 1e-12)
    least = (16 * 2**-23 + 1e-12) ** -0.25
    torch.testing.assert_close(root, torch.diag(torch.tensor([least, 0.5], dtype=torch.float64)))


# -------------------------------------------------------------------- the whole method

ADAM = {"betas": (0.9, 0.99), "eps": 1e-8}


@pytest.mark.parametrize(
    ("settings", "kind", "options"),
    [
        ({"excluded": set(SHAPES)}, torch.optim.AdamW, ADAM | {"weight_decay": 0.1}),
        ({"weight_decay": 0.1}, torch.optim.AdamW, ADAM | {"weight_decay": 0.1}),
        ({"betas": (0.0, 0.99), "grafting": "rmsprop"}, torch.optim.RMSprop, {}),
        ({"betas": (0.0, 0.99), "grafting": "adagrad"}, torch.optim.Adagrad, {"eps": 1e-8}),
        ({"preconditioner": "soap"}, torch.optim.Adam, ADAM),
        ({"preconditioner": "soap", "grafting": "none"}, torch.optim.Adam, ADAM),
    ],
)
def test_before_the_start_it_is_the_optimizer_of_torch(settings, kind, options) -> None:
    ours = tensors(SHAPES, seed=0)
    theirs = {name: p.clone().requires_grad_() for name, p in ours.items()}
    settings = {"weight_decay": options.get("weight_decay", 0.0), **settings}
    shampoo = reference(SHAPES, start_preconditioning_step=99, **settings)
    optimizer = kind(theirs.values(), lr=0.1, **options)
    for step in range(1, 21):
        grads: dict[str, Tensor | None] = {**tensors(SHAPES, seed=step)}
        if step % 3 == 0:
            grads["b"] = None  # untouched, in torch as well
        for name, p in theirs.items():
            p.grad = grads[name]
        shampoo.step(ours, grads)
        optimizer.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)


def test_first_two_steps_of_a_diagonal_block_by_hand() -> None:
    # Diagonal gradients keep every matrix diagonal, so each line is arithmetic of scalars.
    g1, g2 = [2.0, 1.0], [1.0, -3.0]
    params = {"w": torch.zeros(2, 2, dtype=torch.float64)}
    shampoo = reference({"w": (2, 2)}, lr=1.0, betas=(0.5, 0.75), grafting="sgd")
    shampoo.step(params, {"w": torch.diag(torch.tensor(g1, dtype=torch.float64))})
    first = params["w"].clone()
    shampoo.step(params, {"w": torch.diag(torch.tensor(g2, dtype=torch.float64))})
    second = params["w"] - first

    # L = R = diag(g²) at step 1, so P = L^(-1/4) G R^(-1/4) = sign(G), with G's norm.
    size = math.hypot(*g1) / math.sqrt(2)
    expected = torch.diag(torch.tensor([-size, -size], dtype=torch.float64))
    torch.testing.assert_close(first, expected)

    m_hat = [(0.25 * a + 0.5 * b) / (1 - 0.25) for a, b in zip(g1, g2, strict=True)]
    factor = [(0.1875 * a**2 + 0.25 * b**2) / (1 - 0.5625) for a, b in zip(g1, g2, strict=True)]
    p = [m / math.sqrt(f) for m, f in zip(m_hat, factor, strict=True)]
    scale = math.hypot(*m_hat) / math.hypot(*p)
    expected = torch.diag(torch.tensor([-scale * x for x in p], dtype=torch.float64))
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 1.0])
def test_first_step_orthogonalises_a_matrix(shape: tuple[int, int], beta2: float) -> None:
    # L^(-1/4) G R^(-1/4) = U S^(-1/2) S S^(-1/2) Vᵀ = U Vᵀ for G = U S Vᵀ; the bias correction
    # makes it so for every beta2. Grafting then gives it the norm of G.
    grad = tensors({"w": shape}, seed=3)["w"]
    params = {"w": torch.zeros(shape, dtype=torch.float64)}
    shampoo = reference(
        {"w": shape}, lr=1.0, betas=(0.0, beta2), max_preconditioner_dim=8, grafting="sgd"
    )
    shampoo.step(params, {"w": grad})
    direction = orthogonal(grad)
    torch.testing.assert_close(
        params["w"], -direction * grad.norm() / direction.norm(), rtol=1e-6, atol=1e-6
    )


def test_every_block_is_orthogonalised_with_its_own_norm() -> None:
    grads = tensors({"w": (5, 7)}, seed=4)
    params = {"w": torch.zeros(5, 7, dtype=torch.float64)}
    shampoo = reference({"w": (5, 7)}, lr=1.0, betas=(0.0, 0.0), grafting="sgd")
    shampoo.step(params, grads)
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 4), slice(4, 7)):
            grad = grads["w"][rows, columns]
            expected = orthogonal(grad) * math.sqrt(grad.square().sum() / min(grad.shape))
            torch.testing.assert_close(params["w"][rows, columns], -expected, rtol=1e-6, atol=1e-6)


def test_order_3_takes_three_inverse_sixth_roots() -> None:
    # A superdiagonal tensor has diagonal factors g², so each g becomes g / (g²)^(3/6) = 1.
    grad = torch.zeros(3, 3, 1, 3, dtype=torch.float64)
    for i, g in enumerate([4.0, 2.0, 0.5]):
        grad[i, i, 0, i] = g
    params = {"x": torch.zeros_like(grad)}
    shampoo = reference(
        {"x": (3, 3, 1, 3)}, lr=1.0, betas=(0.0, 0.0), grafting="sgd", merge_dims="small"
    )
    shampoo.step(params, {"x": grad})
    expected = (grad > 0).double() * grad.norm() / math.sqrt(3)
    torch.testing.assert_close(params["x"], -expected)


# ---------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({"precondition_frequency": 3}, [3, 6, 9], [3, 6, 9]),
        ({"precondition_frequency": 4, "start_preconditioning_step": 3}, [3, 4, 8], [3, 4, 8]),
        (
            {
                "precondition_frequency": 4,
                "start_preconditioning_step": 5,
                "refresh_schedule": "staggered",
                "phase": lambda name, coordinates: coordinates[1],
            },
            [5, 8],
            [5, 7],
        ),
    ],
)
def test_the_steps_at_which_roots_change(settings, first, second) -> None:
    shampoo = reference({"w": (4, 8)}, **settings)
    params, changed = tensors({"w": (4, 8)}, seed=0), ([], [])
    for step in range(1, 11):
        before = [block.rule.roots[0] for block in shampoo.blocks["w"]]
        shampoo.step(params, tensors({"w": (4, 8)}, seed=step))
        for block, root, steps in zip(shampoo.blocks["w"], before, changed, strict=True):
            if block.rule.roots[0] is not root:
                steps.append(step)
    assert changed == (first, second)


# -------------------------------------------------------------------------- bad gradients


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_leaves_the_block_unchanged(bad: float) -> None:
    shapes = {"w": (4, 8), "b": (3,)}
    shampoo = reference(shapes, excluded={"b"}, weight_decay=0.5)
    params = tensors(shapes, seed=0)
    shampoo.step(params, tensors(shapes, seed=1))
    before = {name: p.clone() for name, p in params.items()}
    bad_block, good_block = shampoo.blocks["w"]
    state = bad_block.moments.momentum, bad_block.moments.graft, *bad_block.rule.factors
    good_momentum = good_block.moments.momentum
    grads = tensors(shapes, seed=2)
    grads["w"][1, 2] = bad
    grads["b"][1] = bad
    shampoo.step(params, grads)

    after = bad_block.moments.momentum, bad_block.moments.graft, *bad_block.rule.factors
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))
    assert not torch.equal(good_block.moments.momentum, good_momentum)
    decayed = {name: p * (1 - 0.1 * 0.5) for name, p in before.items()}
    torch.testing.assert_close(params["w"][:, :4], decayed["w"][:, :4])
    assert not torch.isclose(params["w"][:, 4:], decayed["w"][:, 4:]).any()
    # An entry of an excluded parameter stays, whatever momentum it has.
    assert (params["b"] == before["b"]).tolist() == [False, True, False]
    assert not torch.isclose(params["b"], decayed["b"])[::2].any()
    assert shampoo.t == {"w": 2, "b": 2}
