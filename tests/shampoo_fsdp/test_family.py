"""Every member of the family against the fp64 reference: preconditioner, grafting, roots, momentum,
weight decay, views, large dimensions, types of the state.

What is compared is the sum of all updates, and gradients are such that the comparison is well
posed: an eigenbasis is determined by its matrix only as far as eigenvalues are apart, and an
inverse root only as far as the matrix has full rank. So gradients have full rank and a spread
spectrum, in a basis that is not the axes', and bases are first taken when enough of them have been
summed up. (What holds for other gradients is the subject of test_bad_numbers.py.)
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from shampoo_fsdp import Shampoo
from shampoo_fsdp.plan.assignment import refresh_phase
from shampoo_fsdp.plan.grid import make_grid
from tests.models import set_gradients
from tests.reference import ReferenceShampoo
from tests.reference.algebra import rounded

STEPS = 20
START = 9
SHAPES = {
    "layers.0.w": (12, 9),  # 2 x 2 blocks
    "layers.0.experts": (2, 6, 5),
    "layers.0.conv": (4, 3, 2, 2),
    "layers.0.norm.weight": (7,),
    "tok_embeddings.weight": (10, 6),
}
ORDER_3 = {"layers.0.tensor": (5, 9, 1, 3)}  # with merge_dims = "small"
DEFAULTS = {
    "lr": 1e-2,
    "lr_factor": 1.0,
    "betas": (0.9, 0.9),
    "max_preconditioner_dim": 8,
    "precondition_frequency": 3,
    "start_preconditioning_step": START,
    "refresh_warmup_steps": 0,
    "beta3": 0.9,
}


def spread_gradients(shapes: Mapping[str, tuple[int, ...]], step: int) -> dict[str, Tensor]:
    """Random gradients whose second moments have eigenvalues a factor of 1.5 apart or so."""
    return {name: _spread_gradient(name, shape, step) for name, shape in shapes.items()}


@functools.cache
def _spread_gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    lasting = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    fresh = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    gradient = torch.randn(shape, generator=fresh, dtype=torch.float64)
    for d, size in enumerate(shape):
        scales = min(1.25, 20 ** (1 / size)) ** torch.arange(size, dtype=torch.float64)
        square = torch.randn(size, size, generator=lasting, dtype=torch.float64)
        rotation = torch.linalg.qr(square)[0]
        mixing = rotation @ torch.diag(scales / scales.mean())
        gradient = torch.tensordot(gradient, mixing, dims=([d], [1])).movedim(-1, d)
    return 0.01 * gradient.contiguous().float()


Change = Callable[[int, dict[str, Tensor | None]], object]
"""May alter the gradients of a step."""
UNCHANGED: Change = lambda step, gradients: None  # noqa: E731


def gradients_of(
    shapes: Mapping[str, tuple[int, ...]], step: int, change: Change
) -> dict[str, Tensor | None]:
    gradients: dict[str, Tensor | None] = {
        name: gradient.clone() for name, gradient in spread_gradients(shapes, step).items()
    }
    change(step, gradients)
    return gradients


def beginning(
    shapes: Mapping[str, tuple[int, ...]], options: dict[str, object]
) -> tuple[dict[str, Tensor], Shampoo]:
    """Values of parameters, and an optimizer of parameters that have them."""
    generator = torch.Generator().manual_seed(0)
    start = {n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    named = [(n, nn.Parameter(p.clone())) for n, p in start.items()]
    return start, Shampoo(named, **DEFAULTS | options)


def reference_update(
    optimizer: Shampoo, start: Mapping[str, Tensor], change: Change = UNCHANGED
) -> dict[str, Tensor]:
    """The sum of all updates, by the reference."""
    group, config = optimizer.param_groups[0], optimizer.config
    shapes = {n: tuple(p.shape) for n, p in start.items()}

    def phase(name: str, number: int) -> int:
        blocks = len(make_grid(shapes[name], config))
        return refresh_phase(name, number, blocks, config.precondition_frequency)

    vectors = {n for n, s in shapes.items() if sum(side > 1 for side in s) < 2}
    excluded = (set() if config.precondition_1d else vectors) | {n for n in shapes if "emb" in n}
    group = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    reference = ReferenceShampoo(shapes, config, excluded=excluded, phase=phase, **group)
    found = {n: p.double() for n, p in start.items()}
    for step in range(STEPS):
        reference.step(found, gradients_of(shapes, step, change))
    return {n: found[n] - p.double() for n, p in start.items()}


def relative_error(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, change: Change = UNCHANGED, **options
) -> float:
    """Of the sum of all updates of a parameter, the largest of all parameters."""
    start, optimizer = beginning(shapes, options)
    parameters = dict(zip(shapes, optimizer.param_groups[0]["params"], strict=True))
    for step in range(STEPS):
        set_gradients(parameters, gradients_of(shapes, step, change))
        optimizer.step()
    errors = []
    for n, exact in reference_update(optimizer, start, change).items():
        update = parameters[n].detach().double() - start[n].double()
        errors.append((update - exact).norm() / exact.norm())
    return torch.stack(errors).max().item()  # NaN if one is


def effect_of_rounding(shapes: Mapping[str, tuple[int, ...]], **options) -> float:
    """How far the reference's update moves, relatively, if its state is rounded to fp32: the
    largest of several roundings. It is large where a factor has a large condition number."""
    start, optimizer = beginning(shapes, options)
    exact, moved = reference_update(optimizer, start), 0.0
    for seed in range(4):
        with rounded(seed):
            for n, other in reference_update(optimizer, start).items():
                moved = max(moved, ((other - exact[n]).norm() / exact[n].norm()).item())
    return moved


ROUNDINGS = 10
"""So many roundings of a kept number go into it on a step: products, average, root."""
RULES = ["shampoo", "soap", "kl_shampoo"]
MOMENTA = {
    "none": {},
    "heavy ball": {"momentum": 0.8},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "dampened": {"momentum": 0.8, "dampening": 0.3},
}
DECAYS = ["decoupled", "l2", "independent"]
GRAFTING = ["adam", "rmsprop", "adagrad", "sgd", "none"]
SCHEDULES = ["together", "staggered"]
BOTH = [False, True]
ROOTS = [
    ("shampoo", "eigh"),
    ("shampoo", "eigh_pseudo_inverse"),
    ("shampoo", "coupled_newton"),
    ("shampoo", "polynomial"),
    ("shampoo", "qr"),
    ("soap", "eigh"),
    ("soap", "qr"),
    ("kl_shampoo", "eigh"),
    ("kl_shampoo", "coupled_newton"),
    ("kl_shampoo", "polynomial"),
    ("kl_shampoo", "qr"),
]


def tolerance(preconditioner: str, root_method: str) -> float:
    """Where each side is whitened by the other's root, an inexact basis feels roundings twice."""
    if preconditioner == "kl_shampoo" and root_method == "coupled_newton":
        return 1e-3  # it does not raise eigenvalues sharply
    return 3e-4 if (preconditioner, root_method) == ("kl_shampoo", "qr") else 1e-4


def every(**choices) -> list[dict[str, object]]:
    """Settings for each combination of choices; a choice that is no list is the same for all."""
    lists = [value if isinstance(value, list) else [value] for value in choices.values()]
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*lists)]


BLOCKS_OF_6 = {"layers.0.w": (6, 6), "layers.1.w": (6, 12), "layers.2.w": (12, 6)}
VECTORS_TOO = {"precondition_1d": True, "merge_dims": "small", "grafting": "none"}
CASES = [
    *every(preconditioner=RULES, grafting=GRAFTING),
    *every(rule=ROOTS),  # refreshed together they are below
    *every(refresh_schedule=SCHEDULES, refresh_warmup_steps=[15, None], precondition_frequency=4),
    *every(
        shapes=BLOCKS_OF_6,
        preconditioner=RULES,
        large_dim=["block", "one_sided", "diagonal"],
        max_preconditioner_dim=6,
        start_preconditioning_step=1,
    ),
    *every(
        shapes=SHAPES | {"layers.1.w": (6, 12)},
        preconditioner=RULES,
        grafting=["adam", "none"],
        beta3=[0.0, 0.95],
        large_dim="one_sided",
    ),
    *every(
        preconditioner=["shampoo", "soap"],
        grafting=["adagrad", "none"],
        betas=(0.9, 1.0),
        grafting_beta2=0.9,
    ),
    *(
        {"shapes": SHAPES | ORDER_3, "rule": rule, "root_exponents": exponents, **VECTORS_TOO}
        for rule, exponents in (
            (("shampoo", "eigh"), [0.75, 0.5, 0.25]),
            (("shampoo", "eigh"), [0.0, 0.3]),
            (("shampoo", "qr"), [0.0, 0.3]),
            (("shampoo", "coupled_newton"), [0.25, 0.5]),
            (("shampoo", "polynomial"), [0.25, 0.5, 0.125]),
        )
    ),
    *every(base_width=8, weight_decay_type=DECAYS, weight_decay=0.1),
    *every(preconditioner=RULES, symmetric_packing=BOTH, factor_dtype="bfloat16", most=1e-3),
    *every(preconditioner=RULES, symmetric_packing=BOTH, root_dtype="bfloat16", most=1e-3),
    *every(preconditioner=RULES, momentum_dtype="bfloat16", most=1e-3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_member_equals_the_reference(case):
    assert error_of_rule(**case) <= 1.0


def error_of_rule(rule=None, most=None, **settings) -> float:
    """Of a preconditioner with a root method, in multiples of what is allowed."""
    if rule:
        settings |= zip(("preconditioner", "root_method"), rule, strict=True)
    return relative_error(**settings) / (most or tolerance(*(rule or ("", ""))))


@pytest.mark.parametrize("root_method", ["eigh", "qr"])
@pytest.mark.parametrize("grafting", ["adam", "none"])
def test_soap_of_gradients_that_lack_rank(root_method, grafting):
    """Its bases are determined by what gradients have, also where that is little."""

    def lower_rank(step, gradients):
        for gradient in gradients.values():
            for i in range(1, gradient.shape[-1]):  # the same multiples of the first column
                gradient[..., i] = gradient[..., 0] * (i - 2.5)

    error = relative_error(
        {"layers.0.w": (8, 6), "layers.1.w": (7, 8)},
        lower_rank,
        preconditioner="soap",
        root_method=root_method,
        grafting=grafting,
        start_preconditioning_step=2,
    )
    assert error <= 1e-3


@pytest.mark.parametrize("preconditioner", RULES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("momentum", ["none", "dampened"])
def test_steps_without_a_gradient_and_with_bad_ones(preconditioner, decay, momentum):
    def change(step: int, gradients: dict[str, Tensor | None]) -> None:
        if step in (0, 5, 14):
            gradients["layers.0.w"] = gradients["layers.0.norm.weight"] = None
        if step in (0, START - 1, 12):  # the first step, that of the first roots, a later one
            gradients["layers.0.experts"][1, 3, 2] = torch.nan
            gradients["tok_embeddings.weight"][4, 4] = -torch.inf
        if step in (2, 13):
            gradients["layers.0.conv"][0, 0, 0, 0] = 1e20
            gradients["tok_embeddings.weight"][0, 0] = 1e20

    error = relative_error(
        change=change,
        preconditioner=preconditioner,
        weight_decay_type=decay,
        weight_decay=0.01,
        **MOMENTA[momentum],
    )
    assert error <= 1e-4


@pytest.mark.parametrize("rule", ROOTS)
@pytest.mark.parametrize("grafting", ["adam", "none"])
def test_gradients_that_are_zero_until_after_the_first_refresh(rule, grafting):
    def change(step: int, gradients: dict[str, Tensor | None]) -> None:
        if step < START + 1:
            gradients["layers.0.w"][:6].zero_()  # upper blocks
            gradients["layers.0.experts"].zero_()

    settings = {"grafting": grafting, "refresh_schedule": "together"}
    assert error_of_rule(rule, change=change, **settings) <= 1.0


@st.composite
def members(draw) -> tuple[tuple[int, ...], dict[str, object]]:
    """A shape and settings that are allowed together."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    preconditioner, root_method = draw(st.sampled_from(ROOTS))
    beta2 = draw(st.sampled_from([0.9, 0.95] + [1.0] * (preconditioner != "kl_shampoo")))
    beta1 = draw(st.sampled_from([0.0, 0.9]))
    options = {
        "preconditioner": preconditioner,
        "root_method": root_method,
        "betas": (beta1, beta2),
        "beta3": draw(st.sampled_from([None, beta1, beta1 / 2])),
        "grafting": draw(st.sampled_from(GRAFTING)),
        "grafting_beta2": 0.9,
        "use_bias_correction": draw(st.booleans()),
        "weight_decay_type": draw(st.sampled_from(DECAYS)),
        "large_dim": draw(st.sampled_from(["block", "one_sided", "diagonal"])),
        "merge_dims": draw(st.sampled_from(["matrix", "small"])),
        "max_preconditioner_dim": draw(st.integers(3, 9)),
        "precondition_frequency": draw(st.integers(1, 5)),
        "start_preconditioning_step": draw(st.integers(10, 15)),
        "refresh_schedule": draw(st.sampled_from(SCHEDULES)),
        "symmetric_packing": draw(st.booleans()),
        "precondition_1d": True,
        **MOMENTA[draw(st.sampled_from(list(MOMENTA)))],
    }
    return shape, options


ILL_CONDITIONED = {  # error 1.3e-4 to 1.7e-4: a vector's factor of few gradients, no grafting
    "preconditioner": "shampoo",
    "root_method": "eigh",
    "betas": (0.0, 0.9),
    "beta3": None,
    "grafting": "none",
    "use_bias_correction": False,
    "precondition_frequency": 2,
    "start_preconditioning_step": 10,
    "precondition_1d": True,
    "weight_decay_type": "l2",
    "momentum": 0.8,
}


@given(members())
@example(((8,), ILL_CONDITIONED))
def test_any_member_on_any_shape(member):
    shape, options = member
    shapes = {"layers.0.w": shape}
    allowed = tolerance(options["preconditioner"], options["root_method"])
    error = relative_error(shapes, **options)
    # As a condition costs several runs of the reference, it is asked for where it matters.
    assert error <= allowed or error <= allowed + ROUNDINGS * effect_of_rounding(shapes, **options)
