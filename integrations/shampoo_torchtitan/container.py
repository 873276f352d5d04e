"""What TorchTitan's containers of optimizers can do where Shampoo is in them."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.tools.logging import logger

from shampoo_fsdp import Shampoo, ShampooConfig
from shampoo_fsdp.rules.layout import MARKER
from shampoo_fsdp.runtime.choice import exactly
from shampoo_fsdp.runtime.groups import FromModel

ADAM = ("Adam", "AdamW")
"""Optimizers whose place Shampoo takes, by name."""

# What groups of AdamW have beside ours: TorchTitan asks every checkpoint for all of them, so that a
# job of AdamW can go on from one of Shampoo.
_OF_ADAMW = {
    **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False),
    "decoupled_weight_decay": True,
}


class JobError(ValueError):
    """Why a job cannot begin or go on, in a sentence; raised on every rank."""


@contextlib.contextmanager
def alike_on_all_ranks(
    failed: str = "Cannot build the optimizer: ", *told: type[Exception]
) -> Iterator[None]:
    """What is refused on one rank, as by the parameters of a stage of a pipeline, is on all.

    Args:
        failed: How the error begins.
        told: Types of errors that are told in a sentence; by default those about settings.

    Raises:
        JobError: On every rank, if what is within raises on any; an error of another type stays
            itself where it happened.
    """
    told = told or (NotImplementedError, TypeError, ValueError)
    problem, cause = None, None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem, cause = str(error) or repr(error), error
    if dist.is_initialized():
        everyone = [problem] * dist.get_world_size()
        dist.all_gather_object(everyone, problem)
        problem = next((theirs for theirs in everyone if theirs is not None), None)
    if cause is not None and not isinstance(cause, told):
        raise cause
    if problem is not None:
        raise JobError(f"{failed}{problem}") from cause


def with_heads(config: ShampooConfig, model_parts: Sequence[nn.Module]) -> ShampooConfig:
    """The settings, with the rows of a head as the model's attention has them, if `split_heads`
    asks for them and they are not given.

    Raises:
        ValueError: The model has heads of several sizes.
    """
    if not config.split_heads or config.head_dim is not None:
        return config
    modules = (module for part in model_parts for module in part.modules())
    sizes = {getattr(module, "head_dim", None) for module in modules}
    found = sorted(size for size in sizes if isinstance(size, int))
    if len(found) > 1:
        raise ValueError(f"'split_heads' without 'head_dim', and heads of {found} rows: set it.")
    return config.completed(head_dim=found[0]) if found else config


def hyperparameters(table: Any) -> dict[str, Any]:
    """lr, betas, eps and weight_decay as Shampoo takes them, of a job's table of the optimizer."""
    return {
        "lr": table.lr,
        "betas": (table.beta1, table.beta2),
        "eps": table.eps,
        "weight_decay": table.weight_decay,
    }


def without_others(
    own: ShampooConfig, listed: Sequence[Any], ours: Sequence[Any], names: Sequence[str]
) -> ShampooConfig:
    """Shampoo's settings, with what other optimizers have excluded.

    Args:
        listed: What a job lists, each with a pattern; the first that matches counts.
        ours: Those of Shampoo.
        names: Of all parameters.
    """
    first = {
        name: next((of for of in listed if re.search(of.pattern, name)), None) for name in names
    }
    others = [name for name, of in first.items() if of not in ours]
    return own.completed(exclude=[*own.exclude, *map(exactly, others)])


def shampoos_of(container: Any) -> list[Shampoo]:
    """One for each part of the model and each of its configurations; others may be beside them."""
    optimizers = getattr(container, "optimizers", ())
    return [optimizer for optimizer in optimizers if isinstance(optimizer, Shampoo)]


def with_lr_factors(container: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A flat state dict with each group's `lr_factor`, which TorchTitan asks for: where there is
    none it is the job's for what AdamW had, and 1 for what Shampoo had from before it."""
    of_before = any(key.endswith(f".{MARKER}") for key in state_dict) and not any(
        key.endswith(".lr_factor") for key in state_dict
    )
    own = {
        f"param_groups.{name}.lr_factor": 1.0 if of_before else group["lr_factor"]
        for optimizer in shampoos_of(container)
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    return own | state_dict


def named(group: Mapping[str, Any], kinds: Mapping[Tensor, type[FromModel]]) -> dict[str, Any]:
    """A group of parameters and 'param_names' as Shampoo takes it, with what is known of them.

    Args:
        kinds: Whether a parameter is one of an embedding.
    """
    pairs = zip(group["param_names"], group["params"], strict=True)
    kept = {key: value for key, value in group.items() if key != "param_names"}
    return kept | {"params": [kinds[parameter](name, parameter) for name, parameter in pairs]}


def complete_groups(shampoo: Shampoo, **implementation: bool | None) -> None:
    """Adds what groups of AdamW, of this implementation, have beside."""
    for group in shampoo.param_groups:
        group.update(_OF_ADAMW | implementation)


def log_summary(shampoos: Sequence[Shampoo]) -> None:
    """Says what is preconditioned, and what each rank pays for it."""
    for number, optimizer in enumerate(shampoos):
        which = f" ({number + 1} of {len(shampoos)})" if len(shampoos) > 1 else ""
        s = optimizer.summary()
        share = s["elements_preconditioned"] / max(s["elements_total"], 1)
        told = [
            f"preconditions {s['parameters_preconditioned']:,} of {s['parameters_total']:,} "
            f"parameters ({share:.1%} of the elements) in {s['blocks']:,} blocks"
        ]
        if optimizer.chosen_by_device:
            told.append(f"chose {optimizer.chosen_by_device}")
        if matrices := optimizer.matrices_left_to_grafting():
            method = optimizer.config.elementwise_method
            told.append(f"leaves to the method '{method}': {', '.join(matrices)}, and vectors")
        told.append(
            f"per rank: largest load {s['load_max_over_mean']:.2f} x the mean; at most "
            f"{s['state_mib_max']:,.1f} MiB of state, and {s['mib_sent_per_step_max']:,.1f} "
            "MiB sent per step"
        )
        for line in told:
            logger.info(f"Shampoo{which} {line}")
