"""A MoE model small enough for the CPU: `deepseek_v3`, flavor `tiny`."""

from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.moe import MoEArgs

deepseekv3_args.setdefault(
    "tiny",
    DeepSeekV3ModelArgs(
        vocab_size=260,
        dim=32,
        inter_dim=64,
        moe_inter_dim=24,
        n_layers=3,
        n_dense_layers=1,
        n_heads=4,
        moe_args=MoEArgs(num_experts=4, num_shared_experts=1, top_k=2),
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
)
