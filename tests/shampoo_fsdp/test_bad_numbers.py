"""Gradients and state that are no use: nothing non-finite ever enters parameters or state, training
goes on afterwards, and the counters tell what happened."""

import math
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shampoo_fsdp import Shampoo
from tests.models import SMALL, deterministic_gradients, set_gradients, train, with_shampoo
from tests.ranks import ranks

SOAP, KL = {"preconditioner": "soap"}, {"preconditioner": "kl_shampoo"}
IN_BF16 = dict.fromkeys(("factor_dtype", "root_dtype", "momentum_dtype"), "bfloat16")
NESTEROV = {"momentum": 0.5, "nesterov": True}
MEMBERS = {
    "shampoo": {},
    "shampoo, coupled newton, rmsprop": {"root_method": "coupled_newton", "grafting": "rmsprop"},
    "shampoo, polynomial, momentum": {"root_method": "polynomial", "momentum": 0.5},
    "shampoo, qr, packed": {"root_method": "qr", "symmetric_packing": True},
    "shampoo, pseudo-inverse, sgd": {"root_method": "eigh_pseudo_inverse", "grafting": "sgd"},
    "shampoo, no grafting": {"grafting": "none"},
    "shampoo, one-sided": {"large_dim": "one_sided"},
    "shampoo, diagonal, bf16": {"large_dim": "diagonal", **IN_BF16},
    "soap": SOAP,
    "soap, eigh, l2": SOAP | {"root_method": "eigh", "weight_decay_type": "l2"},
    "soap, diagonal": SOAP | {"large_dim": "diagonal"},
    "kl_shampoo": KL,
    "kl_shampoo, polynomial, nesterov": KL | {"root_method": "polynomial", **NESTEROV},
    "kl_shampoo, diagonal": KL | {"large_dim": "diagonal"},
    "kl_shampoo, one-sided, bf16": KL | {"large_dim": "one_sided", **IN_BF16},
}


def local_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: Shampoo
) -> dict[str, list[Tensor]]:
    """All that this rank holds of the parameters and their state, by name."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        entries = {"value": parameter.detach(), **optimizer.state[parameter]}
        for entry, value in entries.items():
            if isinstance(value, DTensor):
                value = value.to_local()
            found[f"{entry} of {name}"] = list(getattr(value, "pieces", {(): value}).values())
    return found


def assert_all_finite(parameters: Mapping[str, nn.Parameter], optimizer: Shampoo) -> None:
    found = local_tensors(parameters, optimizer)
    # One look at all of them, and at each only if it is not as it should be.
    everything = torch.cat([t.float().flatten() for tensors in found.values() for t in tensors])
    if not everything.isfinite().all():
        bad = [n for n, tensors in found.items() if not all(t.isfinite().all() for t in tensors)]
        pytest.fail(f"not finite: {', '.join(bad)}")


# ------------------------------------------------------------------ one bad thing, then recovery


class Regressions:
    """The same least squares problem several times, each with its own matrix of 4 blocks (one if
    large dimensions are not cut) and its own excluded vector, in one optimizer."""

    def __init__(self, names: Iterable[str], **options) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(64, 6, generator=generator)
        self.inputs *= torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.3])
        self.targets = self.inputs @ torch.randn(6, 8, generator=generator) + 1.0
        self.matrices = {name: nn.Parameter(torch.zeros(6, 8)) for name in names}
        self.vectors = {name: nn.Parameter(torch.zeros(8)) for name in names}
        self.parameters = {
            **{f"{name}: matrix": p for name, p in self.matrices.items()},
            **{f"{name}: vector": p for name, p in self.vectors.items()},
        }
        whole = "large_dim" in options
        group = {"lr": 0.02, "lr_factor": 1.0, "betas": (0.8, 0.8), "weight_decay": 0.0}
        settings = {"precondition_frequency": 3, "preconditioner": "shampoo", **options}
        settings["max_preconditioner_dim"] = 6 if whole else 4
        self.optimizer = Shampoo(self.parameters.items(), **group, **settings)
        self.blocks = 1 if whole else 4

    def losses(self) -> dict[str, Tensor]:
        weights = torch.stack(list(self.matrices.values()))
        shifts = torch.stack(list(self.vectors.values()))
        errors = self.inputs @ weights + shifts.unsqueeze(1) - self.targets
        return dict(zip(self.matrices, errors.square().mean((1, 2)), strict=True))

    def step(self, spoil: Mapping[str, Callable[[Tensor], object]] | None = None) -> None:
        """One step with the true gradients, or what is left of those of the matrices."""
        self.optimizer.zero_grad()
        sum(self.losses().values()).backward()
        for name, change in (spoil or {}).items():
            change(self.matrices[name].grad)
        self.optimizer.step()
        if spoil:
            assert_all_finite(self.parameters, self.optimizer)

    def train(self, steps: int) -> dict[str, float]:
        """Losses after these steps."""
        for _ in range(steps):
            self.step()
        # What is not finite once remains so.
        assert_all_finite(self.parameters, self.optimizer)
        return {name: loss.item() for name, loss in self.losses().items()}


# Without grafting a step of Shampoo has no bound, since its roots may be those of older gradients,
# nor one of KL-Shampoo, if its factors are wrong. What a large step has spoiled, later steps of
# usual size do not mend for long.
BOUNDED = [member for member in MEMBERS if member != "shampoo, no grafting"]


def check_recovery(problems: Regressions, steps: int) -> None:
    before = {name: loss.item() for name, loss in problems.losses().items()}
    after = problems.train(steps)
    stuck = {n: (before[n], loss) for n, loss in after.items() if not loss < 0.5 * before[n]}
    assert not stuck


SPOIL: dict[str, Callable[[Tensor], object]] = {
    "NaN in one block": lambda g: g[:2, :2].fill_(math.nan),
    "infinity in one block": lambda g: g[0, :4].fill_(-math.inf),
    "NaN everywhere": lambda g: g.fill_(math.nan),
    "zero": lambda g: g.zero_(),
    "a block of zeros": lambda g: g[:3, :4].zero_(),
    "rank 1": lambda g: g.copy_(torch.outer(g[:, 0], g[0])),
    "1e-30": lambda g: g.mul_(1e-30),
    "one tiny row": lambda g: g.zero_()[0].fill_(1e-20),
    "denormal": lambda g: g.fill_(1e-45),
    # It stays in second moments as its square times beta2^t; until it has gone updates are small.
    "a spike": lambda g: g.mul_(1e6 / g.norm()),
    "1e+30": lambda g: g.mul_(1e30),
    "the largest number": lambda g: g.fill_(torch.finfo(torch.float32).max),
    "a wide range": lambda g: g.mul_(torch.logspace(-30, 0, 8)),
}


@pytest.mark.parametrize("member", BOUNDED)
def test_training_goes_on_after_bad_gradients(member):
    early = {f"early {name}": change for name, change in SPOIL.items()}
    problems = Regressions([*early, *SPOIL], **MEMBERS[member])
    for _ in range(5):  # before there are roots, and at the first of them
        problems.step(early)
    problems.train(12)
    for _ in range(4):
        problems.step(early | SPOIL)
    # Neither spikes nor zeros are left out.
    assert problems.optimizer.counters()[2] == 13 * (2 + 3 * problems.blocks)
    check_recovery(problems, 190)


SPOIL_FACTOR: dict[str, Callable[[Tensor], object]] = {
    "negative": lambda factor: factor.neg_(),
    "indefinite": lambda factor: factor.mul_(torch.linspace(-3, 1, len(factor)).sign()),
    "zero": lambda factor: factor.zero_(),
    "huge": lambda factor: factor.fill_(1e15),
    "rank 1": lambda factor: factor.fill_(factor.abs().mean()),
    "noise": lambda factor: factor.copy_(torch.randn(len(factor))),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_training_goes_on_after_spoiled_factors(member):
    torch.manual_seed(0)
    problems = Regressions(SPOIL_FACTOR, **MEMBERS[member])
    problems.train(12)
    state = problems.optimizer.state_dict()
    for change, entries in zip(SPOIL_FACTOR.values(), state["state"].values(), strict=False):
        change(entries["factors"])
    problems.optimizer.load_state_dict(state)
    problems.step()
    if member in BOUNDED:
        check_recovery(problems, 140)
    else:
        problems.train(20)  # all stays finite


@pytest.mark.parametrize("member", MEMBERS)
def test_non_finite_blocks_keep_their_state_and_are_counted(member):
    problems = Regressions(["one block", "all blocks"], **MEMBERS[member])
    problems.train(6)
    assert problems.optimizer.counters()[2] == 0
    before = {name: p.detach().clone() for name, p in problems.matrices.items()}
    saved = problems.optimizer.state_dict()["state"]
    problems.step(
        {
            "one block": lambda g: g[:3, :4].fill_(math.nan),
            "all blocks": lambda g: g[::3, ::4].fill_(math.inf),
        }
    )
    assert torch.equal(problems.matrices["all blocks"], before["all blocks"])
    change = problems.matrices["one block"] != before["one block"]
    assert not change[:3, :4].any()
    if problems.blocks > 1:
        assert change[3:, :].all() and change[:, 4:].all()
    now = problems.optimizer.state_dict()["state"][1]
    assert {"exp_avg", "factors"} <= now.keys()
    for name, value in now.items():
        # Roots and bases are still refreshed, from the factors as they are.
        if name.startswith(("exp_avg", "factors", "diagonals", "momentum_buffer")):
            assert torch.equal(value, saved[1][name]), name
    assert problems.optimizer.counters()[2] == 1 + problems.blocks


# --------------------------------------------------- parameters that are not preconditioned

ELEMENTWISE = {
    "adam": {},
    "adam, l2": {"weight_decay_type": "l2"},
    "adam, momentum": {"momentum": 0.9, "nesterov": True},
    "adam, without bias correction": {"use_bias_correction": False},
    "rmsprop, independent decay": {"grafting": "rmsprop", "weight_decay_type": "independent"},
    "adagrad": {"grafting": "adagrad"},
    "sgd": {"grafting": "sgd"},
    "sgd, momentum": {"grafting": "sgd", "momentum": 0.9, "dampening": 0.1},
}
LEFT_ALONE = {"embedding": (7, 5), "norm": (5,), "scale": (), "transposed": (4, 6), "empty": (0, 3)}
BAD = {"embedding": (3, 2), "norm": (4,), "transposed": (1, 5)}


def left_alone(
    dtype: torch.dtype, bad: Mapping[str, tuple[int, ...]], **options: object
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Parameters of which none is preconditioned, with their state, before and after a step whose
    gradients are NaN in places, and the counters."""
    generator = torch.Generator().manual_seed(0)

    def gradients() -> dict[str, Tensor]:
        new = {n: torch.randn(s, generator=generator) for n, s in LEFT_ALONE.items()}
        new["transposed"] = new["transposed"].t().contiguous().t()
        return {name: gradient.to(dtype) for name, gradient in new.items()}

    parameters = {name: nn.Parameter(g) for name, g in gradients().items()}
    group = {"lr": 0.1, "lr_factor": 1, "weight_decay": 0.3}
    optimizer = Shampoo(parameters.items(), exclude=["."], **group, **options)
    found: list[dict[str, Tensor]] = []
    for step in range(4):
        for name, gradient in gradients().items():
            parameters[name].grad = gradient
            if step == 3 and name in bad:
                gradient[bad[name]] = math.nan
        optimizer.step()
        tensors = local_tensors(parameters, optimizer).items()
        found.append({name: tensor.clone() for name, (tensor,) in tensors})
    return *found[2:], optimizer.counters().tolist()


@pytest.fixture(params=[None, 4], ids=["whole", "in chunks"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("shampoo_fsdp.runtime.excluded._CHUNK_ELEMENTS_ON_CPU", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_a_bad_entry_stays_and_the_others_take_their_step(method, dtype, chunks):
    before, found, counters = left_alone(dtype, BAD, **ELEMENTWISE[method])
    _, expected, _ = left_alone(dtype, {}, **ELEMENTWISE[method])
    for name in expected:
        entry, parameter = name.split(" of ")
        if entry != "step" and parameter in BAD:
            place = BAD[parameter]
            assert not torch.equal(expected[name][place], before[name][place])
            expected[name][place] = before[name][place]
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert counters == [0, 0, 0, 3]


def test_an_infinite_weight_stays_what_it_is_and_so_do_entries_of_others():
    weight = nn.Parameter(torch.tensor([-math.inf, 1.0]))
    optimizer = Shampoo([("bias", weight)])
    optimizer.state[weight]["note"] = "of somebody else"
    for last in (0.0, math.nan):
        weight.grad = torch.tensor([last, 1.0])
        optimizer.step()
        assert weight[0] == -math.inf and weight[1] < 1.0
    assert optimizer.state[weight]["note"] == "of somebody else"


# ------------------------------------------------------------------------- one rank of several


def distributed(**options) -> tuple[nn.Module, Shampoo]:
    few = {"lr": 1e-2, "max_preconditioner_dim": 8, "precondition_frequency": 2}
    built, optimizer = with_shampoo("fsdp", SMALL, **few, **options)
    train(built, optimizer, range(3))
    return built.model, optimizer


def spoil_on_rank_1(model: nn.Module, name: str) -> None:
    set_gradients(model, deterministic_gradients(model, 3))
    if dist.get_rank() == 1:
        gradient = dict(model.named_parameters())[name].grad
        gradient.to_local()[0] = math.nan


@ranks(2)
def test_a_bad_gradient_on_one_rank_is_an_error_on_all_and_changes_nothing():
    matrix, excluded = "layers.0.attention.wq.weight", "tok_embeddings.weight"
    for preconditioner, name in (("shampoo", matrix), ("soap", excluded), ("kl_shampoo", matrix)):
        model, optimizer = distributed(preconditioner=preconditioner, on_nonfinite="raise")
        named = dict(model.named_parameters())
        before = {
            entry: [tensor.clone() for tensor in tensors]
            for entry, tensors in local_tensors(named, optimizer).items()
        }
        counters = optimizer.counters()
        spoil_on_rank_1(model, name)
        with pytest.raises(ValueError, match=r"is not finite.*nothing has been") as error:
            optimizer.step()
        assert f"'{name}'" in str(error.value)
        messages = [None, None]
        dist.all_gather_object(messages, str(error.value))
        assert messages[0] == messages[1]
        for entry, tensors in local_tensors(named, optimizer).items():
            assert all(map(torch.equal, tensors, before[entry])), entry
        assert torch.equal(optimizer.counters(), counters)

        set_gradients(model, deterministic_gradients(model, 3))
        optimizer.step()  # and it can go on
        for entry, tensors in local_tensors(named, optimizer).items():
            if entry.startswith(("value", "exp_avg", "step")):
                assert not any(map(torch.equal, tensors, before[entry])), entry
