"""Tests of the kernels against their references: test_kernels.py runs them in Triton's interpreter,
tests/cuda on a GPU.

(Casts to bf16 truncate in the interpreter: hence 2^-7 for what is kept in it.)
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.adamw import adamw

from shampoo_fsdp import Shampoo
from shampoo_fsdp.kernels import language
from shampoo_fsdp.kernels.adamw import adamw_masked
from shampoo_fsdp.kernels.gram import update_factors
from shampoo_fsdp.kernels.momenta import momenta
from shampoo_fsdp.kernels.product import Sum, product, product_reference
from shampoo_fsdp.kernels.refresh import (
    keep,
    keep_reference,
    line,
    line_reference,
    parts,
    two_sums,
    two_sums_reference,
)
from shampoo_fsdp.rules.polynomial import polynomial_root
from shampoo_fsdp.rules.roots import root_residual
from tests.reference.kernels import (
    adamw_masked_reference,
    momenta_reference,
    update_factors_reference,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {FP32: 2e-6, FP16: 2e-3, BF16: 2.0**-7}
SPLIT = 2e-6 if language.interpreted() else 1e-4  # what products of split fp32 are right to


@pytest.fixture(autouse=True)
def _a_kernel_is_launched(monkeypatch):
    """Nothing here is the reference in disguise."""
    launched = []
    jit = language.jit
    monkeypatch.setattr(language, "jit", lambda *a: launched.append(a) or jit(*a))
    torch.manual_seed(0)
    with torch.device("cpu" if language.interpreted() else "cuda"):
        yield
    assert launched


def copies(*tensors):
    return [None if t is None else t.clone() for t in tensors]


def assert_close(found, expected, *others, split=False):
    """As far as the coarsest of their type and others allows."""
    tolerance = max(TOLERANCES[dtype] for dtype in (expected.dtype, *others))
    tolerance = max(tolerance, SPLIT) if split else tolerance
    found, expected = found.float(), expected.float()
    torch.testing.assert_close(found, expected, rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("shape", "state", "copy", "second", "sums"),
    [
        ((4, 60, 83), FP32, BF16, True, False),
        ((3, 7, 5), BF16, FP16, True, False),
        ((2, 64, 64), FP32, FP32, True, True),
        ((2, 33, 40), BF16, BF16, False, False),
    ],
)
def test_momenta(shape, state, copy, second, sums, on_device):
    gradient = torch.randn(shape)
    gradient[1] = torch.nan
    gradient[1, 0] = torch.inf
    usable = torch.ones(len(gradient))
    usable[1] = 0.0
    exp_avg = torch.randn(shape).to(state)
    moment = torch.rand(shape) if second else None
    mixed = torch.empty(shape, dtype=copy)
    rates = [0.1, 0.05, 0.9, 1e-3, 0.7]
    if on_device:
        rates = [torch.tensor([rate]) for rate in rates]
        rates[3] = torch.linspace(1e-3, 1e-2, len(gradient))
    fast = copies(gradient, usable, exp_avg, moment, mixed)
    slow = copies(gradient, usable, exp_avg, moment, mixed)
    norms = momenta(*fast, *rates, sums=sums)
    assert_close(norms, momenta_reference(*slow, *rates, sums=sums), state, copy)
    for found, expected in zip(fast[2:], slow[2:], strict=True):
        if expected is not None:
            assert_close(found, expected, state)
    assert torch.equal(fast[2][1], exp_avg[1])
    assert moment is None or torch.equal(fast[3][1], moment[1])


def test_what_is_preconditioned_may_lie_in_the_gradients_memory():
    gradient, usable = torch.randn(2, 50, 30), torch.tensor([1.0, 0.0])
    exp_avg, moment = torch.zeros(2, 2, 50, 30)
    momenta(gradient, usable, exp_avg, moment, gradient, 0.1, 0.05, 1.0, 1e-8)
    assert torch.equal(gradient, exp_avg)


def pack(matrices):
    rows, columns = torch.triu_indices(*matrices.shape[1:])
    return matrices[:, rows, columns].contiguous()


@pytest.mark.parametrize("kept", [FP32, BF16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "transposed"),
    [
        ((3, 72, 40), BF16, False),
        ((3, 40, 72), FP16, True),
        ((3, 160, 24), FP16, False),
    ],
)
def test_update_factors(shape, dtype, transposed, packed, kept):
    n = shape[1]
    blocks = torch.randn(shape if not transposed else (shape[0], shape[2], n)).to(dtype)
    blocks = blocks.mT if transposed else blocks
    blocks[1] = torch.nan  # rate 0
    factors = torch.randn(3, n, n)
    factors = (factors @ factors.mT / n).to(kept)
    factors = pack(factors) if packed else factors
    # As in the state: with others between those of two blocks.
    between = torch.zeros(3, factors[0].numel() + 16, dtype=kept)
    fast = between[:, : factors[0].numel()].view(factors.shape).copy_(factors)
    slow = factors.clone()
    rate, sums = torch.tensor([0.05, 0.0, 0.5]), n == 40
    update_factors(fast, blocks, rate, 0.7, sums=sums)
    update_factors_reference(slow, blocks, rate, 0.7, sums=sums)
    assert_close(fast, slow, split=True)
    assert torch.equal(fast[1], factors[1])
    if (
        not packed
    ):  # exactly so on a GPU; the interpreter's BLAS rounds (i, j) and (j, i) differently
        torch.testing.assert_close(fast, fast.mT, rtol=1e-5, atol=1e-5)
    assert (between[:, factors[0].numel() :] == 0.0).all()


@pytest.mark.parametrize(("kept", "arrives"), [(FP32, FP32), (BF16, FP32), (FP32, BF16)])
def test_adamw_masked(kept, arrives):
    weights, exp_avg, gradient = torch.randn(3, 3, 1367).unbind()
    exp_avg_sq = torch.rand(3, 1367)
    gradient[1, :3] = torch.tensor([torch.nan, -torch.inf, 1e16])
    numbers = dict(step_size=0.2, lost=0.01, rate1=0.1, rate2=0.05, eps=1e-3, root=0.4)
    skipped = torch.tensor(5)
    tensors = [weights.to(kept), gradient.to(arrives), exp_avg.to(kept), exp_avg_sq.to(kept)]
    fast, slow = copies(*tensors, skipped), copies(*tensors, skipped)
    adamw_masked(*fast, 1e15, **numbers)
    adamw_masked_reference(*slow, 1e15, **numbers)
    assert fast[4] == slow[4] == 8
    for k in (0, 2, 3):
        assert_close(fast[k], slow[k])
        assert torch.equal(fast[k][1, :3], tensors[k][1, :3])


def test_adamw_masked_takes_the_step_of_torch():
    weights, gradient, exp_avg = torch.randn(3, 500).unbind()
    ours = copies(weights, gradient, exp_avg, exp_avg.square())
    theirs = copies(*ours)
    options = dict(lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)
    lists = [[tensor] for tensor in theirs]
    adamw(*lists, [], [torch.tensor(4.0)], amsgrad=False, maximize=False, **options)
    step_size, root = 0.01 / (1.0 - 0.9**5), (1.0 - 0.99**5) ** 0.5
    numbers = dict(step_size=step_size, lost=0.001, rate1=0.1, rate2=0.01, eps=1e-8, root=root)
    adamw_masked(*ours, torch.tensor(0), 1e15, **numbers)
    for found, expected in zip(ours, theirs, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("n", "dtype", "outs", "with_c"),
    [
        (72, FP32, (FP32,), False),
        (72, FP32, (FP32, FP16), True),
        (136, FP16, (FP16, FP16), True),
        (40, BF16, (FP32,), True),
    ],
)
def test_product(n, dtype, outs, with_c, symmetric):
    a, b, c = (torch.randn(3, 2, n, n) * n**-0.5).to(dtype).unbind()
    if symmetric:
        a = b = a + a.mT
    c = c + c.mT if with_c else None
    factors = [(0.5, -1.0, 2.0), (torch.tensor([1.0, 2.0]), torch.tensor([3.0]), -1.0)]
    sums = [Sum(out, *f) for out, f in zip(outs, factors, strict=False)]
    arguments = {"c": c, "symmetric": symmetric, "squares": len(outs) == 1}
    results = product(a, b, *sums, **arguments)
    for found, wanted in zip(results, product_reference(a, b, *sums, **arguments), strict=True):
        found = found.sum(1, keepdim=True) if found.ndim == 2 else found
        assert_close(found, wanted, dtype, split=True)
        if symmetric and found.ndim == 3:
            assert_close(found, found.mT, dtype)


def test_two_sums_onto_what_is_summed():
    square, a = torch.linspace(-1.0, 1.0, 4 * 50 * 50).view(2, 2, 50, 50)
    line = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])
    numbers = 1.5, 0.8, -1.6, 0.4, 0.3
    expected = two_sums_reference(square.clone(), a, *line, numbers)
    for found, wanted in zip(two_sums(square, a, *line, numbers), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divisor", [0.5, torch.tensor([0.5, 1.0, 2.0])])
def test_line(divisor):
    squares, unit, ridge = torch.rand(3, 7), torch.rand(3), torch.rand(3)
    arguments = squares, unit, ridge, divisor, 4
    for found, wanted in zip(line(*arguments), line_reference(*arguments), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kept_in", [FP32, BF16])
def test_keep(kept_in):
    new, kept = torch.randn(2, 3, 70, 70)
    new[1] = torch.nan
    kept, bad = kept.to(kept_in), torch.tensor([False, True, False])
    fast, slow = (copies(kept, torch.ones(3, parts(70), 2)) for _ in range(2))
    keep(new, fast[0], bad, fast[1])
    keep_reference(new, slow[0], bad, slow[1])
    assert_close(fast[0], slow[0])
    assert torch.equal(fast[0][1], kept[1])
    assert_close(fast[1].sum(1), slow[1].sum(1), kept_in)


SPECTRA = {
    "decaying": 10.0 ** torch.linspace(-5, 0, 72),
    "squares": torch.linspace(0.0, 1.0, 72) ** 2,
    "lacks rank": (torch.arange(72) < 18).float(),
    **json.loads((Path(__file__).parents[1] / "rules" / "spectra.json").read_text()),
}


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("case", SPECTRA)
def test_a_root_by_kernels_passes_the_check_of_roots(case, order):
    """As it does with fp32 throughout; the two differ less than either errs."""
    spectrum = torch.as_tensor(SPECTRA[case], dtype=FP32)
    spectrum = spectrum[torch.linspace(0, len(spectrum) - 1, 72).long()]
    bases = torch.linalg.qr(torch.randn(2, 72, 72))[0]
    matrices = (bases * spectrum) @ bases.mT / spectrum.max() * 1e-9
    ridge, divisor = torch.full((2,), 1e-15), torch.tensor([1.0, 0.5])
    root = polynomial_root(matrices, order, ridge, divisor)
    expected = polynomial_root(matrices.double(), order, ridge.double(), divisor.double())
    arguments = (order, ridge, divisor)
    residual = root_residual(matrices, root, *arguments)
    least = root_residual(matrices, expected.float(), *arguments)
    assert (residual < 0.25).all() and (residual < least + 0.02).all()
    difference = torch.linalg.matrix_norm(root - expected) / torch.linalg.matrix_norm(expected)
    assert (difference < 0.12).all()  # 0.042, as with TF32, but 0.1 where rank lacks


PACKED = {"momentum_dtype": "bfloat16", "symmetric_packing": True}


@pytest.mark.parametrize(
    ("rule", "grafting", "settings", "expected"),
    [
        ("kl_shampoo", "adam", {}, {"_momenta", "_update_factors", "_adamw_masked"}),
        ("kl_shampoo", "none", {"start_preconditioning_step": 4}, {"_momenta", "_update_factors"}),
        ("shampoo", "adagrad", {"weight_decay_type": "l2"}, {"_momenta", "_update_factors"}),
        ("kl_shampoo", "sgd", PACKED, {"_momenta", "_update_factors"}),
        ("soap", "adam", {}, {"_update_factors", "_adamw_masked"}),
    ],
)
def test_a_step_with_kernels_is_the_step_without(rule, grafting, settings, expected, monkeypatch):
    used = set()
    jit = language.jit
    monkeypatch.setattr(language, "jit", lambda kernel: used.add(kernel.__name__) or jit(kernel))

    def trained(kernels):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 24))
        options = {"lr": 0.01, "lr_factor": 1, "max_preconditioner_dim": 32}
        options |= {"preconditioner": rule, "root_method": "qr" if rule == "soap" else "eigh"}
        options |= {"grafting": grafting, "matmul_precision": "medium", **settings}
        named = model.named_parameters()
        optimizer = Shampoo(named, kernels=kernels, precondition_frequency=2, **options)
        for step in range(8):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            if step == 5:
                model[1].weight.grad[3, 5] = torch.nan
                model[0].bias.grad[2] = torch.inf
            optimizer.step()
        everything = torch.cat([p.detach().flatten() for p in model.parameters()])
        return everything, optimizer.counters()

    without, counts = trained("off")
    assert not used
    weights, same = trained("auto")
    assert used >= expected
    assert same.equal(counts) and same[2:].tolist() == [1, 1]
    torch.testing.assert_close(weights, without, rtol=0, atol=2e-3)  # of steps of 0.01


def test_blocks_are_left_out_where_the_kernel_of_factors_does_not_run(monkeypatch):
    """Their gradients are as they came, as the momenta's kernel leaves them out by itself."""
    monkeypatch.setattr("shampoo_fsdp.rules.rule.can_update", lambda *_: False)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 32))
    optimizer = Shampoo([("w", weight)], matmul_precision="medium", root_method="eigh")
    for step in range(6):
        weight.grad = torch.randn(32, 32)
        if step == 4:
            weight.grad[0, 0] = torch.nan
        optimizer.step()
    assert weight.isfinite().all() and optimizer.state[weight]["factors"].isfinite().all()
    assert optimizer.counters()[1:3].tolist() == [0, 1]


def test_neighbours_of_a_strided_vector_stay_as_they_are():
    table = torch.randn(8, 8)
    before = table.clone()
    vector = nn.Parameter(table[:, 0])
    vector.grad = torch.ones(()).expand(8)
    dense = nn.Parameter(torch.zeros(3))
    dense.grad = torch.ones(3)
    groups = [{"params": [("vector", vector)]}, {"params": [("dense", dense)]}]
    with pytest.warns(match="none of 2"):
        optimizer = Shampoo(groups, lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert (table[:, 0] < before[:, 0] - 0.09).all()
    assert torch.equal(table[:, 1:], before[:, 1:])
