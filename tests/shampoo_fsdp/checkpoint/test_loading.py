"""State dicts of optimizers with other parameters, and of AdamW, in one process."""

import copy
import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint import ShampooLoadPlanner
from shampoo_fsdp.checkpoint.fits import decide
from tests.models import TinyLlama, train

OPTIONS = {"lr": 1e-2, "max_preconditioner_dim": 8, "precondition_frequency": 2}
WQ = "layers.0.attention.wq.weight"


def trained(parameters, model, optimizer_class=Shampoo, **options):
    optimizer = optimizer_class(parameters, **options)
    train(model, optimizer, range(4))
    return optimizer


def entries_of(optimizer, parameter):
    return {name: value + 0.0 for name, value in optimizer.state[parameter].items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyLlama(n_layers=1)


def assert_same_state(new, old, parameter):
    theirs = old[parameter] if isinstance(old, dict) else entries_of(old, parameter)
    mine = entries_of(new, parameter)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


class TestOtherParameters:
    def test_more_parameters_take_over_by_name(self, model, caplog):
        old = trained([(n, p) for n, p in model.named_parameters() if "wq" in n], model, **OPTIONS)
        named = list(model.named_parameters())
        refusing = Shampoo(named, **OPTIONS)
        with pytest.raises(ValueError, match=r"no optimizer state for .*on_mismatch = \"rebuild\""):
            refusing.load_state_dict(old.state_dict())
        new = Shampoo(named, **OPTIONS, on_mismatch="rebuild")
        new.load_state_dict(old.state_dict())
        assert_same_state(new, old, dict(named)[WQ])
        assert new.state[dict(named)["output.weight"]]["step"] == 0
        assert "all starts anew for 'tok_embeddings.weight'" in caplog.text
        train(model, new, [5])

    def test_fewer_and_reordered_parameters_take_over_by_name(self, model, caplog):
        named = list(model.named_parameters())
        old = trained(named, model, **OPTIONS)
        kept = [(n, p) for n, p in reversed(named) if "wq" in n or "output" in n]
        new = Shampoo(kept, **OPTIONS)
        new.load_state_dict(old.state_dict())
        for _, parameter in kept:
            assert_same_state(new, old, parameter)
        assert "is not used" in caplog.text and "'tok_embeddings.weight'" in caplog.text

    def test_the_state_of_what_is_frozen_now_is_not_dropped_in_silence(self, model, caplog):
        old = trained(model.named_parameters(), model, **OPTIONS)
        model.output.weight.requires_grad_(False)
        new = Shampoo(model.named_parameters(), **OPTIONS)
        new.load_state_dict(old.state_dict())
        assert "'output.weight', frozen here, is not used" in caplog.text

    def test_a_renamed_parameter_is_found_where_the_state_dict_is_told_its_name(self, model):
        named = dict(model.named_parameters())
        old = trained(named.items(), model, **OPTIONS)
        renamed = [(n.replace("wq", "query"), p) for n, p in named.items()]
        new = Shampoo(renamed, **OPTIONS)
        with pytest.raises(ValueError, match=r"'layers\.0\.attention\.query\.weight'"):
            new.load_state_dict(old.state_dict())
        state = copy.deepcopy(old.state_dict())
        (group,) = state["param_groups"]
        group["param_names"] = [n.replace("wq", "query") for n in group["param_names"]]
        new.load_state_dict(state)
        for parameter in named.values():
            assert_same_state(new, old, parameter)

    def test_groups_take_the_settings_of_the_group_that_their_parameters_were_in(self, model):
        def groups(*parts):
            named = list(model.named_parameters())
            return [
                {"params": [(n, p) for n, p in named if (part in n) == inside], "lr": lr}
                for part, inside, lr in parts
            ]

        old = Shampoo(groups(("norm", True, 1e-3), ("norm", False, 2e-3)))
        new = Shampoo(groups(("norm", False, 5e-3), ("norm", True, 5e-3)))
        new.load_state_dict(old.state_dict())
        assert [group["lr"] for group in new.param_groups] == [2e-3, 1e-3]

    def test_without_names_other_numbers_are_refused(self, model):
        old = Shampoo(model.parameters(), exclude=[])
        new = Shampoo(list(model.parameters())[1:], exclude=[])
        with pytest.raises(ValueError, match=r"no names tell which is which.*named_parameters"):
            new.load_state_dict(old.state_dict())


class TestFromBeforeLrFactor:
    @pytest.mark.parametrize("exclude", [["default"], ["."]])
    def test_a_state_dict(self, model, caplog, exclude):
        def groups():
            (first, *others) = model.named_parameters()
            return [{"params": [first]}, {"params": others, "lr_factor": 7.0}]

        old = trained(groups(), model, **OPTIONS | {"exclude": exclude})
        del old.param_groups[0]["lr_factor"]
        new = Shampoo(groups(), **OPTIONS | {"exclude": exclude})
        new.load_state_dict(old.state_dict())
        assert [group["lr_factor"] for group in new.param_groups] == [1.0, 7.0]
        assert caplog.text.count("has no 'lr_factor' and goes on with 1, as it was") == 1

    def test_another_one_of_the_job_does_not_count_and_that_is_said(self, model, caplog):
        old = trained(model.named_parameters(), model, **OPTIONS)
        Shampoo(model.named_parameters(), **OPTIONS, lr_factor=1).load_state_dict(old.state_dict())
        assert "'lr_factor' is 3.0 in the checkpoint, which counts; 1 here." in caplog.text

    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("planner", [ShampooLoadPlanner(), None], ids=["ours", "PyTorch's"])
    def test_a_folder(self, model, tmp_path, caplog, flat, planner):
        old = trained(model.named_parameters(), model, **OPTIONS, lr_factor=1)
        new = Shampoo(model.named_parameters(), **OPTIONS)
        del old.param_groups[0]["lr_factor"]
        if planner is None:  # it insists on what is there
            del new.param_groups[0]["lr_factor"]
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        read = functools.partial(get_optimizer_state_dict, model, options=options)
        dcp.save({"optimizer": read(old)}, checkpoint_id=tmp_path)
        state = {"optimizer": read(new)}
        dcp.load(state, checkpoint_id=tmp_path, planner=planner)
        set_optimizer_state_dict(model, new, state["optimizer"], options=options)
        assert new.param_groups[0]["lr_factor"] == 1.0
        assert caplog.text.count("has no 'lr_factor' and goes on with 1, as it was") == 1

    def test_one_of_shampoo_beside_adamw_is_not_of_before(self):
        saved = {"state.b.max_preconditioner_dim": torch.empty(4, 0), "param_groups.b.lr_factor": 2}
        report = decide({"param_groups.a.lr_factor": 3.0}, saved, "refuse")
        assert report.left_out == {"param_groups.a.lr_factor"} and not report.of_before


class TestAdamW:
    def test_its_moments_are_taken_over(self, model):
        adamw = trained(model.parameters(), model, torch.optim.AdamW, lr=3e-3, betas=(0.8, 0.9))
        new = Shampoo(model.named_parameters(), **OPTIONS)
        new.load_state_dict(adamw.state_dict())
        assert new.param_groups[0]["lr"] == 3e-3 and new.param_groups[0]["betas"] == (0.8, 0.9)
        assert new.param_groups[0]["lr_factor"] == 3.0
        for parameter in model.parameters():
            mine, theirs = entries_of(new, parameter), adamw.state[parameter]
            for name in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(mine[name], theirs[name])
            assert mine.get("factor_step", 0.0) == 0.0
        train(model, new, [5])
        assert "amsgrad" not in new.param_groups[0] and "fused" not in new.param_groups[0]

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(
        ("rule", "method"),
        [("soap", "qr"), ("shampoo", "qr"), ("kl_shampoo", "qr"), ("kl_shampoo", "eigh")],
    )
    def test_factors_start_as_those_of_a_new_optimizer(self, model, rule, method, packed):
        adamw = trained(model.parameters(), model, torch.optim.AdamW)
        options = {**OPTIONS, "preconditioner": rule, "root_method": method}
        options |= {"symmetric_packing": packed, "root_dtype": "bfloat16"}
        fresh, loaded = (Shampoo(model.named_parameters(), **options) for _ in range(2))
        loaded.load_state_dict(adamw.state_dict())
        of_blocks = fresh.state[model.get_parameter(WQ)].keys() - {"step", "exp_avg", "exp_avg_sq"}
        for entry in of_blocks:
            mine, theirs = (o.state[model.get_parameter(WQ)][entry] + 0 for o in (loaded, fresh))
            assert torch.equal(mine, theirs), entry

    def test_settings_that_are_not_allowed_here_change_nothing(self, model):
        adamw = trained(model.parameters(), model, torch.optim.AdamW)
        state = adamw.state_dict()
        state["param_groups"][0]["betas"] = (0.9, 1.0)
        new = Shampoo(model.named_parameters(), lr=5e-3)
        with pytest.raises(ValueError, match="beta2"):
            new.load_state_dict(state)
        assert new.param_groups[0]["lr"] == 5e-3
        assert not new.state[model.output.weight]["exp_avg"].any()
