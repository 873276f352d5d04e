"""Names in checkpoints of TorchTitan 0.2 in jobs of 0.3. (That these go on: test_training.)"""

import dataclasses
import pickle
import re
from pathlib import Path

import pytest

from shampoo_torchtitan.names import name_in_03

NAMES = {
    "output.weight": "lm_head.weight",
    "layers.3.attention.wk.weight": "layers.3.attention.qkv_linear.wk.weight",
    "layers.3.attention.wo.weight": "layers.3.attention.wo.weight",
    "layers.3.moe.experts.w1": "layers.3.moe.routed_experts.inner_experts.w1_EFD",
    "layers.3.moe.experts.w2": "layers.3.moe.routed_experts.inner_experts.w2_EDF",
    "layers.3.moe.shared_experts.w1.weight": "layers.3.moe.shared_experts.w1.weight",
    "layers.3.moe.expert_bias": "layers.3.moe.expert_bias_E",
}


@pytest.mark.parametrize("old", NAMES)
def test_names(old):
    assert name_in_03(old) == NAMES[old]


def as_02_would_name_it(checkpoint: Path) -> None:
    """Rewrites the names of a checkpoint of 0.3; 0.2 has no state for attention in one matrix."""

    def old(key: str) -> str:
        key = re.sub(r"\blm_head\.", "output.", key)
        return key.replace(".qkv_linear.", ".") if not key.startswith("optimizer") else key

    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    kept = [key for key in metadata.state_dict_metadata if "wqkv" not in key]
    metadata.state_dict_metadata = {old(key): metadata.state_dict_metadata[key] for key in kept}
    metadata.storage_data = {
        dataclasses.replace(index, fqn=old(index.fqn)): value
        for index, value in metadata.storage_data.items()
        if index.fqn in kept
    }
    metadata.planner_data = None
    file.write_bytes(pickle.dumps(metadata))
