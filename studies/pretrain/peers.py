"""Peers' own optimizers of matrices, as they are; their code must be on the path.

| code | from | where |
|---|---|---|
| meta_kl_shampoo, meta_soap | facebookresearch/optimizers | a clone |
| heavyball_kl_shampoo, heavyball_soap | heavyball | the package index |
| nvidia_kl_soap | NVIDIA-NeMo/Emerging-Optimizers | a clone, with Python 3.12 |
| tilde_kl_shampoo | tilde-research/online-kl-shampoo-release | a clone |

Settings that a job has are the job's; all others are the peer's defaults, but for blocks and how
often roots are taken, which Meta's leaves to the user and which are ours: 1024 and 10.
"""

import importlib
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def build(code: str, config: Any, parameters: list[nn.Parameter]) -> Optimizer:
    """Make the optimizer of these matrices.

    Args:
        code: one of BUILDERS.
        config: TorchTitan's `[optimizer]`.
    """
    if code not in BUILDERS:
        raise ValueError(f"optimizer.peer.code = {code!r}; allowed are {', '.join(BUILDERS)}.")
    optimizer, own = BUILDERS[code](config)
    betas = {"betas": (config.beta1, config.beta2)}
    built: Optimizer = optimizer(
        parameters, lr=config.lr, weight_decay=config.weight_decay, **betas | own
    )
    return built


_Found = tuple[Callable[..., Any], dict[str, Any]]
"""An optimizer, and the arguments that not all of them have."""


def _meta(method: str, config: Any) -> _Found:
    meta = importlib.import_module("distributed_shampoo")
    soap = "SOAP" in method
    adam = meta.AdamPreconditionerConfig(beta2=config.beta2, epsilon=config.eps)
    return meta.DistributedShampoo, {
        # Its SOAP uses this one as Adam's; the others as the ridge.
        "epsilon": config.eps if soap else 1e-12,
        "weight_decay_type": meta.WeightDecayType.DECOUPLED,
        "max_preconditioner_dim": 1024,
        "precondition_frequency": 10,
        "grafting_config": None if soap else adam,
        "preconditioner_config": meta.DefaultSOAPConfig if soap else getattr(meta, method)(),
    }


def _heavyball(name: str, config: Any) -> _Found:
    heavyball = importlib.import_module("heavyball")
    heavyball.utils.compile_mode = None

    def make(parameters: Any, **settings: Any) -> Any:
        optimizer = getattr(heavyball, name)(parameters, **settings)
        # Flat state dicts have no sets and lists. (Its checkpoints cannot be loaded in any form.)
        optimizer.register_state_dict_post_hook(
            lambda _, given: given | {"state": _as_dicts(given["state"])}
        )
        return optimizer

    return make, {"eps": config.eps}


def _as_dicts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_dicts(v) for name, v in value.items()}
    if isinstance(value, list | set):
        return dict(enumerate(map(_as_dicts, value)))
    return value


def _nvidia(config: Any) -> _Found:
    soap = importlib.import_module("emerging_optimizers.shampoo.soap_v3")
    return soap.KlSoapV3, {"eps": config.eps}


def _tilde(config: Any) -> _Found:
    okls = importlib.import_module("okls")
    roots = importlib.import_module("okls.scaled_cans_coupled_ns")
    roots.torch = types.SimpleNamespace(**vars(torch) | {"baddbmm": _baddbmm})

    def make(parameters: Any, *, betas: tuple[float, float], **settings: Any) -> Any:
        return okls.OnlineKLShampoo(parameters, beta1=betas[0], beta2=betas[1], **settings)

    return make, {}


def _baddbmm(start: Tensor, a: Tensor, b: Tensor, out_dtype: Any = None, **factors: Any) -> Tensor:
    """Of fp16 with sums in fp32, also on CPUs, where PyTorch has none."""
    result = torch.baddbmm(start.float(), a.float(), b.float(), **factors)
    return result.to(out_dtype or a.dtype)


BUILDERS: dict[str, Callable[[Any], _Found]] = {
    "meta_kl_shampoo": partial(_meta, "RootInvKLShampooPreconditionerConfig"),
    "meta_soap": partial(_meta, "DefaultSOAPConfig"),
    "heavyball_kl_shampoo": partial(_heavyball, "KLShampoo"),
    "heavyball_soap": partial(_heavyball, "SOAP"),
    "nvidia_kl_soap": _nvidia,
    "tilde_kl_shampoo": _tilde,
}
