"""Shapes of well-known models, and how TorchTitan lays them out on a mesh."""

import math
from collections.abc import Mapping, Sequence

from shampoo_fsdp.plan.shards import ParameterSpec, Placement, Sharded

MESH_DIMS = ("dp_replicate", "dp_shard", "tp", "ep")
"""Dimensions of a mesh, outermost first; ep takes its ranks out of dp_shard and tp."""

# The dimension of a weight [out, in] or of experts [E, out, in] that tensor parallelism cuts.
_COLUMN_WISE, _ROW_WISE, _WHOLE = 0, 1, None
_EXPERTS_COLUMN_WISE, _EXPERTS_ROW_WISE = 1, 2

_Parameters = dict[str, tuple[tuple[int, ...], int | None]]
"""By name the shape and that dimension."""


def _llama3(*, layers: int, dim: int, hidden: int, kv: int) -> _Parameters:
    layer: _Parameters = {
        "attention.wq.weight": ((dim, dim), _COLUMN_WISE),
        "attention.wk.weight": ((kv, dim), _COLUMN_WISE),
        "attention.wv.weight": ((kv, dim), _COLUMN_WISE),
        "attention.wo.weight": ((dim, dim), _ROW_WISE),
        **_feed_forward("feed_forward", dim, hidden),
        "attention_norm.weight": ((dim,), _WHOLE),
        "ffn_norm.weight": ((dim,), _WHOLE),
    }
    return _model([layer] * layers, dim, vocab=128256)


def _deepseek_v3() -> _Parameters:
    """Latent attention; a few dense layers, then experts."""
    dim, experts, expert_hidden = 7168, 256, 2048
    heads, q_rank, kv_rank, nope, rope = 128, 1536, 512, 128, 64
    query, value = heads * (nope + rope), heads * nope
    up, down = (experts, expert_hidden, dim), (experts, dim, expert_hidden)
    attention: _Parameters = {
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
    moe: _Parameters = {
        "moe.router.gate.weight": ((experts, dim), _WHOLE),
        "moe.experts.w1": (up, _EXPERTS_COLUMN_WISE),
        "moe.experts.w2": (down, _EXPERTS_ROW_WISE),
        "moe.experts.w3": (up, _EXPERTS_COLUMN_WISE),
        **_feed_forward("moe.shared_experts", dim, expert_hidden),
    }
    dense = _feed_forward("feed_forward", dim, 18432)
    return _model([attention | dense] * 3 + [attention | moe] * 58, dim, vocab=129280)


def _feed_forward(name: str, dim: int, hidden: int) -> _Parameters:
    return {
        f"{name}.w1.weight": ((hidden, dim), _COLUMN_WISE),
        f"{name}.w2.weight": ((dim, hidden), _ROW_WISE),
        f"{name}.w3.weight": ((hidden, dim), _COLUMN_WISE),
    }


def _model(layers: Sequence[_Parameters], dim: int, vocab: int) -> _Parameters:
    numbered = {
        f"layers.{i}.{name}": kind for i, layer in enumerate(layers) for name, kind in layer.items()
    }
    return {
        "tok_embeddings.weight": ((vocab, dim), _COLUMN_WISE),
        **numbered,
        "norm.weight": ((dim,), _WHOLE),
        "output.weight": ((vocab, dim), _COLUMN_WISE),
    }


MODELS: Mapping[str, _Parameters] = {
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
    if model not in MODELS:
        raise ValueError(f"unknown model '{model}'; there are {', '.join(MODELS)}.")
    for dim, size in mesh.items():
        if dim not in MESH_DIMS or size < 1:
            known = ", ".join(MESH_DIMS)
            raise ValueError(f"mesh dimension '{dim}' of {size} cannot be; there are {known}.")
    parameters = MODELS[model]
    sizes = [mesh.get(dim, 1) for dim in MESH_DIMS]
    _, shard, tp, ep = sizes
    experts = max((shape[0] for shape, _ in parameters.values() if len(shape) == 3), default=0)
    if ep > 1 and (not experts or shard * tp % ep or experts % ep):
        raise ValueError(
            f"ep = {ep} must divide dp_shard * tp = {shard * tp} and the {experts} experts of "
            f"{model}."
        )
    return [_spec(name, shape, tp_dim, sizes) for name, (shape, tp_dim) in parameters.items()]


def _spec(
    name: str, shape: tuple[int, ...], tp_dim: int | None, mesh_sizes: Sequence[int]
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
    return ParameterSpec(name, shape, tuple(range(math.prod(mesh))), mesh, placements)
