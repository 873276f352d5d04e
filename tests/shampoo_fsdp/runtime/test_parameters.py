"""What the optimizer is given: names, groups with options of torch.optim, models that move."""

import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard

from shampoo_fsdp import Shampoo
from shampoo_fsdp.runtime.parameters import describe
from tests.models import (
    SMALL,
    TinyLlama,
    deterministic_gradients,
    set_gradients,
    train,
    with_shampoo,
)
from tests.ranks import ranks


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape or (4, 4)))


class TestNames:
    def test_without_names_embeddings_could_not_be_told(self):
        model = TinyLlama(**SMALL)
        with pytest.raises(ValueError, match="no names") as refused:
            Shampoo(model.parameters())
        said = str(refused.value)
        assert "12 parameters have no names" in said and "9 matrices" in said
        assert "model.named_parameters()" in said and "exclude = []" in said

    @pytest.mark.parametrize(
        "make",
        [
            lambda model: Shampoo(model.named_parameters()),
            lambda model: Shampoo(model.parameters(), exclude=[]),  # names would change nothing
        ],
    )
    def test_nothing_is_said_where_names_make_no_difference(self, make):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(TinyLlama(**SMALL))

    def test_groups_may_bring_their_names(self):
        model = TinyLlama(**SMALL)
        adamw = torch.optim.AdamW(model.named_parameters(), fused=True, weight_decay=0.3)
        optimizer = Shampoo(adamw.param_groups)
        assert optimizer.matrices_left_to_grafting() == ["tok_embeddings.weight", "output.weight"]
        assert optimizer.param_groups[0]["weight_decay"] == 0.3
        assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]

    def test_either_all_have_names_or_none(self):
        """In the words of torch.optim, which people search for."""
        groups = [{"params": [matrix()], "param_names": ["a"]}, {"params": [matrix(3, 5)]}]
        with pytest.raises(ValueError, match=r"names\. cannot add param group without names"):
            Shampoo(groups)


class TestOptionsOfTorch:
    """Options of torch.optim's optimizers are obeyed or refused, never ignored."""

    @pytest.mark.parametrize(
        ("option", "what_to_do"),
        [
            ({"maximize": True}, "'maximize' is True; allowed: False"),
            ({"decoupled_weight_decay": False}, "'decoupled_weight_decay' is False"),
            ({"beta1": 0.9}, r"'beta1' is 0\.9; .*betas"),
            ({"fused": "yes"}, "'fused' is 'yes'"),
        ],
    )
    def test_what_cannot_be_obeyed_is_refused(self, option, what_to_do):
        for make in (
            lambda: Shampoo([("w", matrix())], **option),
            lambda: Shampoo([{"params": [("w", matrix())], **option}]),
        ):
            with pytest.raises(ValueError, match=what_to_do):
                make()

    def test_what_changes_nothing_is_accepted(self):
        options = {"maximize": False, "amsgrad": False, "foreach": None, "fused": True}
        Shampoo([("w", matrix())], **options)
        optimizer = Shampoo([{"params": [("w", matrix())], "name": "hidden", **options}])
        assert optimizer.param_groups[0]["name"] == "hidden"


class TestMovedModels:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_another_type_before_the_first_step_is_as_if_it_had_been_there(self, dtype):
        before, after = TinyLlama(**SMALL).to(dtype), TinyLlama(**SMALL)
        results = []
        for model in (before, after):
            optimizer = Shampoo(model.named_parameters(), lr=1e-2)
            model.to(dtype)
            train(model, optimizer, range(4))
            state = optimizer.state_dict()["state"].values()
            types = [{name: value.dtype for name, value in of.items()} for of in state]
            results.append(({p.dtype for p in model.parameters()}, types))
        assert results[0] == results[1] and results[0][0] == {dtype}
        assert all(map(torch.equal, before.parameters(), after.parameters()))

    def test_another_type_between_steps_keeps_the_state(self):
        (model, _), optimizer = with_shampoo("single", SMALL, lr=1e-2)
        train(model, optimizer, range(3))
        kept = optimizer.state[model.output.weight]["exp_avg"].clone()
        model.to(torch.bfloat16)
        model.output.weight.grad = None
        optimizer.step()
        found = optimizer.state[model.output.weight]["exp_avg"]
        assert torch.equal(found, kept.bfloat16()) and kept.any()
        assert all(p.isfinite().all() for p in model.parameters())

    def test_another_device_is_refused_before_anything_changes(self):
        name = "layers.0.attention.wq.weight"
        (model, _), optimizer = with_shampoo("single", SMALL)
        train(model, optimizer, range(1))
        before = {n: p.detach().clone() for n, p in model.named_parameters() if n != name}
        to_meta(model.get_parameter(name))
        with pytest.raises(
            ValueError, match=rf"'{name}' is .* on meta now, .* on cpu: .*load_state_dict"
        ):
            optimizer.step()
        assert all(torch.equal(model.get_parameter(n), value) for n, value in before.items())

    def test_before_the_first_step_the_state_goes_along(self):
        (model, _), optimizer = with_shampoo("single", SMALL)
        here = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for parameter in model.parameters():
            to_meta(parameter)
        with pytest.raises(ValueError, match="on the meta device; materialise"):
            optimizer.step()
        for parameter, back in zip(model.parameters(), here, strict=True):
            torch.utils.swap_tensors(parameter, back)
        train(model, optimizer, range(1))
        assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def to_meta(parameter: nn.Parameter) -> None:
    moved = nn.Parameter(torch.empty(parameter.shape, device="meta"))
    torch.utils.swap_tensors(parameter, moved)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch allows no other type")
def test_gradients_may_be_of_another_type_than_their_parameters():
    options = {"lr": 1e-2, "weight_decay_type": "l2"}
    (rounded, _), one = with_shampoo("single", SMALL, **options)
    (other, _), two = with_shampoo("single", SMALL, **options)
    for number, p in enumerate(other.parameters()):
        p.grad_dtype = torch.bfloat16 if number % 3 else torch.float32
    for step in range(4):
        gradients = deterministic_gradients(rounded, step, dtype=torch.bfloat16)
        set_gradients(rounded, gradients)
        for name, p in other.named_parameters():
            p.grad = gradients[name].to(p.grad_dtype)
        one.step()
        two.step()
    assert all(map(torch.equal, rounded.parameters(), other.parameters()))
    assert {p.dtype for p in other.parameters()} == {torch.float32}


@ranks(2)
def test_what_fsdp_keeps_on_the_cpu_is_refused_with_what_to_write():
    """As CPUOffloadPolicy does; a mesh that says it is of GPUs is all that can be had here."""
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), offload_policy=CPUOffloadPolicy(False))
    Shampoo(model.named_parameters())  # there are no GPUs
    alone = nn.Linear(4, 4)
    fully_shard(alone, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "one"))["one"])
    with mock.patch.object(DeviceMesh, "device_type", "cuda"):
        with pytest.raises(ValueError, match=r"'weight' is on the CPU .*_policy=OffloadPolicy\(\)"):
            Shampoo(model.named_parameters())
        Shampoo(model.named_parameters(), root_method="eigh")
        with pytest.warns(match="'weight' is on the CPU"):
            Shampoo(alone.named_parameters())


@ranks(3)
def test_a_group_without_a_backend_for_the_parameters_is_refused():
    group = dist.new_group([0, 1], backend="cuda:gloo")
    if dist.get_rank() < 2:
        with pytest.raises(ValueError, match=r"ranks 0-1 has no backend .*cpu:gloo,cuda:nccl"):
            Shampoo([("w", matrix())], replicas=group)


@ranks(2)
def test_flat_shards_of_fsdp1_are_refused_by_name():
    for offered in (True, False):
        model = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(4, 6)), use_orig_params=offered, device_id=torch.device("cpu")
        )
        name = next(name for name, _ in model.named_parameters())
        for make in (
            lambda: Shampoo(model.named_parameters()),  # noqa: B023
            lambda: Shampoo(model.named_parameters(), replicas=dist.group.WORLD),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=rf"'{name}' is in a flat shard .*fully_shard"):
                make()


class ShardOrderEntry(NamedTuple):
    """As torch's, which some versions lack."""

    tensor_dim: int
    mesh_dims: tuple[int, ...]


@ranks(4)
def test_shards_in_another_order_than_that_of_the_mesh_are_refused_by_name():
    mesh = init_device_mesh("cpu", (2, 2))
    weight = DTensor.from_local(torch.zeros(2, 4), mesh, (Shard(0), Shard(0)), run_check=False)
    weight.requires_grad_()
    assert describe("w", weight, None).shape == (8, 4)
    weight._spec.shard_order = (ShardOrderEntry(0, (1, 0)),)
    with pytest.raises(ValueError, match=r"dimension 0 of parameter 'w' .* mesh dimensions \(1, 0"):
        Shampoo([("w", weight)])
