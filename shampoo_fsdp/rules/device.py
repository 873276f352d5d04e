"""What settings are where they are not given: the device decides."""

import dataclasses

import torch

from shampoo_fsdp.config import ShampooConfig
from shampoo_fsdp.rules.precision import MatmulPrecision, has_fast_bfloat16
from shampoo_fsdp.rules.roots import check_exponent
from shampoo_fsdp.rules.rule import Rule, rule_of

__all__ = ["on_device", "reasons"]


def on_device(config: ShampooConfig, device: torch.device) -> ShampooConfig:
    """The settings with `root_method`, `matmul_precision` and `root_dtype` filled in where they are
    None."""
    rule = rule_of(config)
    method = config.root_method or _root_method(rule, config, device)
    precision = config.matmul_precision or _matmul_precision(rule, device)
    # Eigenvectors are what "qr" starts from again.
    rounded = precision == "medium" and rule.rounds_roots and method != "qr"
    return config.completed(
        root_method=method,
        matmul_precision=precision,
        root_dtype=config.root_dtype or ("bfloat16" if rounded else "float32"),
    )


def reasons(config: ShampooConfig, device: torch.device) -> str:
    """One line about what :func:`on_device` has filled in, and why; "" where it was nothing."""
    rule, filled, said = rule_of(config), on_device(config, device), []
    products = rule.root_method_by_products
    if config.root_method is None:
        why = f"the default on {device.type}"
        if device.type != "cpu" and products and filled.root_method != products:
            why = f"'{products}' cannot take the roots of these settings"
        said.append(f"root_method = '{filled.root_method}' ({why})")
    if config.matmul_precision is None:
        fast = "fast" if has_fast_bfloat16(device.type) else "no fast"
        why = f"{fast} bf16 products on {device.type}"
        said.append(f"matmul_precision = '{filled.matmul_precision}' ({why})")
    if config.root_dtype is None and filled.root_dtype == "bfloat16":
        said.append("root_dtype = 'bfloat16' (products round roots to it)")
    return "; ".join(said)


def _root_method(rule: type[Rule], config: ShampooConfig, device: torch.device) -> str:
    products = rule.root_method_by_products
    if device.type == "cpu" or products is None:
        return rule.root_methods[0]
    try:
        dataclasses.replace(config, root_method=products)  # bf16 factors are refused, for example
        for exponent in config.root_exponents:
            if exponent:
                check_exponent(products, -exponent)
    except ValueError:
        return rule.root_methods[0]
    return products


def _matmul_precision(rule: type[Rule], device: torch.device) -> MatmulPrecision:
    if rule.matmul_precision == "high":  # only accelerators have TF32
        return "highest" if device.type == "cpu" else "high"
    return rule.matmul_precision if has_fast_bfloat16(device.type) else "highest"
