"""What is found in the model for Shampoo."""

import re

import pytest
import torch.distributed as dist
from torch import nn

from shampoo_fsdp import ShampooConfig
from shampoo_torchtitan import checkpoint
from shampoo_torchtitan.checkpoint import CheckpointManager
from shampoo_torchtitan.container import JobError, alike_on_all_ranks, with_heads
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS
from tests.ranks import run_ranks
from tests.shampoo_torchtitan import jobs


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


def blocks(job, arguments) -> dict[str, tuple[int, ...]]:
    trainer = jobs.make_trainer(job, *arguments)
    (optimizer,) = trainer.optimizers.optimizers
    members = [member for member in optimizer._parameters.members if member.part]
    trainer.close()
    return {m.name: m.part.grid.tiles for m in members if re.search(r"attention\.w|wqkv", m.name)}


@jobs.on_cpu
def test_attention_of_a_job_is_cut_between_heads(tmp_path):
    arguments = ["--optimizer.shampoo.split_heads", r"\.w[qkv]\.,wqkv"]
    (found,) = run_ranks(1, blocks, init=False, job=jobs.write_job(tmp_path), arguments=arguments)
    # 4 heads of 16 rows each for queries, keys and values, in one matrix or three.
    assert sum(tiles[0] for name, tiles in found.items() if "layers.0" in name) in (12, 13)
    assert max(tiles[0] for tiles in found.values()) in (4, 12)


class Stage(nn.Module):
    def __init__(self, **embeddings: nn.Module) -> None:
        super().__init__()
        for name, module in embeddings.items():
            self.add_module(name, module)
        self.layers = nn.ModuleDict({"0": nn.Linear(8, 8, bias=False)})


def test_embeddings_of_every_part_are_known_by_their_type(recwarn):
    parts = [Stage(token=nn.Embedding(20, 8), position=nn.Embedding(4, 8)), Stage()]
    if JOBS_ARE_FUNCTIONS:
        from shampoo_torchtitan.configs import ShampooOptimizers

        container = ShampooOptimizers(ShampooOptimizers.Config(), model_parts=parts)
    else:
        from shampoo_torchtitan.optimizer import build_optimizers
        from tests.shampoo_torchtitan.test_optimizer import ONE_RANK, config

        container = build_optimizers(parts, config(), ONE_RANK)
    left = [optimizer.matrices_left_to_grafting() for optimizer in container.optimizers]
    assert left == [["token.weight", "position.weight"], []]
    assert not [warning for warning in recwarn if "exclude" in str(warning.message)]


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

    from shampoo_torchtitan.configs import ShampooOptimizers

    model = Stage()
    optimizers = ShampooOptimizers(ShampooOptimizers.Config(), model_parts=[model])
    with pytest.raises(JobError, match=r"TorchFTCheckpointManager, TorchFT's, .*not support"):
        TorchFTCheckpointManager.Config(enable=False).build(
            dataloader=None, model_parts=[model], optimizers=optimizers, lr_schedulers=None,
            states={}, sd_adapter=None, ft_manager=None,
        )  # fmt: skip
