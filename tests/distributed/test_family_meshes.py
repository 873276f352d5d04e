"""No member of the family depends on the mesh: the same gradients give the same parameters.

Every value of every setting that changes the update or how its state is kept is in some member of
the list, with others that it could get in the way of.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shampoo_fsdp import Shampoo
from tests.models import build, deterministic_gradients, full_parameters, set_gradients
from tests.ranks import run_ranks

STEPS = 16  # the last three of them are preconditioned for the member that starts latest
TOLERANCE = 1e-5
TOLERANCE_IN_BF16 = 2e-4
"""Where entries of the state are next to the middle of two bf16 numbers, fp32 rounding decides."""
SIZES = {"dim": 12, "hidden": 26, "vocab": 20, "n_layers": 1}
EXTRA = {
    "layers.0.experts": (4, 10, 6),
    "layers.0.conv": (8, 3, 2, 2),
    "layers.0.adapter": (4, 30),
    "layers.0.gate": (1, 9),
}
COMMON = {
    "lr": 1e-2,
    "max_preconditioner_dim": 8,
    "precondition_frequency": 4,
    "start_preconditioning_step": 4,
    "preconditioner": "shampoo",
}

MEMBERS = {
    "shampoo": {},
    "shampoo, coupled newton, rmsprop, heavy ball, l2": {
        "root_method": "coupled_newton",
        "grafting": "rmsprop",
        "momentum": 0.8,
        "base_width": 16,
        "weight_decay_type": "l2",
    },
    "shampoo of sums, polynomial, adagrad, nesterov, independent, packed": {
        "betas": (0.9, 1.0),
        "root_method": "polynomial",
        "grafting": "adagrad",
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay_type": "independent",
        "weight_decay": 0.01,
        "symmetric_packing": True,
    },
    "shampoo, qr, sgd, dampened, unmerged": {
        "root_method": "qr",
        "grafting": "sgd",
        "momentum": 0.8,
        "dampening": 0.3,
        "merge_dims": "small",
    },
    "shampoo, pseudo-inverse, no grafting, one-sided, vectors": {
        "root_method": "eigh_pseudo_inverse",
        "grafting": "none",
        "large_dim": "one_sided",
        "max_preconditioner_dim": 12,
        "precondition_1d": True,
        "start_preconditioning_step": 14,
    },
    "shampoo, diagonal, exponents, small dimensions merged, no bias correction": {
        "large_dim": "diagonal",
        "root_exponents": [0.4, 0.3],
        "merge_dims": "small",
        "use_bias_correction": False,
        "max_preconditioner_dim": 12,
    },
    "shampoo in bf16, packed": {
        "factor_dtype": "bfloat16",
        "root_dtype": "bfloat16",
        "momentum_dtype": "bfloat16",
        "symmetric_packing": True,
        "momentum": 0.8,
    },
    "soap, packed, in 3 parts": {
        "preconditioner": "soap",
        "symmetric_packing": True,
        "buckets": 3,
    },
    "soap, eigh, adam, heavy ball, one-sided, together": {
        "preconditioner": "soap",
        "root_method": "eigh",
        "grafting": "adam",
        "momentum": 0.8,
        "large_dim": "one_sided",
        "max_preconditioner_dim": 12,
        "refresh_schedule": "together",
    },
    "soap in bf16, diagonal, small dimensions merged": {
        "preconditioner": "soap",
        "large_dim": "diagonal",
        "merge_dims": "small",
        "max_preconditioner_dim": 12,
        "factor_dtype": "bfloat16",
        "root_dtype": "bfloat16",
        "momentum_dtype": "bfloat16",
    },
    "kl_shampoo, one replica for each block": {
        "preconditioner": "kl_shampoo",
        "owner_scope": "shard",
        "max_factor_ratio": 1.5,
    },
    "kl_shampoo, eigh, adam with its own beta2 and eps, nesterov, l2, one-sided": {
        "preconditioner": "kl_shampoo",
        "root_method": "eigh",
        "grafting": "adam",
        "grafting_beta2": 0.8,
        "grafting_eps": 1e-4,
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay_type": "l2",
        "large_dim": "one_sided",
        "max_preconditioner_dim": 12,
    },
    "kl_shampoo, polynomial, products and roots in bf16": {
        "preconditioner": "kl_shampoo",
        "root_method": "polynomial",
        "matmul_precision": "medium",
        "root_dtype": "bfloat16",
    },
    "kl_shampoo in bf16, rmsprop, diagonal, packed": {
        "preconditioner": "kl_shampoo",
        "grafting": "rmsprop",
        "large_dim": "diagonal",
        "max_preconditioner_dim": 12,
        "symmetric_packing": True,
        "factor_dtype": "bfloat16",
        "root_dtype": "bfloat16",
    },
}


def train(layout: str, member: str) -> dict[str, Tensor]:
    """Full parameters after the steps; one of them has no gradient at times."""
    built = build(layout, **SIZES)
    parameters = dict(built.model.named_parameters())
    for name, shape in EXTRA.items():
        generator = torch.Generator().manual_seed(len(name))
        value = 0.02 * torch.randn(shape, generator=generator)
        if layout not in ("single", "ddp"):
            inner = [Replicate()] * (built.mesh.ndim - 1)
            placements = [*inner, Shard(0)] if layout == "hsdp" else [Shard(0), *inner]
            value = distribute_tensor(value, built.mesh, placements)
        parameters[name] = nn.Parameter(value)
    optimizer = Shampoo(
        parameters.items(),
        replicas=built.mesh if layout == "ddp" else None,
        **{**COMMON, **MEMBERS[member]},
    )
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    for step in range(STEPS):
        gradients: dict[str, Tensor | None] = dict(deterministic_gradients(shapes, step))
        if step % 5 == 2:
            gradients["layers.0.attention.wq.weight"] = None
        set_gradients(parameters, gradients)
        optimizer.step()
    return full_parameters(parameters)


def train_all(layout: str) -> dict[str, dict[str, Tensor]]:
    return {member: train(layout, member) for member in MEMBERS}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return train_all("single")


@pytest.mark.parametrize(
    ("layout", "world"), [("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tp_fsdp", 4), ("ddp", 2)]
)
def test_every_mesh_equals_one_process(layout, world, alone):
    for rank, found in enumerate(run_ranks(world, train_all, layout=layout, timeout=300.0)):
        errors = {}
        for member, expected in alone.items():
            for name, value in expected.items():
                error = ((found[member][name] - value).norm() / value.norm()).item()
                errors[member] = max(error, errors.get(member, 0.0))
        wrong = {
            member: error
            for member, error in errors.items()
            if not error <= (TOLERANCE_IN_BF16 if "in bf16" in member else TOLERANCE)
        }
        assert not wrong, f"rank {rank}"
