"""A training of a small Llama of TorchTitan 0.3 on the source of Python, byte by byte."""

import shampoo_torchtitan.train  # noqa: F401  first: it makes TorchTitan run without a GPU

# isort: split

import functools
import itertools
import math
import sysconfig
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.models.common.attention import ScaledDotProductAttention

from shampoo_fsdp import Shampoo
from shampoo_torchtitan.demo.data import python_source
from shampoo_torchtitan.demo.models_03 import llama
from studies.pretrain.results import versions

_LENGTH, _BATCH = 128, 16
_HELD_OUT_BYTES = 65_536
_BEGIN, _END = 256, 257


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a run: held-out losses in nats per byte at each eighth, versions, seconds.

    Args:
        settings: "model" (arguments of `llama`), "steps", "lr", "seed", and "shampoo", keywords of
            the optimizer.
    """
    steps, lr = settings["steps"], settings["lr"]
    model = _model(settings["model"], settings["seed"])
    optimizer = Shampoo(
        model.named_parameters(),
        lr=lr,
        lr_factor=1.0,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        excluded_lr_factor=0.5,
        **settings["shampoo"],
    )
    warmup = max(1, steps // 8 if steps <= 480 else steps // 20)  # as in studies.arithmetic
    batches = _batches(settings["seed"])
    record: dict[str, Any] = {"step": [], "loss": []}
    start = time.perf_counter()
    for step in range(steps):
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup) * decay
        optimizer.zero_grad()
        _loss(model, next(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 8) == 0 or step + 1 == steps:
            record["step"].append(step + 1)
            record["loss"].append(round(_held_out_loss(model), 4))
    seconds = round(time.perf_counter() - start, 1)
    return {**record, "seconds": seconds, "versions": versions()}


def _model(sizes: dict[str, Any], seed: int) -> nn.Module:
    """Fused or not, the same weights for the same seed."""
    config = llama(**sizes, attn_backend="varlen")
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    torch.manual_seed(seed)
    model: nn.Module = config.build()
    with torch.no_grad():
        model.init_states()
    return model


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def _held_out_loss(model: nn.Module) -> float:
    windows = _windows(validation=True)
    chosen = torch.linspace(0, len(windows) - 1, _HELD_OUT_BYTES // _LENGTH).long()
    parts = windows[chosen].split(64)
    return sum(_loss(model, part).item() * len(part) for part in parts) / len(chosen)


def _batches(seed: int) -> Iterator[Tensor]:
    windows, generator = _windows(validation=False), torch.Generator().manual_seed(seed)
    whole = len(windows) // _BATCH * _BATCH
    while True:
        order = torch.randperm(len(windows), generator=generator)[:whole]
        yield from (windows[chosen] for chosen in order.split(_BATCH))


@functools.cache
def _windows(validation: bool) -> Tensor:
    """[n, length + 1] of files that nothing is trained on, or of all others."""
    texts = python_source(sysconfig.get_paths()["stdlib"], validation)["text"]
    pieces = [[_BEGIN, *text.encode(), _END] for text in texts]
    return torch.tensor(list(itertools.chain(*pieces))).unfold(0, _LENGTH + 1, _LENGTH)
