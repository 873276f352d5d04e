"""A MoE model small enough for the CPU: `deepseek_v3`, flavor `tiny`."""

import dataclasses
from typing import Any

from torchtitan.models import deepseek_v3
from torchtitan.models.common import Embedding, Linear, RMSNorm


def _tiny(**backends: Any) -> deepseek_v3.DeepSeekV3Model.Config:
    dim, vocabulary = 32, 260
    rope = deepseek_v3._debugmodel(**backends).layers[0].attention.rope
    backends.pop("num_mtp_layers")
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=3,
        n_dense_layers=1,
        dim=dim,
        n_heads=4,
        q_lora_rank=0,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        mscale=1.0,
        dense_hidden_dim=64,
        moe_hidden_dim=24,
        num_experts=4,
        num_shared_experts=1,
        router_top_k=2,
        router_score_func="softmax",
        rope=dataclasses.replace(rope, dim=8, theta=10000.0, scaling="none"),
        **backends,
    )
    return deepseek_v3.DeepSeekV3Model.Config(
        vocab_size=vocabulary,
        dim=dim,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=dim, param_init=deepseek_v3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=dim, param_init=deepseek_v3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=dim,
            out_features=vocabulary,
            param_init=deepseek_v3._output_linear_init(dim),
        ),
        layers=layers,
        mtp_layers=deepseek_v3._build_mtp_layers(layers[-1], dim=dim, num_mtp_layers=0),
    )


deepseek_v3.deepseekv3_configs.setdefault("tiny", _tiny)
