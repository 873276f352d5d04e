"""The tiny Llama's placements are TorchTitan's. (Tests of meshes notice
whether values are the same on every layout.)"""

from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tests.models import build
from tests.ranks import ranks


@ranks(4)
def test_placements_are_those_of_torchtitan() -> None:
    parameters = dict(build("tp_fsdp").model.named_parameters())
    column_wise = (_StridedShard(0, split_factor=2), Shard(0))
    expected: dict[str, tuple[Placement, ...]] = {
        "layers.0.attention.wq.weight": column_wise,
        "layers.0.attention.wo.weight": (Shard(0), Shard(1)),
        "tok_embeddings.weight": column_wise,
        "output.weight": column_wise,
        "norm.weight": (Shard(0), Replicate()),
    }
    for name, placements in expected.items():
        p = parameters[name]
        assert isinstance(p, DTensor) and tuple(p.placements) == placements, name
