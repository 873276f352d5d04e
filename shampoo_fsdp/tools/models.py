"""Shapes of models, well-known ones and one's own, and how TorchTitan lays them out on a mesh."""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shampoo_fsdp.plan.shards import ParameterSpec, Placement, Sharded

MESH_DIMS = ("pp", "dp_replicate", "dp_shard", "tp", "ep")
"""Dimensions of a mesh, outermost first; ep takes its ranks out of dp_shard and tp."""

_OF_ANY_MODULE = MESH_DIMS[:3]

# The dimension of a weight [out, in] or of experts [E, out, in] that tensor parallelism cuts.
_COLUMN_WISE, _ROW_WISE, _WHOLE = 0, 1, None
_EXPERTS_COLUMN_WISE, _EXPERTS_ROW_WISE = 1, 2

Parameters = dict[str, tuple[tuple[int, ...], int | None]]
"""By name the shape and that dimension."""


def _llama3(*, layers: int, dim: int, hidden: int, kv: int) -> Parameters:
    layer: Parameters = {
        "attention.wq.weight": ((dim, dim), _COLUMN_WISE),
        "attention.wk.weight": ((kv, dim), _COLUMN_WISE),
        "attention.wv.weight": ((kv, dim), _COLUMN_WISE),
        "attention.wo.weight": ((dim, dim), _ROW_WISE),
        **_feed_forward("feed_forward", dim, hidden),
        "attention_norm.weight": ((dim,), _WHOLE),
        "ffn_norm.weight": ((dim,), _WHOLE),
    }
    return _model([layer] * layers, dim, vocab=128256)


def _deepseek_v3() -> Parameters:
    """Latent attention; a few dense layers, then experts."""
    dim, experts, expert_hidden = 7168, 256, 2048
    heads, q_rank, kv_rank, nope, rope = 128, 1536, 512, 128, 64
    query, value = heads * (nope + rope), heads * nope
    up, down = (experts, expert_hidden, dim), (experts, dim, expert_hidden)
    attention: Parameters = {
        "attention.wq_a.weight": ((q_rank, dim), _WHOLE),
        "attention.wq_b.weight": ((query, q_rank), _COLUMN_WISE),
        "attention.wkv_a.weight": ((kv_rank + rope, dim), _WHOLE),
        "attention.wkv_b.weight": ((2 * value, kv_rank), _COLUMN_WISE),
        "attention.wo.weight": ((dim, value), _ROW_WISE),
        "attention.q_norm.weight": ((q_rank,), _WHOLE),
        "attention.kv_norm.weight": ((kv_rank,), _WHOLE),
        "attention_norm.weight": ((dim,), _WHOLE),
        "ffn_norm.weight": ((dim,), _WHOLE),
    }
    moe: Parameters = {
        "moe.router.gate.weight": ((experts, dim), _WHOLE),
        "moe.experts.w1": (up, _EXPERTS_COLUMN_WISE),
        "moe.experts.w2": (down, _EXPERTS_ROW_WISE),
        "moe.experts.w3": (up, _EXPERTS_COLUMN_WISE),
        **_feed_forward("moe.shared_experts", dim, expert_hidden),
    }
    dense = _feed_forward("feed_forward", dim, 18432)
    return _model([attention | dense] * 3 + [attention | moe] * 58, dim, vocab=129280)


def _feed_forward(name: str, dim: int, hidden: int) -> Parameters:
    return {
        f"{name}.w1.weight": ((hidden, dim), _COLUMN_WISE),
        f"{name}.w2.weight": ((dim, hidden), _ROW_WISE),
        f"{name}.w3.weight": ((hidden, dim), _COLUMN_WISE),
    }


def _model(layers: Sequence[Parameters], dim: int, vocab: int) -> Parameters:
    numbered = {
        f"layers.{i}.{name}": kind for i, layer in enumerate(layers) for name, kind in layer.items()
    }
    return {
        "tok_embeddings.weight": ((vocab, dim), _COLUMN_WISE),
        **numbered,
        "norm.weight": ((dim,), _WHOLE),
        "output.weight": ((vocab, dim), _COLUMN_WISE),
    }


MODELS: Mapping[str, Parameters] = {
    "llama3-8b": _llama3(layers=32, dim=4096, hidden=14336, kv=1024),
    "llama3-70b": _llama3(layers=80, dim=8192, hidden=28672, kv=1024),
    "llama3-405b": _llama3(layers=126, dim=16384, hidden=53248, kv=1024),
    "deepseek-v3-like": _deepseek_v3(),
}


def model_specs(model: str, mesh: Mapping[str, int]) -> list[ParameterSpec]:
    """The parameters of a model as TorchTitan's FSDP2, HSDP, TP and EP lay them out.

    Args:
        model: one of MODELS.
        mesh: size of each of MESH_DIMS; one that is missing is 1.

    Raises:
        ValueError: an unknown model or dimension, or sizes that cannot be.
    """
    return [spec for stage in stages_of(model, mesh) for spec in stage]


def stages_of(
    model: str, mesh: Mapping[str, int], parameters: Parameters | None = None
) -> list[list[ParameterSpec]]:
    """The parameters of each stage of a pipeline, which share the layers evenly; one list without
    one. Embeddings are in the first stage, what follows the layers is in the last.

    Args:
        model: one of MODELS, or a name for the parameters.
        mesh: size of each of MESH_DIMS; one that is missing is 1.
        parameters: see :func:`parameters_of`; how tp and ep would cut them is not known.

    Raises:
        ValueError: an unknown model or dimension, or sizes that cannot be.
    """
    known = _OF_ANY_MODULE if parameters else MESH_DIMS
    if parameters is None:
        if model not in MODELS:
            raise ValueError(f"unknown model '{model}'; there are {', '.join(MODELS)}.")
        parameters = MODELS[model]
    for dim, size in mesh.items():
        if dim not in known or size < 1:
            raise ValueError(
                f"mesh dimension '{dim}' of {size} cannot be; there are {', '.join(known)}."
            )
    sizes = [mesh.get(dim, 1) for dim in MESH_DIMS]
    stages, _, shard, tp, ep = sizes
    experts = max((shape[0] for shape, _ in parameters.values() if len(shape) == 3), default=0)
    if ep > 1 and (not experts or shard * tp % ep or experts % ep):
        raise ValueError(
            f"ep = {ep} must divide dp_shard * tp = {shard * tp} and the {experts} experts of "
            f"{model}."
        )
    numbers = {name: int(found[1]) for name in parameters if (found := _LAYER.search(name))}
    layers = sorted(set(numbers.values()))
    if stages > max(len(layers), 1):
        raise ValueError(f"pp = {stages} stages cannot share the {len(layers)} layers of {model}.")
    result: list[list[ParameterSpec]] = [[] for _ in range(stages)]
    outside = 0
    for name, (shape, tp_dim) in parameters.items():
        stage = outside
        if name in numbers:
            stage = layers.index(numbers[name]) * stages // len(layers)
            outside = stages - 1
        result[stage].append(_spec(name, shape, tp_dim, sizes[1:], stage))
    return result


_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def parameters_of(module: nn.Module) -> Parameters:
    """Those of a module that are trained."""
    named = module.named_parameters()
    return {
        n: (tuple(parameter.shape), _WHOLE) for n, parameter in named if parameter.requires_grad
    }


def hugging_face_model(path: str) -> nn.Module:
    """The language model of a config.json, without memory.

    Raises:
        ValueError: transformers is not installed, or does not know what the file describes.
    """
    if not Path(path).is_file():
        raise ValueError(f"--hf '{path}': there is no such file; give a model's config.json.")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            "--hf reads the config by transformers: pip install transformers"
        ) from None
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            return model
    except (KeyError, OSError, ValueError) as error:
        (line, *_) = str(error).splitlines() or [""]
        raise ValueError(
            f"--hf '{path}': transformers makes no language model of it: {line}"
        ) from None


def module_of(text: str) -> nn.Module:
    """What a function of a file returns, without memory.

    Raises:
        ValueError: as :func:`function_of`, or it returns another thing.
    """
    with torch.device("meta"):
        module = function_of("--module", text)()
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"--module '{text}' returns {type(module).__name__}, not a torch.nn.Module."
        )
    return module


def function_of(option: str, text: str) -> Callable[[], Any]:
    """The function of a file that an option names as FILE.py:FUNCTION.

    Raises:
        ValueError: there is no such file or function.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not (name and path.is_file()):
        raise ValueError(f"{option} '{text}': write FILE.py:FUNCTION, a file that exists.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{option} '{text}': {path.name} has no function '{name}'.")
    return function  # type: ignore[no-any-return]


def _spec(
    name: str, shape: tuple[int, ...], tp_dim: int | None, mesh_sizes: Sequence[int], stage: int
) -> ParameterSpec:
    replicate, shard, tp, ep = mesh_sizes
    layout: list[tuple[int, Placement]]
    if len(shape) == 3 and ep > 1:
        shards = shard * tp // ep
        # With too few experts FSDP cuts each of them.
        by_fsdp = Sharded(1) if shards * ep > shape[0] else Sharded(0, split=ep)
        layout = [(replicate, None), (shards, by_fsdp), (ep, Sharded(0))]
    else:
        by_fsdp = Sharded(0, split=tp if tp_dim == 0 else 1)
        by_tp = None if tp_dim is None else Sharded(tp_dim)
        layout = [(replicate, None), (shard, by_fsdp), (tp, by_tp)]
    layout = [(n, p) for n, p in layout if n > 1]  # a mesh dimension of one rank is none
    mesh, placements = tuple(n for n, _ in layout), tuple(p for _, p in layout)
    ranks = range(stage * math.prod(mesh), (stage + 1) * math.prod(mesh))
    return ParameterSpec(name, shape, tuple(ranks), mesh, placements)
