"""Whole training steps of a Llama on one device: forward, backward, clipping and the optimizer."""

import gc
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks import llama
from benchmarks.gpu_steps import alone
from benchmarks.rows import Row
from shampoo_fsdp.runtime.bucket import Stopwatch

_SEQUENCE = 2048
_WARM_UP = 3
_STEPS = 20  # timed, at least, in whole periods
_HEAD = 128


def measure_training(
    row: Row, sizes: llama.Sizes, device: str, tokens: int
) -> list[dict[str, Any]]:
    """Means over whole periods of refreshes: of a step and of the optimizer in it, the slowest step
    (milliseconds), tokens per second, and MB at the peak.

    Args:
        tokens: of a step, about; sequences have 2,048 of them, or as many as there are.

    Raises:
        ImportError: There is no `transformers`, whose Llama it is.
    """
    with alone(device):  # of what the measurement has made nothing is left at its end
        return [_measure(row, sizes, device, tokens)]


def _measure(row: Row, sizes: llama.Sizes, device: str, tokens: int) -> dict[str, Any]:
    model = _llama(sizes, device)
    optimizers = row.build(model)
    length = min(_SEQUENCE, tokens)
    batch = torch.randint(sizes.vocab, (tokens // length, length + 1), device=device)
    for _ in range(_WARM_UP):
        _step(model, optimizers, batch, Stopwatch(torch.device(device)))
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    watches = []
    for _ in range(-(-_STEPS // row.period) * row.period):
        watches.append(watch := Stopwatch(torch.device(device)))
        _step(model, optimizers, batch, watch)
    # Only now, so that the host may run ahead as in a training.
    laps = [watch.milliseconds() for watch in watches]
    steps = [sum(lap.values()) for lap in laps]
    return {
        "row": row.name,
        "tokens": len(batch) * length,
        "step_ms": statistics.fmean(steps),
        "optimizer_ms": statistics.fmean(lap["optimizer"] for lap in laps),
        "slowest_ms": max(steps),
        "tokens_per_second": 1e3 * len(batch) * length / statistics.fmean(steps),
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else None,
    }


def _llama(sizes: llama.Sizes, device: str) -> nn.Module:
    """FSDP2 with bf16 forward and backward, fp32 weights and gradients."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.dim,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.dim // _HEAD),
        vocab_size=sizes.vocab,
        use_cache=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    mesh = init_device_mesh(device, (1,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return model


def _step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Tensor, watch: Stopwatch
) -> None:
    watch.start()
    logits = model(input_ids=batch[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    watch.lap("forward and backward")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    watch.lap("optimizer")
