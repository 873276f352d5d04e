"""What is found in the model for Shampoo."""

from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from shampoo_fsdp import ShampooConfig
from shampoo_torchtitan import checkpoint
from shampoo_torchtitan.checkpoint import CheckpointManager
from shampoo_torchtitan.container import JobError, alike_on_all_ranks, with_heads
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.ranks import run_ranks


class Attention(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim


def test_the_rows_of_a_head_come_from_the_model():
    config = ShampooConfig(split_heads=["wq"])
    part = nn.Sequential(Attention(16), nn.Linear(2, 2), Attention(16))
    assert with_heads(config, [part]).head_dim == 16
    assert with_heads(config, [nn.Linear(2, 2)]).head_dim is None  # a stage without attention
    assert with_heads(ShampooConfig(), [part]).head_dim is None
    given = ShampooConfig(split_heads=["wq"], head_dim=32)
    assert with_heads(given, [part]).head_dim == 32
    with pytest.raises(ValueError, match=r"heads of \[8, 16\] rows: set it"):
        with_heads(config, [part, Attention(8)])


class Stage(nn.Module):
    def __init__(self, **embeddings: nn.Module) -> None:
        super().__init__()
        for name, module in embeddings.items():
            self.add_module(name, module)
        self.layers = nn.ModuleDict({"0": nn.Linear(8, 8, bias=False)})


def container(*parts: nn.Module, **settings: Any) -> Any:
    if JOBS_ARE_FUNCTIONS:
        from shampoo_torchtitan.configs import shampoo

        return shampoo(**settings).build(model_parts=list(parts))
    from shampoo_torchtitan.optimizer import build_optimizers
    from tests.shampoo_torchtitan.test_optimizer import ONE_RANK, config

    return build_optimizers(list(parts), config(shampoo=ShampooConfig(**settings)), ONE_RANK)


def test_embeddings_of_every_part_are_known_by_their_type_and_heads_by_their_rows(recwarn):
    first = Stage(token=nn.Embedding(20, 8), position=nn.Embedding(4, 8), a=Attention(4))
    optimizers = container(first, Stage(), split_heads=["layers"]).optimizers
    left = [optimizer.matrices_left_to_grafting() for optimizer in optimizers]
    assert left == [["token.weight", "position.weight"], []]
    assert {optimizer.config.head_dim for optimizer in optimizers} == {4}
    assert not [warning for warning in recwarn if "exclude" in str(warning.message)]


def test_settings_that_do_not_fit_the_model_end_the_job():
    said = r"Cannot build the optimizer: parameter 'layers\.0\.weight': root_method = "
    exponents = {"root_method": "polynomial", "root_exponents": [0.0, 0.123]}
    with pytest.raises(JobError, match=said):
        container(Stage(), preconditioner="shampoo", **exponents)


def fail_on_one_rank() -> list[str]:
    """What each rank is told of a setting that does not fit a stage, and of another failure."""
    told = []
    for error in (ValueError("'exclude' of this stage"), MemoryError("no memory")):
        with pytest.raises((JobError, MemoryError)) as refused, alike_on_all_ranks():
            if dist.get_rank() == 1:
                raise error
        told.append(f"{type(refused.value).__name__}: {refused.value}")
    return told


def test_what_fails_on_a_rank_ends_all_of_them():
    refused = "JobError: Cannot build the optimizer: 'exclude' of this stage"
    assert run_ranks(2, fail_on_one_rank) == [
        [refused, "JobError: Cannot build the optimizer: no memory"],
        [refused, "MemoryError: no memory"],
    ]


def test_a_users_own_checkpoint_manager_stays_one():
    class Mine(CheckpointManager):
        def save(self, step: int, last_step: bool = False) -> str:  # type: ignore[override]
            return f"mine, step {step}"

    found = checkpoint._class_for(Mine)
    assert issubclass(found, Mine) and issubclass(found, checkpoint.ShampooCheckpoints)
    assert found.__name__ == "Mine" and found.save is Mine.save


@pytest.mark.skipif(not JOBS_ARE_FUNCTIONS, reason="0.2 says so in the job file")
def test_torchft_is_refused():
    """Its trainer always has this manager, and would step Shampoo without TorchFT."""
    from torchtitan.experiments.torchft.checkpoint import TorchFTCheckpointManager

    model = Stage()
    optimizers = container(model)
    with pytest.raises(JobError, match=r"TorchFTCheckpointManager, TorchFT's, .*not support"):
        TorchFTCheckpointManager.Config(enable=False).build(
            dataloader=None, model_parts=[model], optimizers=optimizers, lr_schedulers=None,
            states={}, sd_adapter=None, ft_manager=None,
        )  # fmt: skip
