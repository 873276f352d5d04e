"""Prints which kernels of our own a step launches in Triton's interpreter, and which one of the dry
run does: the names, grids and costs of both, as JSON. TRITON_INTERPRET=1 has to be set."""

import importlib
import json
import pkgutil
from unittest import mock

import torch

import shampoo_fsdp.kernels
from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.kernels import language
from shampoo_fsdp.runtime.parameters import describe
from shampoo_fsdp.tools.dry_step import dry_optimizer, dry_step
from shampoo_fsdp.tools.machine import Machine
from tests.models import TinyLlama, deterministic_gradients, set_gradients

_SETTINGS = {
    "max_preconditioner_dim": 64,
    "precondition_frequency": 1,
    "refresh_warmup_steps": 0,
    # A GPU's defaults.
    "root_method": "polynomial",
    "matmul_precision": "medium",
    "root_dtype": "bfloat16",
}


def main() -> None:
    """Both, in order of names."""
    launched = []
    launch = language.launch

    def recorded(kernel, grid, arguments, moved, flops=0, **cut):
        launched.append((kernel.__name__, list(grid), [moved, flops]))
        launch(kernel, grid, arguments, moved, flops, **cut)

    for module in pkgutil.iter_modules(shampoo_fsdp.kernels.__path__):
        kernels = importlib.import_module(f"shampoo_fsdp.kernels.{module.name}")
        if module.name != "language" and hasattr(kernels, "launch"):
            mock.patch.object(kernels, "launch", recorded).start()
    torch.manual_seed(0)
    model = TinyLlama(dim=32, hidden=64, vocab=48, n_layers=2)
    optimizer = Shampoo(model.named_parameters(), **_SETTINGS)
    for step in range(3):  # the last one has roots
        launched.clear()
        set_gradients(model, deterministic_gradients(model, step))
        optimizer.step()
    real = sorted(launched)
    specs = [describe(name, p, None) for name, p in model.named_parameters()]
    with dry_optimizer(specs, ShampooConfig(**_SETTINGS), 0) as dry:
        launched.clear()
        dry_step(dry, Machine())
    print(json.dumps([real, sorted(launched)]))


if __name__ == "__main__":
    main()
