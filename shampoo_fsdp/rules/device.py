"""What settings are where they are not given: the device decides."""

import dataclasses

import torch

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.kernels.language import missing
from shampoo_fsdp.rules.precision import has_fast_bfloat16
from shampoo_fsdp.rules.roots import check_exponent

__all__ = ["on_device", "reasons"]


def on_device(config: ShampooConfig, device: torch.device) -> ShampooConfig:
    """The settings with `root_method`, `matmul_precision` and `root_dtype` filled in where they are
    None."""
    rule, cpu = config.rule, device.type == "cpu"
    method = config.root_method or rule.root_methods[0]
    if config.root_method is None and not cpu and rule.root_method_by_products:
        try:  # some exponents are refused
            method = rule.root_method_by_products
            products = dataclasses.replace(config, root_method=method)
            for exponent in filter(None, config.root_exponents):
                check_exponent(products.basis_method, -exponent)
        except ValueError:
            method = rule.root_methods[0]
    precision = config.matmul_precision or rule.matmul_precision
    if config.matmul_precision is None:
        # Only accelerators have TF32.
        fast = not cpu if precision == "high" else has_fast_bfloat16(device.type)
        precision = precision if fast else "highest"
    # Eigenvectors are what "qr" starts from again.
    rounded = precision == "medium" and rule.rounds_roots and method != "qr"
    return config.completed(
        root_method=method,
        matmul_precision=precision,
        root_dtype=config.root_dtype or ("bfloat16" if rounded else "float32"),
    )


def reasons(config: ShampooConfig, device: torch.device) -> str:
    """One line about what :func:`on_device` has filled in; "" where it was nothing."""
    filled = on_device(config, device)
    names = [n for n in ("root_method", "matmul_precision") if getattr(config, n) is None]
    if config.root_dtype is None and filled.root_dtype == "bfloat16":
        names.append("root_dtype")
    chosen = ", ".join(f"{name} = '{getattr(filled, name)}'" for name in names)
    return chosen and f"{chosen} (the default on {device.type})"


def kernels_used(config: ShampooConfig, device: torch.device) -> str:
    """Whose kernels a step takes on a GPU, and why; "" where there is no choice."""
    if device.type != "cuda":
        return ""
    lack = "kernels = 'off'" if config.kernels == "off" else missing(device)
    return f"PyTorch's kernels alone ({lack})" if lack else "kernels of its own"
