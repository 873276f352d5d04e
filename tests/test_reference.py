"""The reference itself, against truths that are known without it."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.reference import ReferenceShampoo, block_slices, inverse_root, precondition, tile_sizes

SHAPES = {"w": (5, 7), "b": (6,), "experts": (2, 3, 4), "conv": (4, 3, 2, 2)}


def tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def reference(shapes: Mapping[str, tuple[int, ...]], **settings: object) -> ReferenceShampoo:
    defaults: dict[str, object] = {
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
    settings.setdefault("beta3", settings["betas"][0])  # type: ignore[index]
    return ReferenceShampoo(shapes, **settings)  # type: ignore[arg-type]


def orthogonal(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = u @ vt
    return product


# ------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize(
    ("size", "cap", "expected"),
    [
        (5, 8, [5]),
        (8, 8, [8]),
        (9, 8, [5, 4]),
        (10, 4, [4, 3, 3]),
        (1, 1, [1]),
        (3, 1, [1] * 3),
        (1000, 512, [504, 496]),
        (200, 72, [72, 64, 64]),
        (120, 64, [60, 60]),
        (1001, 512, [501, 500]),
    ],
)
def test_tiles_are_nearly_equal(size: int, cap: int, expected: list[int]) -> None:
    assert tile_sizes(size, cap) == expected


def test_blocks_cover_each_entry_once() -> None:
    covered = torch.zeros(9, 10)
    blocks = block_slices((9, 10), 4)
    for slices in blocks.values():
        covered[slices] += 1
    assert (covered == 1).all()
    assert blocks[0, 0] == (slice(0, 3), slice(0, 4))
    assert blocks[2, 1] == (slice(6, 9), slice(4, 7))


@pytest.mark.parametrize("power", [2, 4, 6])
def test_inverse_root_is_undone_by_its_power(power: int) -> None:
    half = tensors({"half": (5, 5)}, seed=1)["half"]
    factor = half @ half.T
    root = inverse_root(factor, 1 / power, 1e-3)
    ridge = 1e-3 * torch.eye(5, dtype=torch.float64)
    inverse = torch.linalg.matrix_power(root, power)
    torch.testing.assert_close(inverse @ (factor + ridge), torch.eye(5, dtype=torch.float64))


def test_inverse_root_raises_eigenvalues_to_the_resolution_of_fp32() -> None:
    root = inverse_root(torch.diag(torch.tensor([-5.0, 16.0], dtype=torch.float64)), 1 / 4, 1e-12)
    least = (16 * 2**-23 + 1e-12) ** -0.25
    torch.testing.assert_close(root, torch.diag(torch.tensor([least, 0.5], dtype=torch.float64)))


def test_precondition_multiplies_each_dimension() -> None:
    t = tensors({"x": (2, 3, 4), "a": (2, 2), "b": (3, 3), "c": (4, 4)}, seed=2)
    a, b, c = (t[k] + t[k].T for k in "abc")
    expected = torch.einsum("ijk,il,jm,kn->lmn", t["x"], a, b, c)
    torch.testing.assert_close(precondition(t["x"], [a, b, c]), expected)
    torch.testing.assert_close(precondition(t["x"][0], [b, c]), b @ t["x"][0] @ c)


# -------------------------------------------------------------------- the whole method


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("why", ["excluded", "before the start"])
def test_equals_adamw(why: str, weight_decay: float) -> None:
    ours = tensors(SHAPES, seed=0)
    theirs = {name: p.clone().requires_grad_() for name, p in ours.items()}
    settings = (
        {"excluded": set(SHAPES)} if why == "excluded" else {"start_preconditioning_step": 21}
    )
    shampoo = reference(SHAPES, weight_decay=weight_decay, **settings)
    adamw = torch.optim.AdamW(
        theirs.values(), lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay
    )
    for step in range(1, 21):
        grads: dict[str, Tensor | None] = {**tensors(SHAPES, seed=step)}
        if step % 3 == 0:
            grads["b"] = None  # untouched, in AdamW as well
        for name, p in theirs.items():
            p.grad = grads[name]
        shampoo.step(ours, grads)
        adamw.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)


def test_one_entry_is_adam_whatever_the_preconditioner() -> None:
    # A 1x1 block's direction has only a sign, and grafting gives it Adam's size.
    ours = {"w": torch.tensor([[2.0]], dtype=torch.float64)}
    shampoo = reference({"w": (1, 1)}, betas=(0.5, 0.5), lr=1.0, eps=0.0)
    shampoo.step(ours, {"w": torch.tensor([[3.0]], dtype=torch.float64)})
    assert ours["w"].item() == pytest.approx(2 - 1)  # M̂ = 3, sqrt(Â) = 3
    shampoo.step(ours, {"w": torch.tensor([[-1.0]], dtype=torch.float64)})
    m_hat = (0.25 * 3 - 0.5 * 1) / 0.75
    a_hat = (0.25 * 9 + 0.5 * 1) / 0.75
    assert ours["w"].item() == pytest.approx(1 - m_hat / math.sqrt(a_hat))


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


def test_vector_takes_the_inverse_square_root() -> None:
    # For g1 orthogonal to g2, L = g1 g1ᵀ + g2 g2ᵀ has them as eigenvectors, with |g|² as
    # eigenvalues: L^(-1/2) (a g1 + b g2) = a g1 / |g1| + b g2 / |g2|.
    g1 = torch.tensor([2.0, 1.0], dtype=torch.float64)
    g2 = torch.tensor([-3.0, 6.0], dtype=torch.float64)
    params = {"b": torch.zeros(2, dtype=torch.float64)}
    shampoo = reference({"b": (2,)}, lr=1.0, betas=(0.5, 1.0), grafting="sgd")
    shampoo.step(params, {"b": g1})
    torch.testing.assert_close(params["b"], -g1)
    shampoo.step(params, {"b": g2})
    m_hat = (0.25 * g1 + 0.5 * g2) / 0.75
    direction = 0.25 * g1 / g1.norm() + 0.5 * g2 / g2.norm()
    torch.testing.assert_close(params["b"], -g1 - direction * m_hat.norm() / direction.norm())


def test_order_3_takes_three_inverse_sixth_roots() -> None:
    # A superdiagonal tensor has diagonal factors g², so each g becomes g / (g²)^(3/6) = 1.
    grad = torch.zeros(3, 3, 3, dtype=torch.float64)
    for i, g in enumerate([4.0, 2.0, 0.5]):
        grad[i, i, i] = g
    params = {"x": torch.zeros(3, 3, 3, dtype=torch.float64)}
    shampoo = reference(
        {"x": (3, 3, 3)}, lr=1.0, betas=(0.0, 0.0), grafting="sgd", batched_3d=False
    )
    shampoo.step(params, {"x": grad})
    expected = (grad > 0).double() * grad.norm() / math.sqrt(3)
    torch.testing.assert_close(params["x"], -expected)


def test_batch_of_matrices_and_convolution_equal_their_matrices() -> None:
    settings = {"precondition_frequency": 2}
    together = tensors(SHAPES, seed=0)
    shampoo = reference(SHAPES, **settings)
    apart_shapes = {"e0": (3, 4), "e1": (3, 4), "conv": (4, 12)}
    apart = {
        "e0": together["experts"][0].clone(),
        "e1": together["experts"][1].clone(),
        "conv": together["conv"].reshape(4, 12).clone(),
    }
    apart_shampoo = reference(apart_shapes, **settings)
    for step in range(1, 6):
        grads = tensors(SHAPES, seed=step)
        shampoo.step(together, grads)
        e0, e1 = grads["experts"]
        apart_shampoo.step(apart, {"e0": e0, "e1": e1, "conv": grads["conv"].reshape(4, 12)})
    assert torch.equal(together["experts"], torch.stack([apart["e0"], apart["e1"]]))
    assert torch.equal(together["conv"].reshape(4, 12), apart["conv"])


def test_adam_grafting_gives_the_norm_of_adam() -> None:
    grads = tensors({"w": (4, 4)}, seed=6)
    shampoo_params = {"w": torch.zeros(4, 4, dtype=torch.float64)}
    adam_params = {"w": torch.zeros(4, 4, dtype=torch.float64)}
    reference({"w": (4, 4)}).step(shampoo_params, grads)
    reference({"w": (4, 4)}, excluded={"w"}).step(adam_params, grads)
    torch.testing.assert_close(shampoo_params["w"].norm(), adam_params["w"].norm())
    assert not torch.allclose(shampoo_params["w"], adam_params["w"])


@pytest.mark.parametrize("grafting", ["rmsprop", "adagrad"])
def test_equals_torch_before_the_start(grafting: str) -> None:
    ours = tensors(SHAPES, seed=0)
    theirs = {name: p.clone().requires_grad_() for name, p in ours.items()}
    shampoo = reference(SHAPES, betas=(0.0, 0.99), grafting=grafting, start_preconditioning_step=99)
    optimizer: torch.optim.Optimizer
    if grafting == "rmsprop":
        optimizer = torch.optim.RMSprop(theirs.values(), lr=0.1, alpha=0.99, eps=1e-8)
    else:
        optimizer = torch.optim.Adagrad(theirs.values(), lr=0.1, eps=1e-8)
    for step in range(1, 21):
        grads = tensors(SHAPES, seed=step)
        for name, p in theirs.items():
            p.grad = grads[name]
        shampoo.step(ours, grads)
        optimizer.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- schedule


def refresh_steps(steps: int, **settings: object) -> dict[tuple[int, ...], list[int]]:
    """The steps at which each block's roots changed."""
    shapes = {"w": (4, 8)}
    shampoo = reference(shapes, **settings)
    params = tensors(shapes, seed=0)
    changed: dict[tuple[int, ...], list[int]] = {b.coordinates: [] for b in shampoo.blocks["w"]}
    for step in range(1, steps + 1):
        before = [block.rule.roots[0] for block in shampoo.blocks["w"]]
        shampoo.step(params, tensors(shapes, seed=step))
        for block, roots in zip(shampoo.blocks["w"], before, strict=True):
            if block.rule.roots[0] is not roots:
                changed[block.coordinates].append(step)
    return changed


def test_together_refreshes_at_multiples_of_the_frequency() -> None:
    expected = [3, 6, 9]
    assert refresh_steps(10, precondition_frequency=3) == {(0, 0): expected, (0, 1): expected}


def test_first_refresh_is_at_the_start() -> None:
    changed = refresh_steps(10, precondition_frequency=4, start_preconditioning_step=3)
    assert changed[0, 0] == [3, 4, 8]


def test_staggered_refreshes_by_phase() -> None:
    changed = refresh_steps(
        14,
        precondition_frequency=4,
        start_preconditioning_step=5,
        refresh_schedule="staggered",
        phase=lambda name, coordinates: coordinates[1],
    )
    assert changed == {(0, 0): [5, 8, 12], (0, 1): [5, 7, 11]}


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


def test_zero_gradients_give_no_step() -> None:
    params = tensors({"w": (4, 4)}, seed=0)
    before = params["w"].clone()
    shampoo = reference({"w": (4, 4)})
    for _ in range(3):
        shampoo.step(params, {"w": torch.zeros(4, 4, dtype=torch.float64)})
    assert torch.equal(params["w"], before)


def test_parameter_without_gradient_is_untouched() -> None:
    shapes = {"w": (4, 4), "v": (4, 4)}
    params = tensors(shapes, seed=0)
    before = params["v"].clone()
    shampoo = reference(shapes, weight_decay=0.1)
    shampoo.step(params, {"w": torch.ones(4, 4, dtype=torch.float64), "v": None})
    assert torch.equal(params["v"], before)
    assert shampoo.t == {"w": 1, "v": 0}
