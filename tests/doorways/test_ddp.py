"""DDP in three frameworks, with the work shared: each saves as it always does, and goes on from it;
so does a program on one rank that has none of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_fsdp import Shampoo, param_groups
from tests.ranks import run_ranks

HALF, WHOLE = 3, 6
# The same sample again and again: the training does not depend on which rank sees what.
SAMPLE = {"x": torch.linspace(-1, 1, 12), "labels": torch.tensor(1)}
SETTINGS = {"lr": 1e-2, "max_preconditioner_dim": 8, "precondition_frequency": 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.second(self.first(x).tanh()).tanh()
        return {"loss": nn.functional.cross_entropy(self.head(hidden), labels)}


def without_a_framework(net: Net, state: dict[str, Any] | None, steps: int) -> dict[str, Tensor]:
    optimizer = Shampoo(param_groups(net, 0.1), **SETTINGS)
    if state is not None:
        optimizer.load_state_dict(state)
    for _ in range(steps):
        net(**{key: value[None] for key, value in SAMPLE.items()})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(net.state_dict())


def with_trainer(folder: Path, steps: int, resume: bool) -> Net:
    import transformers as hf

    class Consolidate(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if control.should_save:
                given["optimizer"].optimizer.consolidate_state_dict()

    settings = hf.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=HALF,
        per_device_train_batch_size=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    net = Net()
    keywords = {"params": param_groups(net, 0.1), "replicas": dist.group.WORLD, **SETTINGS}
    trainer = hf.Trainer(
        net,
        settings,
        train_dataset=[SAMPLE] * 64,
        optimizer_cls_and_kwargs=(Shampoo, keywords),
        callbacks=[Consolidate],
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return net


def with_accelerate(folder: Path, steps: int, resume: bool) -> Net:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = Net()
    optimizer = Shampoo(param_groups(net, 0.1), replicas=dist.group.WORLD, **SETTINGS)
    accelerator.register_save_state_pre_hook(lambda *_: optimizer.consolidate_state_dict())
    model, prepared = accelerator.prepare(net, optimizer)
    if resume:
        accelerator.load_state(str(folder))
    for _ in range(HALF if resume else 0, steps):
        loss = model(**{key: value[None] for key, value in SAMPLE.items()})["loss"]
        accelerator.backward(loss)
        prepared.step()
        prepared.zero_grad()
    if not resume:
        accelerator.save_state(str(folder), safe_serialization=False)
    return net


def with_lightning(folder: Path, steps: int, resume: bool) -> Net:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def configure_optimizers(self) -> Shampoo:
            return Shampoo(param_groups(self.net, 0.1), replicas=dist.group.WORLD, **SETTINGS)

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(**batch)["loss"]

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy="ddp",
        max_steps=steps,
        **dict.fromkeys(off, False),
    )
    module, data = Module(), torch.utils.data.DataLoader([SAMPLE] * 64)
    trainer.fit(module, data, ckpt_path=folder / "all.ckpt" if resume else None)
    if not resume:
        trainer.save_checkpoint(folder / "all.ckpt")
    return module.net


FRAMEWORKS = {
    "transformers": (with_trainer, f"checkpoint-{HALF}/optimizer.pt"),
    "accelerate": (with_accelerate, "optimizer.bin"),
    "lightning": (with_lightning, "all.ckpt"),
}


def on_each_rank(framework: str, folder: Path) -> list[dict[str, Tensor]]:
    train, _ = FRAMEWORKS[framework]
    nets = [train(folder, HALF, resume=False), train(folder, WHOLE, resume=True)]
    return [{name: value.detach() for name, value in net.state_dict().items()} for net in nets]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_it_saves_and_goes_on(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    results = run_ranks(2, on_each_rank, framework=framework, folder=tmp_path)
    expected = without_a_framework(Net(), None, WHOLE)
    for _, weights in results:
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)

    saved = torch.load(tmp_path / FRAMEWORKS[framework][1], weights_only=True)
    state = saved["optimizer_states"][0] if framework == "lightning" else saved
    net = Net()
    net.load_state_dict(results[0][0])
    weights = without_a_framework(net, state, WHOLE - HALF)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
