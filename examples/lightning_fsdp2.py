"""torchrun --nproc_per_node 2 examples/lightning_fsdp2.py --folder outputs/lightning [--resume]"""

import argparse
import os
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from shampoo_fsdp import Shampoo, param_groups


class Block(nn.TransformerEncoderLayer):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.ones(64, 64, dtype=torch.bool).triu(1))


class Model(lightning.LightningModule):
    def configure_model(self) -> None:
        self.model = net = nn.Sequential()  # Shampoo knows its ends by name
        net.embeddings, net.first = nn.Embedding(256, 64), Block(64, 4, 256, 0.0)
        net.second, net.output = Block(64, 4, 256, 0.0), nn.Linear(64, 256)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
        for module in (net.first, net.second, net.output, net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"], mp_policy=policy)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = Shampoo(param_groups(self, weight_decay=0.1), lr=3.3e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 10, 1.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, text: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(text[:, :-1].T).permute(1, 2, 0), text[:, 1:])
        mean, step = self.trainer.strategy.reduce(loss.detach()), self.global_step + 1
        if step % 10 == 0 and self.trainer.is_global_zero:
            print(f"step {step}: loss {mean:.3f}")
        return loss


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--folder", default="outputs/lightning")
parser.add_argument("--resume", action="store_true", help="from the folder, on any number of ranks")
args = parser.parse_args()
ranks = int(os.environ["WORLD_SIZE"])
lightning.seed_everything(0)  # the same weights everywhere, of which fully_shard keeps a part
files = sorted(Path(argparse.__file__).parent.glob("*.py"))  # Python's own sources
data = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)
texts = DataLoader(data.unfold(0, 65, 64).long(), batch_size=32 // ranks, shuffle=True)
strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = lightning.Trainer(
    devices=ranks, strategy=strategy, max_steps=args.steps, gradient_clip_val=1.0, **quiet
)
trainer.fit(Model(), texts, ckpt_path=args.folder if args.resume else None)
trainer.save_checkpoint(args.folder)
