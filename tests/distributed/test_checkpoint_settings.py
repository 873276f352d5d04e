"""Loading into other settings: what fits is taken, or all is refused by name."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import ShampooLoadPlanner
from tests.distributed.test_checkpoints import SETTINGS, states
from tests.models import build, full_parameters, train
from tests.ranks import run_ranks

SAVED_AT, END = 6, 10
WQ, NORM, EMBEDDING = "layers.0.attention.wq.weight", "norm.weight", "tok_embeddings.weight"
W1 = "layers.0.feed_forward.w1.weight"

SOURCES: dict[str, dict[str, Any] | None] = {
    "shampoo": {},
    "soap": {"preconditioner": "soap", "grafting": "none"},
    "sgd": {"grafting": "sgd"},
    "adagrad": {"grafting": "adagrad"},
    "adamw": None,
}
"""Settings of Shampoo; None for AdamW."""

# What is saved, the settings that load it, and words of the refusal; "" if it is accepted.
CASES: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "the same": ("shampoo", {}, ""),
    "hyperparameters": (
        "shampoo",
        {"lr": 5.0, "lr_factor": 7.0, "betas": (0.1, 0.2), "weight_decay": 0.0},
        "",
    ),
    "frequency": ("shampoo", {"precondition_frequency": 2, "start_preconditioning_step": 3}, ""),
    "rmsprop": ("shampoo", {"grafting": "rmsprop"}, ""),
    "no grafting": ("shampoo", {"grafting": "none"}, ""),
    "to adagrad": ("shampoo", {"grafting": "adagrad"}, ""),
    "from adagrad": ("adagrad", {}, ""),
    "momentum": ("shampoo", {"momentum": 0.9}, ""),
    "from sgd": ("sgd", {}, "'grafting'"),
    "smaller blocks": ("shampoo", {"max_preconditioner_dim": 8}, "'max_preconditioner_dim' is 16"),
    "large blocks": ("shampoo", {"max_preconditioner_dim": 64}, "in the checkpoint, but 64 here"),
    "diagonals": ("shampoo", {"large_dim": "diagonal"}, "'large_dim'"),
    "heads": ("shampoo", {"split_heads": ["wq", "wk"], "head_dim": 6}, "'split_heads' with 'head_"),
    "packed": ("shampoo", {"symmetric_packing": True}, "'symmetric_packing'"),
    "fewer factors": ("shampoo", {"max_factor_ratio": 0.5}, "'max_factor_ratio'"),
    "qr": ("shampoo", {"root_method": "qr"}, "'root_method'"),
    "more excluded": ("shampoo", {"exclude": ["emb", "output", "wq"]}, f"'{WQ}' is precondit"),
    "fewer excluded": ("shampoo", {"exclude": []}, f"'{EMBEDDING}' is not preconditioned in the c"),
    "to soap": ("shampoo", {"preconditioner": "soap"}, "'shampoo' in the checkpoint, but 'soap'"),
    "from soap": ("soap", {}, "'preconditioner' is 'soap' in the checkpoint, but 'shampoo' here"),
    "from adamw": ("adamw", {}, ""),
    "to adamw": ("shampoo", None, ""),
    "soap to adamw": ("soap", None, ""),
}


@dataclasses.dataclass
class Loaded:
    """What came of a case, on one rank."""

    refused: str
    """What "refuse" says."""
    report: str
    """What "rebuild" says."""
    parameters: dict[str, Tensor]
    """At the end of the run that goes on."""


def optimizer_of(settings: dict[str, Any] | None) -> Any:
    built = build("fsdp", n_layers=1)
    if settings is None:
        return built, torch.optim.AdamW(built.model.parameters(), lr=1e-2)
    options = {**SETTINGS, "preconditioner": "shampoo", **settings}
    return built, Shampoo(built.model.named_parameters(), **options)


def save_all_and_load_all(folder: Path) -> dict[str, Loaded]:
    for source, settings in SOURCES.items():
        built, optimizer = optimizer_of(settings)
        train(built, optimizer, range(SAVED_AT))
        dcp.save(states(built, optimizer, flat=True), checkpoint_id=folder / source)
    return {name: load(folder, name) for name in CASES}


def load(folder: Path, name: str) -> Loaded:
    source, settings, _ = CASES[name]
    built, optimizer = optimizer_of(settings)
    if settings is not None:
        train(built, optimizer, range(3))  # loading replaces what is there

    def read(mode: str) -> ShampooLoadPlanner:
        saved = states(built, optimizer, flat=True)
        planner = ShampooLoadPlanner(mode)
        dcp.load(saved, checkpoint_id=folder / source, planner=planner)
        set_model_state_dict(built.model, saved["model"])
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        set_optimizer_state_dict(built.model, optimizer, saved["optimizer"], options=flat)
        return planner

    before, refused = full_parameters(built.model), ""
    try:
        read("refuse")
    except dcp.CheckpointException as error:
        refused = str(error).splitlines()[-1]
        assert all(torch.equal(p, before[n]) for n, p in full_parameters(built.model).items())
    planner = read("rebuild")
    dcp.save(states(built, optimizer, flat=True), checkpoint_id=folder / f"loaded: {name}")
    train(built, optimizer, range(SAVED_AT, END))
    return Loaded(refused, str(planner.report), full_parameters(built.model))


class Results:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks = run_ranks(2, save_all_and_load_all, timeout=240, folder=folder)

    @functools.cache  # noqa: B019
    def state(self, name: str) -> dict[str, Any]:
        """The optimizer's part of a checkpoint."""
        file = self.folder / f"{name}.pt"
        dcp_to_torch_save(self.folder / name, file)
        saved = torch.load(file, weights_only=True)["optimizer"]
        return {key.removeprefix("state."): value for key, value in saved.items()}

    def before_and_after(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.state(CASES[name][0]), self.state(f"loaded: {name}")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("settings"))


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused_by_name_and_the_rest_is_not(results, name):
    words = CASES[name][2]
    for rank in results.ranks:
        assert words in rank[name].refused and bool(words) == bool(rank[name].refused)
        assert ('on_mismatch = "rebuild"' in rank[name].refused) == bool(words)
        assert all(p.isfinite().all() for p in rank[name].parameters.values())


def same(before: dict[str, Any], after: dict[str, Any], *entries: str, name: str = WQ) -> bool:
    keys = [f"{name}.{entry}" for entry in entries]
    return all(torch.equal(before[key], after[key]) for key in keys)


BLOCKS = ["smaller blocks", "large blocks", "diagonals", "heads"]


@pytest.mark.parametrize("name", [*BLOCKS, "packed", "qr", "to soap", "from adamw"])
def test_where_factors_do_not_fit_the_moments_do(results, name):
    before, after = results.before_and_after(name)
    assert same(before, after, "step", "exp_avg") and after[f"{WQ}.step"] == SAVED_AT
    if name != "to soap":
        assert same(before, after, "exp_avg_sq")
        assert same(before, after, "step", "exp_avg", "exp_avg_sq", name=NORM)
    assert after[f"{WQ}.factor_step"] == 0.0
    assert not after.get(f"{WQ}.factors", torch.zeros(1)).any()
    assert f"moments are loaded and factors start anew for '{WQ}'" in results.ranks[0][name].report


def test_only_matrices_that_lack_a_factor_now_start_their_factors_anew(results):
    before, after = results.before_and_after("fewer factors")
    assert same(before, after, "step", "exp_avg", "exp_avg_sq", "factors", "factor_step")
    assert same(before, after, "step", "exp_avg", "exp_avg_sq", name=W1)
    assert after[f"{W1}.factor_step"] == 0.0
    assert f"factors start anew for '{W1}'" in results.ranks[0]["fewer factors"].report


def test_the_settings_of_groups_come_from_the_checkpoint_and_others_from_the_job(results):
    before, after = results.before_and_after("hyperparameters")
    for setting in ("lr", "lr_factor", "betas", "weight_decay"):
        key = f"param_groups.{WQ}.{setting}"
        assert after[key] == before[key]
    expected = results.ranks[0]["the same"].parameters
    found = results.ranks[0]["hyperparameters"].parameters
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    _, after = results.before_and_after("from adamw")
    assert after[f"param_groups.{WQ}.lr_factor"] == SETTINGS["lr_factor"]  # which AdamW's has not
    other = results.ranks[0]["frequency"].parameters
    assert not all(torch.equal(other[n], expected[n]) for n in expected)


def test_second_moments_and_their_sums_follow_from_each_other(results):
    before, after = results.before_and_after("to adagrad")
    for name in (WQ, NORM):
        expected = before[f"{name}.exp_avg_sq"] * SAVED_AT
        assert torch.allclose(after[f"{name}.sum"], expected) and expected.any()
    before, after = results.before_and_after("from adagrad")
    for name in (WQ, NORM):
        assert torch.allclose(after[f"{name}.exp_avg_sq"], before[f"{name}.sum"] / SAVED_AT)
    assert same(before, after, "factors", "inverse_roots", "factor_step")


def test_momentum_starts_at_zero_where_there_was_none(results):
    before, after = results.before_and_after("momentum")
    assert same(before, after, "exp_avg", "exp_avg_sq", "factors", "inverse_roots", "factor_step")
    assert not after[f"{WQ}.momentum_buffer"].any()


@pytest.mark.parametrize("name", ["from soap", "from sgd"])
def test_without_statistics_to_graft_from_a_parameter_starts_anew(results, name):
    _, after = results.before_and_after(name)
    for entry in ("step", "factor_step", "exp_avg", "exp_avg_sq", "factors"):
        assert not after[f"{WQ}.{entry}"].any(), entry
    assert (after[f"{NORM}.step"] == 0.0) == (name == "from sgd")
    assert f"all starts anew for '{WQ if name == 'from soap' else EMBEDDING}'" in (
        results.ranks[0][name].report
    )


def test_the_list_of_excluded_parameters_may_change(results):
    before, after = results.before_and_after("more excluded")
    assert same(before, after, "step", "exp_avg", "exp_avg_sq")
    assert f"{WQ}.factors" not in after
    assert f"factors are dropped for '{WQ}'" in results.ranks[0]["more excluded"].report
    before, after = results.before_and_after("fewer excluded")
    assert same(before, after, "step", "exp_avg", "exp_avg_sq", name=EMBEDDING)
    assert after[f"{EMBEDDING}.factor_step"] == 0.0
    assert same(before, after, "factors", "inverse_roots", "factor_step")


def test_adamw_takes_the_moments_and_keeps_its_own_settings(results):
    before, after = results.before_and_after("to adamw")
    assert same(before, after, "step", "exp_avg", "exp_avg_sq")
    assert after[f"param_groups.{WQ}.amsgrad"] is False
    assert after[f"param_groups.{WQ}.lr"] == before[f"param_groups.{WQ}.lr"]
    _, after = results.before_and_after("soap to adamw")
    assert after[f"{WQ}.step"] == 0.0 and not after[f"{WQ}.exp_avg"].any()
    assert after[f"{NORM}.step"] == SAVED_AT


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'on_mismatch' is 'convert'; allowed: 'refuse' or 'reb"):
        ShampooLoadPlanner("convert")
