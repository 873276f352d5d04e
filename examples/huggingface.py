"""Shampoo in Hugging Face's Trainer: torchrun --nproc_per_node 2 examples/huggingface.py"""

import argparse
import os
import sysconfig
from pathlib import Path

import torch
import transformers as hf
from accelerate import DistributedType

from shampoo_fsdp import Shampoo, param_groups

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60, help="of the whole training")
parser.add_argument("--folder", default="outputs/huggingface", help="of the checkpoints")
parser.add_argument("--resume", help="the checkpoint of a run to go on from")
parser.add_argument("--model", default="llama", help="gpt2, mixtral, ... in a tiny size")
arguments = parser.parse_args()


class PrintLoss(hf.TrainerCallback):
    def on_log(self, args, state, control, logs, **_):
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.2f}", flush=True)


torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 256}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
config = hf.AutoConfig.for_model(arguments.model, **sizes, **heads)
model = hf.AutoModelForCausalLM.from_config(config)
text = b"".join(f.read_bytes() for f in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
lines = torch.frombuffer(bytearray(text[: 100 * 16 * 128]), dtype=torch.uint8).view(-1, 128).long()

settings = hf.TrainingArguments(
    arguments.folder,
    max_steps=arguments.steps,
    save_steps=arguments.steps,
    per_device_train_batch_size=16 // int(os.environ["WORLD_SIZE"]),
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=10,
    logging_steps=5,
    disable_tqdm=True,
    fsdp=True,
    fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},  # for any number of ranks
    use_cpu=not torch.cuda.is_available(),
)
if settings.use_cpu:  # Accelerate shards on no CPUs: these pass for GPUs.
    settings.distributed_state.distributed_type = DistributedType.MULTI_GPU
trainer = hf.Trainer(
    model,
    settings,
    train_dataset=[{"input_ids": line, "labels": line} for line in lines],
    # lr is AdamW's; that of TrainingArguments is not used.
    optimizer_cls_and_kwargs=(Shampoo, {"params": param_groups(model, 0.1), "lr": 3.3e-3}),
    callbacks=[PrintLoss],
)
trainer.train(resume_from_checkpoint=arguments.resume)
trainer.accelerator.end_training()  # leaves the process group: without it gloo may abort at exit
