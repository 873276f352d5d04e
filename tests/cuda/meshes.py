"""What each rank of a mesh of GPUs does, or of CPU ranks in their place."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.models import TinyLlama

SETTINGS = {"lr": 1e-2, "lr_factor": 1.0, "max_preconditioner_dim": 16, "precondition_frequency": 4}


def start(device_type: str) -> None:
    """Join the other ranks."""
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")


def own_device(device_type: str) -> torch.device:
    """This rank's."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def sharded_llama(device_type: str) -> TinyLlama:
    """Under FSDP2 over all ranks."""
    model = TinyLlama().to(own_device(device_type))
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
