"""Shampoo in one process: against the fp64 reference, and as a torch.optim.Optimizer."""

import copy
import io
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shampoo_fsdp import Shampoo
from shampoo_fsdp.plan.assignment import refresh_phase
from shampoo_fsdp.plan.grid import make_grid
from tests.models import TinyLlama, deterministic_gradients, set_gradients
from tests.reference import ReferenceShampoo

STEPS = 20


def parameters_like(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def reference_for(
    optimizer: Shampoo, shapes: Mapping[str, tuple[int, ...]], excluded: set[str]
) -> ReferenceShampoo:
    group, config = optimizer.param_groups[0], optimizer.config

    def phase(name: str, coordinates: tuple[int, ...]) -> int:
        grid = make_grid(shapes[name], config)
        index = list(grid.coordinates()).index(tuple(coordinates))
        return refresh_phase(name, index, len(grid), config.precondition_frequency)

    return ReferenceShampoo(
        shapes,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        max_preconditioner_dim=config.max_preconditioner_dim,
        precondition_frequency=config.precondition_frequency,
        start_preconditioning_step=config.start_preconditioning_step,
        refresh_warmup_steps=config.refresh_warmup_steps,
        refresh_schedule=config.refresh_schedule,
        preconditioner=config.preconditioner,
        grafting_beta2=config.grafting_beta2,
        preconditioner_eps=config.preconditioner_eps,
        excluded=excluded,
        phase=phase,
        merge_dims=config.merge_dims,
        precondition_1d=config.precondition_1d,
        max_factor_ratio=config.max_factor_ratio,
        base_width=config.base_width,
    )


def largest_error(
    shapes: Mapping[str, tuple[int, ...]],
    excluded: set[str] = frozenset(),
    change=lambda step, gradients: None,
    **options,
) -> float:
    """Relative error of the parameters against the reference after some steps.

    `change` may alter the gradients of a step.
    """
    parameters = parameters_like(shapes)
    exact = {name: p.detach().double() for name, p in parameters.items()}
    optimizer = Shampoo(parameters.items(), lr=1e-2, **options)
    reference = reference_for(optimizer, shapes, excluded)
    for step in range(STEPS):
        gradients: dict[str, Tensor | None] = dict(deterministic_gradients(shapes, step))
        change(step, gradients)
        set_gradients(parameters, gradients)
        optimizer.step()
        reference.step(exact, {n: None if g is None else g.double() for n, g in gradients.items()})
    return max(
        ((p.detach() - exact[n]).norm() / exact[n].norm()).item() for n, p in parameters.items()
    )


LLAMA_LIKE = {
    "tok_embeddings.weight": (40, 24),
    "layers.0.attention.wq.weight": (24, 24),
    "layers.1.attention.wq.weight": (24, 24),
    "layers.0.feed_forward.w1.weight": (53, 24),
    "layers.0.attention_norm.weight": (24,),
}
LEFT_OUT = {"tok_embeddings.weight", "layers.0.attention_norm.weight"}


@pytest.mark.parametrize("schedule", ["together", "staggered"])
@pytest.mark.parametrize("frequency", [1, 4])
def test_the_update_is_that_of_the_reference(schedule, frequency):
    error = largest_error(
        LLAMA_LIKE,
        LEFT_OUT,
        max_preconditioner_dim=10,
        precondition_frequency=frequency,
        start_preconditioning_step=4,
        refresh_schedule=schedule,
    )
    assert error <= 1e-4


# The factors of few gradients lack rank, and the inverse root of what is lacking is decided by
# rounding unless the ridge is above it.
RIDGE = 1e-7


@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    cap=st.integers(3, 12),
    merge_dims=st.sampled_from(["matrix", "small"]),
    beta2=st.sampled_from([0.9, 0.99, 1.0]),
    start=st.integers(1, 5),
    frequency=st.integers(1, 4),
)
def test_tensors_of_order_1_to_4_with_uneven_tiles(shape, cap, merge_dims, beta2, start, frequency):
    error = largest_error(
        {"layers.0.w": shape},
        max_preconditioner_dim=cap,
        merge_dims=merge_dims,
        precondition_1d=True,
        betas=(0.9, beta2),
        grafting_beta2=0.95,
        start_preconditioning_step=start,
        precondition_frequency=frequency,
        preconditioner="shampoo",
        preconditioner_eps=RIDGE,
    )
    assert error <= 1e-4


def test_a_convolution_is_a_matrix():
    assert largest_error({"conv": (6, 4, 3, 3)}, max_preconditioner_dim=20) <= 1e-4


def test_steps_without_a_gradient_and_with_a_bad_one():
    def change(step: int, gradients: dict[str, Tensor | None]) -> None:
        if step in (0, 7, 8):
            gradients["layers.1.attention.wq.weight"] = None
        if step == 9:
            gradients["layers.0.feed_forward.w1.weight"][3, 5] = torch.nan
        if step == 11:
            gradients["layers.0.attention.wq.weight"][0, 0] = torch.inf
            gradients["tok_embeddings.weight"][4, 4] = torch.nan

    error = largest_error(
        LLAMA_LIKE, LEFT_OUT, change, max_preconditioner_dim=10, precondition_frequency=4
    )
    assert error <= 1e-4


def test_excluded_parameters_take_exactly_the_steps_of_adamw():
    options = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    ours, theirs = parameters_like(LLAMA_LIKE), parameters_like(LLAMA_LIKE)
    optimizer = Shampoo(ours.items(), exclude=["."], **options)
    adamw = torch.optim.AdamW(theirs.values(), fused=True, **options)
    for step in range(10):
        for parameters in (ours, theirs):
            set_gradients(parameters, deterministic_gradients(LLAMA_LIKE, step))
        optimizer.step()
        adamw.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in LLAMA_LIKE)


def test_before_the_start_all_parameters_take_the_steps_of_adamw():
    ours, theirs = parameters_like(LLAMA_LIKE), parameters_like(LLAMA_LIKE)
    optimizer = Shampoo(ours.items(), start_preconditioning_step=11, weight_decay=0.1, beta3=0.9)
    adamw = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(10):
        for parameters in (ours, theirs):
            set_gradients(parameters, deterministic_gradients(LLAMA_LIKE, step))
        optimizer.step()
        adamw.step()
    for name in LLAMA_LIKE:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_no_bad_number_enters_parameters_or_state():
    parameters = parameters_like(LLAMA_LIKE)
    optimizer = Shampoo(parameters.items(), max_preconditioner_dim=10, precondition_frequency=2)
    for step in range(12):
        gradients = deterministic_gradients(LLAMA_LIKE, step)
        if step % 2:
            value = (torch.nan, torch.inf, 1e30, -torch.inf, 0.0, 1e-30)[step // 2]
            for gradient in gradients.values():
                gradient.flatten()[:7] = value
        set_gradients(parameters, gradients)
        optimizer.step()
        assert all(p.isfinite().all() for p in parameters.values())
    for entries in optimizer.state_dict()["state"].values():
        assert all(value.isfinite().all() for value in entries.values())
    refreshes, failed, skipped, entries = optimizer.counters().tolist()
    assert refreshes > 0 and failed == 0
    assert skipped == 4 * 3  # 4 bad steps; the first rows' values touch one block of each matrix


def test_loss_falls_on_a_real_problem_faster_than_with_adamw():
    def final_loss(make):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32, bias=False), nn.Tanh(), nn.Linear(32, 10))
        inputs, targets = torch.randn(256, 20), torch.randn(256, 20) @ torch.randn(20, 10)
        optimizer = make(model)
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    shampoo = final_loss(lambda m: Shampoo(m.named_parameters(), lr=1e-2, precondition_frequency=2))
    adamw = final_loss(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2))
    assert shampoo < adamw


class TestAsATorchOptimizer:
    def model(self) -> TinyLlama:
        return TinyLlama(dim=12, hidden=20, vocab=16, n_layers=1)

    def step(self, model: nn.Module, optimizer: Shampoo, steps: range) -> None:
        for step in steps:
            set_gradients(model, deterministic_gradients(model, step))
            optimizer.step()

    def test_groups_have_their_own_lr_and_weight_decay(self):
        model = self.model()
        named = dict(model.named_parameters())
        frozen_name = "layers.0.attention.wq.weight"
        before = named[frozen_name].detach().clone()
        optimizer = Shampoo(
            [
                {"params": [(n, p) for n, p in named.items() if n != frozen_name]},
                {"params": [(frozen_name, named[frozen_name])], "lr": 0.0, "weight_decay": 5.0},
            ],
            lr=1e-2,
        )
        others = {n: p.detach().clone() for n, p in named.items() if n != frozen_name}
        self.step(model, optimizer, range(3))
        assert torch.equal(named[frozen_name], before)
        assert all(not torch.equal(named[n], value) for n, value in others.items())

    def test_a_scheduler_sets_the_step_size(self):
        model = self.model()
        optimizer = Shampoo(model.named_parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
        for step in range(4):
            before = model.output.weight.detach().clone()
            self.step(model, optimizer, range(step, step + 1))
            assert torch.equal(model.output.weight, before) == (step >= 2)
            scheduler.step()

    def test_a_closure_is_evaluated_with_gradients(self):
        weight = nn.Parameter(torch.randn(4, 4))
        optimizer = Shampoo([("w", weight)], lr=1e-2)

        def closure():
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        first = optimizer.step(closure)
        assert optimizer.step(closure) < first

    def test_hooks_run(self):
        model, seen = self.model(), []
        optimizer = Shampoo(model.named_parameters())
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        self.step(model, optimizer, range(1))
        assert seen == ["before", "after"]

    def test_a_saved_state_continues_bit_for_bit(self):
        model = self.model()
        options = {"lr": 1e-2, "max_preconditioner_dim": 8, "precondition_frequency": 3}
        optimizer = Shampoo(model.named_parameters(), **options)
        self.step(model, optimizer, range(7))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        self.step(model, optimizer, range(7, 14))

        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = self.model()
        resumed.load_state_dict(saved["model"])
        again = Shampoo(resumed.named_parameters(), **options)
        again.load_state_dict(saved["optimizer"])
        self.step(resumed, again, range(7, 14))
        for name, value in model.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name

    def test_fp32_state_of_bf16_parameters_stays_exact(self):
        model = self.model().to(torch.bfloat16)
        optimizer = Shampoo(model.named_parameters(), precondition_frequency=2)
        self.step(model, optimizer, range(5))
        again = Shampoo(self.model().to(torch.bfloat16).named_parameters())
        again.load_state_dict(optimizer.state_dict())
        for old, new in zip(
            optimizer.state_dict()["state"].values(),
            again.state_dict()["state"].values(),
            strict=True,
        ):
            for entry, value in old.items():
                assert new[entry].dtype == value.dtype
                assert torch.equal(new[entry], value)
            if "factors" in old:
                assert {v.dtype for v in old.values()} == {torch.float32}

    def test_state_and_update_do_not_depend_on_the_default_type_or_autocast(self):
        def weights_after_steps() -> dict[str, Tensor]:
            model = self.model()
            optimizer = Shampoo(
                model.named_parameters(), lr=1e-2, precondition_frequency=2, exclude=["norm"]
            )
            self.step(model, optimizer, range(6))
            return {n: p.detach().float() for n, p in model.named_parameters()}

        expected = weights_after_steps()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = weights_after_steps()
        assert all(torch.equal(found[n], value) for n, value in expected.items())
        parameter = nn.Parameter(torch.randn(6, 6))
        torch.set_default_dtype(torch.bfloat16)
        try:
            optimizer = Shampoo([("w", parameter)], precondition_frequency=2)
            for _ in range(4):
                parameter.grad = torch.randn(6, 6, dtype=torch.float32)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        entries = optimizer.state_dict()["state"][0].values()
        assert {value.dtype for value in entries} == {torch.float32}
        assert parameter.isfinite().all()

    def test_gradients_stay_as_they_are(self):
        model = self.model()
        optimizer = Shampoo(model.named_parameters())
        gradients = deterministic_gradients(model, 0)
        gradients["tok_embeddings.weight"][0, 0] = torch.nan
        gradients["layers.0.attention.wq.weight"][0, 0] = torch.inf
        set_gradients(model, gradients)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=0, equal_nan=True)

    def test_a_transposed_parameter_takes_the_steps_of_a_dense_one(self):
        start, gradient = torch.randn(4, 6), torch.randn(4, 6)
        dense = nn.Parameter(start.clone())
        transposed = nn.Parameter(start.t().contiguous().t())
        for exclude in (["."], []):
            for weight in (dense, transposed):
                weight.grad = gradient.clone()
                Shampoo([("w", weight)], exclude=exclude).step()
            torch.testing.assert_close(transposed, dense)

    def test_a_smaller_start_at_resume_takes_roots_at_once(self):
        model = self.model()
        late = Shampoo(model.named_parameters(), start_preconditioning_step=1000)
        self.step(model, late, range(5))
        sooner = Shampoo(
            model.named_parameters(), precondition_frequency=100, start_preconditioning_step=3
        )
        sooner.load_state_dict(late.state_dict())
        self.step(model, sooner, range(5, 6))
        blocks = 7  # of one layer, with two factors each
        assert sooner.counters().tolist() == [2 * blocks, 0, 0, 0]

    def test_a_later_start_at_resume_keeps_the_roots_there_are(self):
        rare = {"precondition_frequency": 100}
        model, other = self.model(), self.model()
        optimizer = Shampoo(model.named_parameters(), start_preconditioning_step=2, **rare)
        self.step(model, optimizer, range(5))
        other.load_state_dict(model.state_dict())
        later = Shampoo(other.named_parameters(), start_preconditioning_step=50, **rare)
        later.load_state_dict(optimizer.state_dict())
        self.step(model, optimizer, range(5, 7))
        self.step(other, later, range(5, 7))
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name

    def test_a_failed_first_root_leaves_plain_momentum_of_the_grafted_size(self, monkeypatch):
        def fail(matrices: Tensor, *_: object) -> tuple[Tensor, Tensor]:
            return torch.full_like(matrices, torch.nan), torch.ones(len(matrices)).bool()

        monkeypatch.setattr("shampoo_fsdp.rules.root_rule.inverse_root", fail)
        weight = nn.Parameter(torch.zeros(4, 4))
        optimizer = Shampoo(
            [("w", weight)],
            lr=1.0,
            betas=(0.0, 0.9),
            start_preconditioning_step=1,
            weight_decay=0.0,
        )
        weight.grad = torch.arange(16.0).view(4, 4) + 1
        optimizer.step()
        assert optimizer.counters().tolist() == [2, 2, 0, 0]
        # Adam's first step has entries of size 1.
        expected = -4.0 * weight.grad / weight.grad.norm()
        torch.testing.assert_close(weight.detach(), expected)

    def test_a_scheduler_that_keeps_its_settings_in_groups_resumes(self):
        model = self.model()
        optimizer = Shampoo(model.named_parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        self.step(model, optimizer, range(1))
        scheduler.step()
        again = Shampoo(model.named_parameters())
        again.load_state_dict(optimizer.state_dict())
        resumed = torch.optim.lr_scheduler.OneCycleLR(again, 0.1, total_steps=10, last_epoch=1)
        scheduler.step()
        assert resumed.get_last_lr() == scheduler.get_last_lr()

    @pytest.mark.parametrize("dim", [8, 64])  # several blocks, and one, per parameter
    def test_a_state_dict_refers_to_the_state(self, dim):
        model = self.model()
        optimizer = Shampoo(model.named_parameters(), max_preconditioner_dim=dim)
        self.step(model, optimizer, range(1))
        saved = optimizer.state_dict()["state"]
        own = list(optimizer.state.values())
        for i, entries in saved.items():
            assert all(value is own[i][name] for name, value in entries.items())

    @pytest.mark.parametrize("dim", [8, 64])
    def test_state_answers_as_tensors_do(self, dim):
        model = self.model()
        optimizer = Shampoo(model.named_parameters(), max_preconditioner_dim=dim)
        self.step(model, optimizer, range(1))
        weight = model.layers["0"].attention.wq.weight
        momentum = optimizer.state[weight]["exp_avg"]
        expected = weight.grad * 0.1
        torch.testing.assert_close(momentum.clone() + 0.0, expected)
        torch.testing.assert_close(momentum.norm(), expected.norm())
        torch.testing.assert_close(momentum.to(torch.float64) + 0.0, expected.double())
        torch.testing.assert_close(torch.tensor(momentum.tolist()), expected)
        momentum.mul_(2.0)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"] + 0.0, 2.0 * expected)
        momentum[0] = 0.0
        assert not optimizer.state_dict()["state"][1]["exp_avg"][0].any()
        momentum.zero_()
        assert not momentum.any()

    def test_a_copy_of_a_state_dict_is_a_snapshot(self):
        model = self.model()
        optimizer = Shampoo(model.named_parameters(), max_preconditioner_dim=8)
        self.step(model, optimizer, range(1))
        snapshot = copy.deepcopy(optimizer.state_dict())
        before = {n: v + 0.0 for n, v in snapshot["state"][1].items()}
        self.step(model, optimizer, range(1, 3))
        assert all(torch.equal(v + 0.0, before[n]) for n, v in snapshot["state"][1].items())
        optimizer.load_state_dict(snapshot)
        state = optimizer.state[model.layers["0"].attention.wq.weight]
        assert all(torch.equal(v + 0.0, before[n]) for n, v in state.items())

    def test_a_state_dict_hook_sees_what_the_caller_gets(self):
        optimizer = Shampoo(self.model().named_parameters(), max_preconditioner_dim=8)
        seen = []
        optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state))
        result = optimizer.state_dict()
        assert seen[0] is result
        assert all(
            seen[0]["state"][i][name] is value
            for i, entries in result["state"].items()
            for name, value in entries.items()
        )

    def test_what_others_put_into_the_state_is_carried_through(self):
        model = self.model()
        optimizer = Shampoo(model.named_parameters())
        weight = model.layers["0"].attention.wq.weight
        optimizer.state[weight] |= {"ema": torch.ones(3), "seen": 5, "tags": {"a": [1]}}
        optimizer.state["mine"] = 7
        saved = copy.deepcopy(optimizer.state_dict())
        again = Shampoo(model.named_parameters())
        again.load_state_dict(saved)
        state = again.state[weight]
        assert torch.equal(state["ema"], torch.ones(3)) and state["seen"] == 5
        assert again.state["mine"] == 7
        assert state["tags"] == {"a": [1]} and state["tags"] is not saved["state"][1]["tags"]
        again.load_state_dict(Shampoo(model.named_parameters()).state_dict())
        assert "ema" not in again.state[weight]
        self.step(model, again, range(1))

    def test_loading_hooks_see_the_state(self):
        model, seen = self.model(), []
        optimizer = Shampoo(model.named_parameters())
        optimizer.register_load_state_dict_pre_hook(lambda _, sd: seen.append(len(sd["state"])))
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == [len(list(model.parameters()))] * 2

    def test_what_does_not_fit_changes_nothing(self):
        model = self.model()
        optimizer = Shampoo(model.named_parameters(), lr=1e-3)
        self.step(model, optimizer, range(2))
        saved = optimizer.state_dict()
        other = Shampoo(model.named_parameters(), lr=5e-3)
        saved["state"][len(saved["state"]) - 1]["exp_avg"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"'exp_avg' of parameter 'output\.weight'.*\(3,\)"):
            other.load_state_dict(saved)
        assert other.param_groups[0]["lr"] == 5e-3
        assert not other.state_dict()["state"][0]["exp_avg"].any()

    def test_it_refuses_to_be_copied(self):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copy.deepcopy(Shampoo(self.model().named_parameters()))

    def test_another_block_size_is_refused_by_name(self):
        model = self.model()
        state = Shampoo(model.named_parameters(), max_preconditioner_dim=8).state_dict()
        other = Shampoo(model.named_parameters(), max_preconditioner_dim=6)
        with pytest.raises(ValueError, match=r"'max_preconditioner_dim' is 8 in .*, but 6 here"):
            other.load_state_dict(state)

    def test_another_preconditioner_is_refused_by_name(self):
        model = self.model()
        state = Shampoo(model.named_parameters()).state_dict()
        other = Shampoo(model.named_parameters(), preconditioner="shampoo")
        with pytest.raises(ValueError, match=r"'preconditioner' is 'kl_shampoo' in .* 'shampoo'"):
            other.load_state_dict(state)

    def test_another_exclude_list_is_refused_by_parameter(self):
        model = self.model()
        state = Shampoo(model.named_parameters(), exclude=["wq"]).state_dict()
        with pytest.raises(ValueError, match=r"'layers\.0\.attention\.wq\.weight'.*exclude"):
            Shampoo(model.named_parameters(), exclude=[]).load_state_dict(state)

    def test_a_group_can_be_added_until_there_is_something_to_lose(self):
        a, b, c = (nn.Parameter(torch.eye(2)) for _ in range(3))
        optimizer = Shampoo([("a", a)], weight_decay=0.0)
        assert set(optimizer.state) == {a}
        optimizer.add_param_group({"params": [("b", b)], "lr": 1e-2})
        for parameter in (a, b):
            parameter.grad = torch.ones(2, 2)
        optimizer.step()
        assert set(optimizer.state) == {a, b} and not torch.equal(b, torch.eye(2))
        with pytest.raises(RuntimeError, match=r"after a step.*Build another one"):
            optimizer.add_param_group({"params": [("c", c)]})
        assert len(optimizer.param_groups) == 2


class TestBadParameters:
    def test_complex(self):
        with pytest.raises(ValueError, match=r"'w' is of type torch\.complex64"):
            Shampoo([("w", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))])

    def test_meta(self):
        optimizer = Shampoo([("w", nn.Parameter(torch.zeros(2, 2, device="meta")))])
        with pytest.raises(ValueError, match="'w' is on the meta device; materialise"):
            optimizer.step()

    def test_two_names(self):
        one, other = (("w", nn.Parameter(torch.zeros(2, 2))) for _ in range(2))
        with pytest.raises(ValueError, match="two parameters are named 'w'"):
            Shampoo([one, other])

    def test_one_parameter_under_two_names(self):
        weight = nn.Parameter(torch.zeros(2, 2))
        with pytest.raises(ValueError, match="'a' and 'b' are the same"):
            Shampoo([("a", weight), ("b", weight)])

    @pytest.mark.parametrize("from_step", [0, 1])
    @pytest.mark.parametrize("settings", [{}, {"weight_decay_type": "l2"}, {"exclude": ["conv"]}])
    def test_channels_last_is_as_good_as_another(self, from_step, settings):
        found = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            generator = torch.Generator().manual_seed(0)
            weight = nn.Parameter(torch.randn(8, 6, 3, 3, generator=generator))
            optimizer = Shampoo([("conv", weight)], lr=0.1, **settings)
            for step in range(3):
                if step == from_step:
                    weight.data = weight.data.to(memory_format=memory_format)
                weight.grad = torch.randn(8, 6, 3, 3, generator=generator)
                optimizer.step()
            assert weight.is_contiguous(memory_format=memory_format)
            found.append(weight.detach())
        assert torch.equal(*found)

    def test_unfrozen_before_the_first_step(self):
        weight, other = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
        weight.requires_grad_(False)
        optimizer = Shampoo([("w", weight), ("v", other)])
        weight.requires_grad_(True)
        weight.grad = other.grad = torch.ones(2, 2)
        optimizer.step()
        assert weight.any() and torch.equal(weight, other)

    def test_unfrozen_later(self):
        weight, other = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
        weight.requires_grad_(False)
        optimizer = Shampoo([("w", weight), ("v", other)])
        weight.grad = other.grad = torch.ones(2, 2)
        with pytest.raises(ValueError, match="'w' has a gradient but did not require one"):
            optimizer.step()

    def test_no_gradient_at_all(self):
        weight = nn.Parameter(torch.zeros(2, 2))
        optimizer = Shampoo([("w", weight)])
        with pytest.raises(RuntimeError, match=r"built before fully_shard\(\)"):
            optimizer.step()
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        weight.grad = None
        optimizer.step()  # later it may be meant

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ([], "empty parameter list"),
            ({nn.Parameter(torch.zeros(2))}, "ordered collections"),
            ([{"lr": 1.0}], "the key 'params'"),
            ([(nn.Parameter(torch.zeros(2)), "w")], "can only optimize Tensors"),
            ([{"params": [], "max_preconditioner_dim": 2}], "give it to Shampoo"),
        ],
    )
    def test_what_are_no_parameters(self, params, message):
        with pytest.raises((TypeError, ValueError), match=message):
            Shampoo(params)

    def test_replicas_that_are_none(self):
        with pytest.raises(TypeError, match=r"replicas is 2; allowed: a process group"):
            Shampoo([nn.Parameter(torch.zeros(2, 2))], replicas=2)

    def test_sparse_gradients_change_nothing(self):
        embedding = nn.Embedding(10, 4, sparse=True)
        weight = nn.Parameter(torch.ones(4, 4))
        optimizer = Shampoo([("w", weight), ("tokens", embedding.weight)])
        weight.grad = torch.ones(4, 4)
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ValueError, match=r"gradient of parameter 'tokens' is sparse"):
            optimizer.step()
        assert torch.equal(weight, torch.ones(4, 4))
