"""Shapes of well-known models, and how TorchTitan lays them out on a mesh."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shampoo_fsdp.plan.shards import ParameterSpec, Placement, Sharded

__all__ = ["MESH_DIMS", "MODELS", "model_specs"]

MESH_DIMS = ("dp_replicate", "dp_shard", "tp", "ep")
"""Dimensions of a mesh, outermost first; ep takes its ranks out of dp_shard and tp."""


@dataclass(frozen=True, kw_only=True)
class _Llama:
    dim: int
    hidden: int
    layers: int
    kv: int
    vocab: int = 128256


@dataclass(frozen=True, kw_only=True)
class _MoE:
    """DeepSeek-V3's: latent attention, a few dense layers, then experts."""

    dim: int = 7168
    hidden: int = 18432
    layers: int = 61
    dense_layers: int = 3
    experts: int = 256
    expert_hidden: int = 2048
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    vocab: int = 129280


MODELS: Mapping[str, _Llama | _MoE] = {
    "llama3-8b": _Llama(dim=4096, hidden=14336, layers=32, kv=1024),
    "llama3-70b": _Llama(dim=8192, hidden=28672, layers=80, kv=1024),
    "llama3-405b": _Llama(dim=16384, hidden=53248, layers=126, kv=1024),
    "deepseek-v3-like": _MoE(),
}

# The dimension of a weight [out, in] or of experts [E, out, in] that tensor parallelism cuts.
_COLUMN_WISE, _ROW_WISE, _WHOLE = 0, 1, None
_EXPERTS_COLUMN_WISE, _EXPERTS_ROW_WISE = 1, 2

_Named = Iterator[tuple[str, tuple[int, ...], int | None]]


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
        if dim not in MESH_DIMS:
            raise ValueError(f"unknown mesh dimension '{dim}'; there are {', '.join(MESH_DIMS)}.")
        if size < 1:
            raise ValueError(f"mesh dimension {dim} is {size}; it must be at least 1.")
    shape = MODELS[model]
    replicate, shard, tp, ep = (mesh.get(dim, 1) for dim in MESH_DIMS)
    experts = shape.experts if isinstance(shape, _MoE) else 0
    if ep > 1 and not experts:
        raise ValueError(f"{model} has no experts for ep = {ep}.")
    if (shard * tp) % ep or (experts and experts % ep):
        raise ValueError(
            f"ep = {ep} must divide dp_shard * tp = {shard * tp} and the {experts} experts."
        )
    named = _llama(shape) if isinstance(shape, _Llama) else _moe(shape)
    layout = _Layout(replicate, shard, tp, ep)
    return [layout.spec(*parameter) for parameter in named]


@dataclass(frozen=True)
class _Layout:
    replicate: int
    shard: int
    tp: int
    ep: int

    def spec(self, name: str, shape: tuple[int, ...], tp_dim: int | None) -> ParameterSpec:
        if len(shape) == 3 and self.ep > 1:
            mesh, placements = self._experts(shape[0])
        else:
            mesh, placements = self._dense(tp_dim)
        # A mesh dimension of one rank is none.
        kept = [(n, p) for n, p in zip(mesh, placements, strict=True) if n > 1]
        mesh, placements = tuple(n for n, _ in kept), tuple(p for _, p in kept)
        return ParameterSpec(name, shape, tuple(range(math.prod(mesh))), mesh, placements)

    def _dense(self, tp_dim: int | None) -> tuple[tuple[int, ...], tuple[Placement, ...]]:
        by_fsdp = Sharded(0)
        if tp_dim == 0 and self.tp > 1:
            by_fsdp = Sharded(0, split=self.tp)
        by_tp = None if tp_dim is None else Sharded(tp_dim)
        return (self.replicate, self.shard, self.tp), (None, by_fsdp, by_tp)

    def _experts(self, experts: int) -> tuple[tuple[int, ...], tuple[Placement, ...]]:
        shards = self.shard * self.tp // self.ep
        by_fsdp = Sharded(0, split=self.ep)
        if shards * self.ep > experts:
            by_fsdp = Sharded(1)  # too few experts: FSDP cuts each of them
        return (self.replicate, shards, self.ep), (None, by_fsdp, Sharded(0))


def _llama(s: _Llama) -> _Named:
    yield "tok_embeddings.weight", (s.vocab, s.dim), _COLUMN_WISE
    for i in range(s.layers):
        layer = f"layers.{i}"
        yield f"{layer}.attention.wq.weight", (s.dim, s.dim), _COLUMN_WISE
        yield f"{layer}.attention.wk.weight", (s.kv, s.dim), _COLUMN_WISE
        yield f"{layer}.attention.wv.weight", (s.kv, s.dim), _COLUMN_WISE
        yield f"{layer}.attention.wo.weight", (s.dim, s.dim), _ROW_WISE
        yield from _feed_forward(f"{layer}.feed_forward", s.dim, s.hidden)
        yield f"{layer}.attention_norm.weight", (s.dim,), _WHOLE
        yield f"{layer}.ffn_norm.weight", (s.dim,), _WHOLE
    yield "norm.weight", (s.dim,), _WHOLE
    yield "output.weight", (s.vocab, s.dim), _COLUMN_WISE


def _moe(s: _MoE) -> _Named:
    yield "tok_embeddings.weight", (s.vocab, s.dim), _COLUMN_WISE
    for i in range(s.layers):
        layer = f"layers.{i}"
        query, value = s.heads * (s.nope + s.rope), s.heads * s.nope
        yield f"{layer}.attention.wq_a.weight", (s.q_rank, s.dim), _WHOLE
        yield f"{layer}.attention.wq_b.weight", (query, s.q_rank), _COLUMN_WISE
        yield f"{layer}.attention.wkv_a.weight", (s.kv_rank + s.rope, s.dim), _WHOLE
        yield f"{layer}.attention.wkv_b.weight", (2 * value, s.kv_rank), _COLUMN_WISE
        yield f"{layer}.attention.wo.weight", (s.dim, value), _ROW_WISE
        yield f"{layer}.attention.q_norm.weight", (s.q_rank,), _WHOLE
        yield f"{layer}.attention.kv_norm.weight", (s.kv_rank,), _WHOLE
        yield f"{layer}.attention_norm.weight", (s.dim,), _WHOLE
        yield f"{layer}.ffn_norm.weight", (s.dim,), _WHOLE
        if i < s.dense_layers:
            yield from _feed_forward(f"{layer}.feed_forward", s.dim, s.hidden)
            continue
        up, down = (s.experts, s.expert_hidden, s.dim), (s.experts, s.dim, s.expert_hidden)
        yield f"{layer}.moe.router.gate.weight", (s.experts, s.dim), _WHOLE
        yield f"{layer}.moe.experts.w1", up, _EXPERTS_COLUMN_WISE
        yield f"{layer}.moe.experts.w2", down, _EXPERTS_ROW_WISE
        yield f"{layer}.moe.experts.w3", up, _EXPERTS_COLUMN_WISE
        yield from _feed_forward(f"{layer}.moe.shared_experts", s.dim, s.expert_hidden)
    yield "norm.weight", (s.dim,), _WHOLE
    yield "output.weight", (s.vocab, s.dim), _COLUMN_WISE


def _feed_forward(name: str, dim: int, hidden: int) -> _Named:
    yield f"{name}.w1.weight", (hidden, dim), _COLUMN_WISE
    yield f"{name}.w2.weight", (dim, hidden), _ROW_WISE
    yield f"{name}.w3.weight", (hidden, dim), _COLUMN_WISE
