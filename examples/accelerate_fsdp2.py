"""Shampoo under Accelerate's FSDP2: torchrun --nproc_per_node 2 examples/accelerate_fsdp2.py"""

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from shampoo_fsdp import Shampoo, head_settings, param_groups

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60, help="of the whole training")
parser.add_argument("--folder", default="outputs/accelerate", help="where the state is saved")
parser.add_argument("--resume", help="the folder of a run to go on from")
arguments = parser.parse_args()

if not torch.cuda.is_available():  # Accelerate shards on no CPUs: these pass for GPUs.
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
wrap = "transformer_based_wrap"
accelerator = Accelerator(
    fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=wrap),
    dataloader_config=DataLoaderConfiguration(split_batches=True),  # 8 lines on all ranks together
    gradient_accumulation_steps=2,
)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
# Its lr is AdamW's. Accelerate puts the sharded parameters into it later.
optimizer = Shampoo(param_groups(model, weight_decay=0.1), lr=3.3e-3, **head_settings(model))
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)

text = b"".join(f.read_bytes() for f in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
lines = torch.frombuffer(bytearray(text[:204_800]), dtype=torch.uint8).view(-1, 128).long()
order = torch.randperm(len(lines))[: arguments.steps * 2 * 8]
model, optimizer, schedule, batches = accelerator.prepare(
    model, optimizer, schedule, DataLoader(lines[order], batch_size=8)
)
if arguments.resume:
    accelerator.load_state(arguments.resume)
step = schedule.scheduler.last_epoch

for batch in accelerator.skip_first_batches(batches, 2 * step):
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        step += 1
        if step % 5 == 0:
            accelerator.print(f"step {step}: loss {accelerator.reduce(loss, 'mean'):.2f}")
accelerator.save_state(arguments.folder)
accelerator.end_training()
