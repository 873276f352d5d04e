"""What goes wrong on one rank is an error on all of them, or harmless; never a hang."""

import gc
import pickle
import weakref
from multiprocessing.reduction import ForkingPickler
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

from shampoo_fsdp import Shampoo
from shampoo_fsdp.checkpoint.sharded import ShardedBlocks
from tests.models import build, with_shampoo
from tests.ranks import ranks


@ranks(2)
def test_what_ranks_disagree_about_is_an_error_on_every_rank():
    rank, model = dist.get_rank(), build("fsdp").model
    named = list(model.named_parameters())
    for parameters, settings, said in (
        (named, {"max_preconditioner_dim": 8 * (1 + rank)}, r"the settings: .*_dim = 8, .* = 16"),
        (named, {"exclude": [["wq"], ["."]][rank]}, r"settings: .*\['wq'\], .*exclude = \['\.'\]"),
        ([(f"{n}{rank}", p) for n, p in named], {}, r"trained: rank 0 has tok_embeddings\.weight0"),
    ):
        with pytest.raises(ValueError, match=said):
            Shampoo(parameters, **settings)
    model.output.weight.requires_grad_(rank == 0)
    with pytest.raises(ValueError, match=r"rank 0 has output\.weight, rank 1 has nothing more"):
        Shampoo(named)


@ranks(2)
def test_an_unsupported_placement_is_named():
    mesh = init_device_mesh("cpu", (2,))
    weight = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"'w'.*Partial\(sum\).*supported: Replicate, Shard"):
        Shampoo([("w", torch.nn.Parameter(weight))])


def forget_the_groups(_, state_dict):
    if dist.get_rank() == 0:
        del state_dict["param_groups"]


def refuse_on_rank_0(_, state_dict):
    if dist.get_rank() == 0:
        raise RuntimeError("not today")


@ranks(2)
def test_a_state_dict_that_one_rank_cannot_load_is_an_error_on_every_rank():
    """Also where a set of ranks that knows of it comes before one that does not."""
    alone = [("alone", torch.nn.Parameter(torch.ones(4, 4)))]
    for hook, said in ((forget_the_groups, "param_groups"), (refuse_on_rank_0, "not today")):
        optimizer = Shampoo([*build("fsdp").model.named_parameters(), *alone])
        optimizer.register_load_state_dict_pre_hook(hook)
        with pytest.raises(ValueError, match=said):
            optimizer.load_state_dict(optimizer.state_dict())


@ranks(2)
def test_a_rank_can_hand_its_part_to_a_process_that_saves_it():
    _, optimizer = with_shampoo("fsdp")
    entries = optimizer.state_dict()["state"][1]
    received = pickle.loads(ForkingPickler.dumps(entries))
    for name, value in entries.items():
        if not isinstance(value, ShardedBlocks):
            assert torch.equal(value, received[name])
            continue
        pieces = zip(value.to_local().pieces.items(), received[name].pieces.items(), strict=True)
        for (offset, tensor), (other_offset, other) in pieces:
            assert offset == other_offset and torch.equal(tensor, other)


@ranks(2)
def test_a_gradient_that_one_rank_cannot_use_raises_there_and_nobody_waits():
    for trouble in ("sparse", "complex", "frozen"):
        matrices = {n: torch.nn.Parameter(torch.ones(8, 8)) for n in ("good", "bad", "frozen")}
        matrices["frozen"].requires_grad_(False)
        optimizer = Shampoo(matrices.items(), replicas=dist.group.WORLD, weight_decay=0.0)
        matrices["good"].grad, matrices["bad"].grad = torch.ones(8, 8), torch.ones(8, 8)
        if dist.get_rank() == 1:
            matrices["bad"].grad_dtype = None
            if trouble == "frozen":
                matrices["frozen"].grad = torch.ones(8, 8)
            elif trouble == "sparse":
                matrices["bad"].grad = torch.ones(8, 8).to_sparse()
            else:
                matrices["bad"].grad = torch.ones(8, 8, dtype=torch.complex64)
            with pytest.raises(ValueError, match="'frozen'" if trouble == "frozen" else "'bad'"):
                optimizer.step()
        else:
            optimizer.step()
        # The other parameters have taken their step, and all of them are still replicas.
        assert (matrices["good"] < 1.0).all()
        for parameter in matrices.values():
            other = [torch.empty(8, 8), torch.empty(8, 8)]
            dist.all_gather(other, parameter.detach())
            assert torch.equal(*other)
        matrices["frozen"].grad = None
        matrices["bad"].grad = torch.ones(8, 8)
        optimizer.step()  # and it can go on
        assert (matrices["bad"] < 1.0).all()


@ranks(2)
def test_after_an_interrupted_step_the_next_one_touches_no_memory_that_is_still_in_flight():
    """Interrupted midway, as by Ctrl-C, with gradients in flight."""
    torch.manual_seed(0)
    model = nn.Linear(12, 16, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = Shampoo(model.named_parameters(), max_preconditioner_dim=16)
    model(torch.ones(1, 12)).sum().backward()
    with (
        mock.patch.object(optimizer._parameters.excluded, "step", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        optimizer.step()
    (bucket,) = optimizer._parameters.buckets
    exchange = bucket._exchange
    work, wait, waited_for = exchange._wait, exchange._finish, []
    in_flight = weakref.ref(exchange._arriving.untyped_storage())
    assert work is not None and in_flight() is not None
    gc.collect()

    def watched() -> None:
        if exchange._wait is not None:
            waited_for.append((exchange._wait, in_flight() is not None))
        wait()

    with mock.patch.object(exchange, "_finish", watched):
        optimizer.step()
    assert waited_for[0] == (work, True)
    assert len(waited_for) == 3  # this one's gradients and updates
