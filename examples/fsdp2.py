"""torchrun --nproc_per_node 2 examples/fsdp2.py --steps 60 --folder outputs/fsdp2 [--resume]"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from shampoo_fsdp import Shampoo, param_groups
from shampoo_fsdp.checkpoint import ShampooLoadPlanner


class Block(nn.TransformerEncoderLayer):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.ones(64, 64, dtype=torch.bool).triu(1))


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--folder", default="outputs/fsdp2")
parser.add_argument("--resume", action="store_true", help="from the folder, on any number of ranks")
args = parser.parse_args()
dist.init_process_group("gloo")
torch.manual_seed(0)  # the same weights everywhere, of which fully_shard keeps a rank's part
model = nn.Sequential()  # bytes in, logits of the next ones out; Shampoo knows the ends by name
model.embeddings, model.first = nn.Embedding(256, 64), Block(64, 4, 256, 0.0)
model.second, model.output = Block(64, 4, 256, 0.0), nn.Linear(64, 256)
policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
for module in (model.first, model.second, model.output, model):
    fully_shard(module, mp_policy=policy)
optimizer = Shampoo(param_groups(model, weight_decay=0.1), lr=3.3e-3)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 10, 1.0))
if args.resume:
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "schedule": schedule}
    dcp.load(saved, checkpoint_id=args.folder, planner=ShampooLoadPlanner())
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=saved["optimizer"])
source = b"".join(map(Path.read_bytes, sorted(Path(argparse.__file__).parent.glob("*.py"))))
texts = torch.frombuffer(bytearray(source), dtype=torch.uint8).long().unfold(0, 65, 64)
for step in range(schedule.last_epoch + 1, args.steps + 1):
    torch.manual_seed(step)  # what a step reads depends neither on the ranks nor on a resume
    for last in (False, True):  # two gradients add up, then they travel
        model.set_requires_gradient_sync(last)
        text = texts[torch.randint(len(texts), (16,))[dist.get_rank() :: dist.get_world_size()]]
        loss = nn.functional.cross_entropy(model(text[:, :-1].T).permute(1, 2, 0), text[:, 1:])
        (loss / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    dist.all_reduce(loss)
    if step % 10 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss / dist.get_world_size():.3f}")
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state, "schedule": schedule}, checkpoint_id=args.folder)
dist.destroy_process_group()
